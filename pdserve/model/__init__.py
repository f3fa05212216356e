"""Tensors: from weight files and packed batches of token ids to logits and KV blocks.

In: token runs with their block tables (``runner.Run``). Out: float32 logits of the rows that want
them; keys and values in the paged pool (``pool.KvPool``), from where others move them as bytes.
Nothing here knows requests, workers or stores.

What a model computes is data (``architecture.Architecture``), made by one file per family
(``families``). Start at ``runner.py`` (one step of the model), then ``layers.py``, ``ops.py`` (the
seam between the CPU and the Triton kernels), ``cpu_ops.py`` and ``load.py`` (which files, which
device, which kernels). ``sampler.py`` turns logits into tokens.
"""
