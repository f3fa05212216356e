"""A wall clock that a test can set: Python imports this module at the start of a process when its
directory is in ``PYTHONPATH``. ``PDSERVE_TEST_CLOCK`` names a file with nanoseconds to be added.
"""

import mmap
import os
import time

path = os.environ.get("PDSERVE_TEST_CLOCK", "")
if os.path.exists(path):  # every process pays for what is imported here
    with open(path, "rb") as file:
        ahead_ns = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("q")
    real_s, real_ns = time.time, time.time_ns
    time.time = lambda: real_s() + ahead_ns[0] / 1e9
    time.time_ns = lambda: real_ns() + ahead_ns[0]
