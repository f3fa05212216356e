"""A kill campaign over the KV store: real processes, killed and stopped at random, every byte read.

    python -m tests.campaign --seed 7 --seconds 60 --kills 50

``world`` says what every block's bytes are, so any reader can check any read; ``roles`` are the
processes that use the store (``actor`` is what they share), ``fencing`` one that brings up nodes
twice; ``masters`` lead over one node's table, or stand by; ``stage`` starts, kills and restarts
them all; ``audit`` asks at quiet moments whether anything is left that nobody owns. What an actor
finds wrong it sends through a pipe; how far it came it writes to ``board``, which its death does
not erase.

``mutants`` takes one guard of the store away at a time: the campaign must turn red. A campaign that
has never been red says nothing.
"""
