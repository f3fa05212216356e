"""The whole cluster in one thread: production code under a virtual clock, network and disk.

One seed is one run, to the bit. ``loop`` is an asyncio event loop whose time jumps from event to
event and which knows whose every event is, so that a process can be stopped, continued or killed;
``network`` carries the bytes of the production wire code, late, in pieces, or not at all; ``store``
puts memory around the production core of a store node; ``worker`` runs the production engine loop
on a model that is honest about its KV. Router, links, postboxes, gateways and worker shells are the
production classes, unchanged. ``faults`` throws the dice, ``invariants`` judges, ``mutants`` plants
bugs to show that it would see them.

    python -m tests.simulation --seed 7          replay one seed, with its log
    python -m tests.simulation --runs 10000      many seeds, stops at none, names those that failed
    python -m tests.simulation --mutants         every planted bug, and how many seeds it took
"""
