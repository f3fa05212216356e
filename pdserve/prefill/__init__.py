"""Prompts to KV blocks in the store, and one first token.

In: ``Dispatch``, ``Preempt``, ``Cancel``. Out: KV blocks in the store of decode's host, ``Handoff``
to decode, chunk boundaries and progress to the router; for a request that ends with its first
token, that token to the gateway; a sequence that stays on this worker to its streams.

Start at ``prompts.py``; ``prompt.py`` is one prompt and its stages, ``batch.py`` what a step
computes. The loop around it is ``engine.loop``.
"""
