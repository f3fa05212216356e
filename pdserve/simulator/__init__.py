"""Discrete events over the production cores of router and kvstore. Empty until it is built.

In: a request trace and a configuration. Out: what the cluster would have done. The cores take time
as an argument, so nothing here pretends: it only moves the clock.
"""
