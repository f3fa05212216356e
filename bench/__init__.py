"""Measurements: every number that this project states, beside its limit and its peers.

``python -m bench.<area> [--json FILE] [--quick]`` measures one area and prints one table. ``frame``
is what the areas share, ``peers`` sets up what we compare with, ``traces`` are recorded workloads,
``results`` holds tables with the machine and commit they were measured on.
"""
