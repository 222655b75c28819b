"""The C++ face: launchers that check, allocate, and hand addresses to ``pyllm._cpu``.

The kernels are in ``csrc/cpu/<op>.cpp``. Only ``pyllm.ops`` imports this package.
"""
