"""The Triton kernels of the model, each with its specification beside it.

In flow tensors of ``model.triton_ops``, out flow tensors; nothing here knows requests or workers.
Every file holds one kind of work: the kernel, a wrapper that checks everything before the launch,
a reference in plain torch that *is* the meaning of the wrapper, and ``configurations()``, which
``compile_all`` turns into machine code for every GPU generation we serve on, without a GPU.

A result for one token never depends on the tokens beside it: tiles lie at absolute places, and
every sum has one order. ``attention`` says how. Start reading there.
"""
