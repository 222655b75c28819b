"""Prints, for each mutant of an operation from a number on, whether the check sees it on the card:
python gpu_mutants.py moe_ffn 0."""

import json
import sys

import torch

from pyllm.testing import OPERATIONS, check_face
from pyllm.testing.declaration import Mutant, Operation, mutate


def is_killed(operation: Operation, mutant: Mutant) -> bool:
    """By an exception, or by a result over its budget, on any of the small cases."""
    for case in operation.smoke_cases:
        try:
            check_face(case, mutate(operation, mutant), torch.float32, "cuda")
        except Exception:
            torch.cuda.synchronize()  # raises again if the device is lost
            return True
    return False


def main(name: str, first: str) -> None:
    """One line of JSON for each."""
    operation = OPERATIONS[name]
    for mutant in operation.mutants[int(first) :]:
        killed = is_killed(operation, mutant)
        print(json.dumps({"mutant": mutant.name, "killed": killed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
