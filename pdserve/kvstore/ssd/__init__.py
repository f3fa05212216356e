"""The disk below an arena: an append-only log of blocks that survives its process.

``tier`` decides what goes down and comes up; ``log`` keeps it, in segments of ``format``.
``health`` says whether the disk is worth asking at this moment.
"""
