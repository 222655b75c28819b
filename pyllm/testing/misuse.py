"""Calls of the C++ kernels that are wrong on purpose, one for each kind of report of a sanitizer.

``scripts/sanitize.py`` runs ``python -m pyllm.testing.misuse address`` (or ``thread``) on the build
whose tests it is about to run: a sanitizer that misses one of these is not there, and its silence
says nothing. Without a sanitizer the calls corrupt memory, so each has a process of its own.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from pyllm._native import cpu_extension

ROWS, WIDTH = 6, 8
STDERR = 2


@dataclass(frozen=True)
class Misuse:
    """A wrong call, and a phrase of the report that it must bring about."""

    call: Callable[[ModuleType], None]
    report: str


def _rms_norm(
    native: ModuleType, x: torch.Tensor, y: torch.Tensor, rows: int, shift: int = 0
) -> None:
    weight, rstd = torch.ones(WIDTH), torch.empty(ROWS + 1)
    sizes = (rows, WIDTH, 1)
    pointers = (y.data_ptr(), rstd.data_ptr())
    native.rms_norm_forward(
        native.DTYPES["float32"], x.data_ptr() + shift, weight.data_ptr(), 0.0, *pointers, *sizes
    )


def _read_past_the_end(native: ModuleType) -> None:
    _rms_norm(native, torch.ones(ROWS, WIDTH), torch.empty(ROWS + 1, WIDTH), ROWS + 1)


def _write_past_the_end(native: ModuleType) -> None:
    _rms_norm(native, torch.ones(ROWS + 1, WIDTH), torch.empty(ROWS, WIDTH), ROWS + 1)


def _misaligned(native: ModuleType) -> None:
    _rms_norm(native, torch.ones(ROWS, WIDTH), torch.empty(ROWS, WIDTH), ROWS - 1, shift=1)


def _overflow(native: ModuleType) -> None:
    # Without heads there is nothing to read, but the third row's table starts 2 * 2^62 further on.
    x = torch.ones(1).data_ptr()
    code = native.DTYPES["float32"]
    native.rope(code, False, x, 0, 0, 0, x, x, 2**62, x, 3, 1, 0, 1, 1)


def _null_pointer(native: ModuleType) -> None:
    order, rows = torch.zeros(1, dtype=torch.int32), torch.empty(4)
    native.gather_rows(0, order.data_ptr(), 1, rows.data_ptr(), 1, 16, 1)


def _race(native: ModuleType) -> None:
    """The gradients of all tokens go to row 0."""
    dy, rows, drows = torch.ones(ROWS, WIDTH), torch.ones(1, WIDTH), torch.empty(1, WIDTH)
    weights, dweights = torch.ones(ROWS), torch.empty(ROWS)
    position = torch.zeros(ROWS, dtype=torch.int32)
    tensors = (dy, rows, weights, position, drows, dweights)
    pointers = (tensor.data_ptr() for tensor in tensors)
    native.moe_combine_backward(native.DTYPES["float32"], *pointers, ROWS, 1, WIDTH, 2)


def _race_of_copies(native: ModuleType) -> None:
    """By memcpy: in a cache of 0 slots, the keys of each batch row go to the same place."""
    new, cache = torch.ones(ROWS, WIDTH), torch.empty(2, WIDTH)
    caches = (cache[0].data_ptr(), cache[1].data_ptr())
    rows = (new.data_ptr(), WIDTH, WIDTH, WIDTH)
    starts = torch.zeros(ROWS, dtype=torch.int32)
    counts = torch.ones(ROWS, dtype=torch.int32)
    sizes = (ROWS, 1, 0, 1, WIDTH)
    at = (starts.data_ptr(), counts.data_ptr())
    native.kv_append(new.element_size(), *caches, *rows, *rows, *at, 0, 0, *sizes, 2)


MISUSES: Mapping[str, Mapping[str, Misuse]] = {
    "address": {
        "a read past the end": Misuse(_read_past_the_end, "READ of size 4"),
        "a write past the end": Misuse(_write_past_the_end, "WRITE of size 4"),
        "a misaligned address": Misuse(_misaligned, "load of misaligned address"),
        "a signed overflow": Misuse(_overflow, "signed integer overflow"),
        "a null pointer": Misuse(_null_pointer, "null pointer passed as argument"),
    },
    "thread": {
        "a data race": Misuse(_race, "data race"),
        "a data race of copies": Misuse(_race_of_copies, "data race"),
    },
}


def is_seen(misuse: Misuse, native: ModuleType) -> bool:
    """Make the call in a process of its own: does it end that, with the report that is due?"""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), STDERR)
            misuse.call(native)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return status != 0 and misuse.report.encode() in output.read()


def main(sanitizer: str) -> int:
    """Try all, on each instruction set; a line for each. 0 where every one was seen, else 1."""
    native = cpu_extension()
    assert native is not None, "scripts/sanitize.py has built it"
    missed = 0
    for isa in native.supported_isas():
        native.set_isa(isa)
        verdicts = {name: is_seen(one, native) for name, one in MISUSES[sanitizer].items()}
        unseen = [name for name, seen in verdicts.items() if not seen]
        missed += len(unseen)
        what = f"MISSED {', '.join(unseen)}" if unseen else f"seen {', '.join(verdicts)}"
        print(f"{isa}: {what}")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
