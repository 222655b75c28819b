"""GPU kernels in Triton with their launchers; installed as ``pyllm.triton_kernels``.

One file per operation, with the same two functions as every other face. Without a GPU they run in
Triton's interpreter (``TRITON_INTERPRET=1``, set before triton is imported) on CPU tensors, and the
tests compile them for sm_80, sm_86, sm_89 and sm_90.
"""
