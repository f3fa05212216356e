"""What the prefill loop and the decode loop share: sequences, blocks, moves, and their thread.

In: messages (``Dispatch``, ``Handoff``, ``Cancel``, …), and model, store and tokeniser as objects.
Out: outputs (``ToDecode``, ``ToGateway``, ``ToRouter``) and a ``Load`` after each step. No socket,
no event loop, no Ray: a loop is stepped by a thread in production and by hand in tests.

Start at ``outputs.py`` (what a loop is and says), then ``blocks.py`` (the device pool and its
prefix cache), ``sequence.py`` (one request's tokens), ``mover.py`` (blocks to and from the store)
and ``thread.py``.
"""
