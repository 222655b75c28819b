"""The textbook faces: one file per operation, plain PyTorch, forward and hand-derived backward.

Each file states its equation, its source and its shapes, then code that looks like the equation.
Every other face is tested against these. Shape letters, used throughout the project:

``B`` batch, ``T`` tokens, ``S`` keys, ``D`` model width, ``H`` query heads, ``G`` kv heads,
``K`` head size, ``F`` expert or MLP width, ``E`` experts, ``A`` active experts per token,
``N`` flattened rows, ``R`` routed rows (``N * A``), ``V`` vocabulary.
"""
