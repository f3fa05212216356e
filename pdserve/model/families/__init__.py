"""Families of models: what each one's config.json and tensors mean in our terms.

One small file per family: how its ``config.json`` becomes an ``Architecture``, and how it names its
tensors where that differs. In: a model's files. Out: ``Architecture``, ``TensorNames``. No torch
here, and no arithmetic: what a family needs computed is a field of ``Architecture`` that
``layers.py`` reads.

Start at ``registry.py``, then ``llama.py`` (the plainest) and ``gemma3.py`` (the one that differs
most). ``docs/adding_a_model.md`` says how to add one.
"""
