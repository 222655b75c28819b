"""How an operation is tested: declared once, checked against an error budget, faults planted.

``cases/<op>.py`` declares, ``pairwise.py`` combines hostile sizes, ``check.py`` runs a face or a
door on a case, ``budget.py`` judges the result, ``faults.py`` plants errors that must be seen, and
``suite.py`` turns a declaration into pytest tests. ``benchmarks/ops.py`` reads the same
declarations with a stopwatch.
"""

from pyllm.testing.budget import Mismatch
from pyllm.testing.cases import OPERATIONS
from pyllm.testing.check import check_door, check_face, is_killed, poisoned_memory, run_face
from pyllm.testing.declaration import Draw, Mutant, OpCase, Operation, Output, mutate
from pyllm.testing.pairwise import pairwise

__all__ = [
    "OPERATIONS",
    "Draw",
    "Mismatch",
    "Mutant",
    "OpCase",
    "Operation",
    "Output",
    "check_door",
    "check_face",
    "is_killed",
    "mutate",
    "pairwise",
    "poisoned_memory",
    "run_face",
]
