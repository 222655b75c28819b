"""Launchers of the CUDA C++ kernels in ``csrc/cuda``: one file per operation.

For cards from compute capability 7.5 on. ``_launch.py`` says how tensors, scratch memory and the
stream get there, and how the same kernels run on CPU tensors where there is no card.
"""
