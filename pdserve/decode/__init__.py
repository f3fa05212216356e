"""KV blocks from the store to tokens, one or more per running sequence and step.

In: ``Handoff``, ``Resume``, ``Preempt``, ``Cancel``; sequences whose prompts this worker computed.
Out: token deltas to the gateways, progress and parked requests to the router.

Start at ``streams.py``; ``stream.py`` is one sequence and its stages, ``room.py`` who yields when
blocks run out; ``drafting.py`` guesses what comes next and ``speculation.py`` says how many of the
guesses a step computes; ``beams.py`` searches for the likeliest answers and ``beam_group.py`` keeps
their sequences. The loop around it is ``engine.loop``.
"""
