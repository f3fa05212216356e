"""A worker's loop, and what its two parts share: sequences, blocks, moves, and the thread.

In: messages (``Dispatch``, ``Handoff``, ``Cancel``, …), and model, store and tokeniser as objects.
Out: outputs (``ToDecode``, ``ToGateway``, ``ToRouter``) and a ``Load`` after each step. No socket
(but between the processes of one split model), no event loop, no Ray: the loop is stepped by a
thread in production and by hand in tests.

Start at ``loop.py`` (a step, over prompts and streams) and ``outputs.py`` (what it says), then
``workplace.py`` (what the parts share), ``blocks.py`` (the device pool and its prefix cache),
``sequence.py`` (one request's tokens), ``masks.py`` (what grammars allow next), ``mover.py``
(blocks to and from the store) and ``thread.py``. Where a worker has several processes:
``leader.py`` and ``follower.py``.
"""
