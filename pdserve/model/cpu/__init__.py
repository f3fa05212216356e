"""The C++ kernels of the CPU path and the code that compiles and loads them.

In: pointers and strides from ``model.cpu_ops``. Out: rows written in place. Start at the head of
``kernels.cpp``; ``library.py`` turns it into a shared library once per machine.
"""
