"""KV blocks from the store to tokens, one per running sequence and step.

In: ``Handoff``, ``Resume``, ``Cancel``. Out: token deltas to the gateways, progress and parked
requests to the router.

Start at ``loop.py``; ``stream.py`` is one sequence and its stages, ``room.py`` who yields when
blocks run out.
"""
