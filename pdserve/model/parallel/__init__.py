"""Tensor parallelism: one model over several processes, each with a part of every layer.

In: a ``Split`` (``parts.py``), weights of which only a part is kept (``part_files.py``), and a
``Group`` in which the processes add what they computed (``group.py``). Out: layers (``layers.py``),
an output layer (``head.py``) and a pool (``pool.py``) that a ``ModelRunner`` takes as it takes
those of a whole model. ``engine/leader.py`` has the processes.
"""
