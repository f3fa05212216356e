"""Garbage collection in a process that keeps many objects for long.

A full collection walks over everything that lives: a tenth of a second with 100,000 requests
waiting, while nothing is decided. What the router makes is freed by counting references; cycles are
rare and small. So full collections are left to once in a billion objects.
"""

import gc

NEW_OBJECTS = 50_000
YOUNG_COLLECTIONS = 20
MIDDLE_COLLECTIONS = 1_000


def collect_rarely() -> None:
    """For this whole process, from now on. What is there already is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, YOUNG_COLLECTIONS, MIDDLE_COLLECTIONS)
