"""The error budget: how far a face may be from the truth.

The truth is the reference in float64 on the same (rounded) inputs. A face may err twice as much as
the reference does in the dtype under test (three times for gradients), plus the spacing of that
dtype at the tensor's largest entry; the same for the norm of the error, relative to the norm of the
tensor. The idea is FlashAttention's test; there is no absolute tolerance, so inputs too small to
tell right from wrong cannot hide a fault: the truth itself must be of order one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
GENERATED_FACTOR = 4.0
"""Of many thousand drawn cases, a few have one-element tensors that the reference rounds exactly by
chance: a float16 gradient was 1.2 times over its budget in one of 6,000."""
SMALLEST, LARGEST = 0.01, 1000.0
"""What the largest entry of a float64 truth may be for the comparison to mean something."""

SPACINGS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 8.0, torch.float64: 4096.0}
"""How many ``eps`` are allowed beside the reference's own error. A 16-bit result is rounded once at
the end, so one spacing is what two sound kernels may differ by. A float32 sum of a thousand terms
drifts by a few spacings with its order, and the reference may be exact by chance where the tensor
has one element. In float64 truth and reference are the same number, so all the drift is here."""


class Mismatch(AssertionError):
    """A face is outside of its budget; the message says which tensor, by how much."""


@dataclass(frozen=True)
class Errors:
    """Error of one tensor against the truth."""

    largest: float
    relative_norm: float


def measure(got: Tensor, truth: Tensor) -> Errors:
    """Largest absolute error, and the norm of the error over the norm of ``truth``."""
    if truth.numel() == 0:
        return Errors(0.0, 0.0)
    difference = got.to(truth.dtype) - truth
    norm = float(truth.norm())
    return Errors(float(difference.abs().max()), float(difference.norm()) / max(norm, 1e-300))


def compare_exactly(name: str, got: Tensor, expected: Tensor) -> None:
    """Integers, and numbers that are only moved: dtype, shape and every entry.

    Raises:
        Mismatch: any difference.
    """
    _compare_form(name, got, expected)
    wrong = int((got != expected).sum())
    if wrong:
        raise Mismatch(f"{name}: {wrong} of {got.numel()} entries differ from the reference")


def compare(
    name: str,
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    degenerate: bool = False,
    generated: bool = False,
) -> None:
    """Hold ``got`` to the budget.

    Args:
        name: of the tensor, for the message.
        got: what the face computed.
        plain: what the reference computed in the same dtype.
        truth: what the reference computed in float64.
        dtype: of the operation's inputs; its spacing counts also for float32 side outputs, since
            what they are computed from may have been rounded to it.
        gradient: use the factor for gradients.
        degenerate: the truth is zero but for rounding; its scale is taken as one.
        generated: the case was drawn at random, and may be one number that is what is left of a
            sum: its scale is taken as one, and the budget is ``GENERATED_FACTOR`` times as wide.

    Raises:
        Mismatch: other dtype or shape, a NaN or infinity that the truth has not, or out of budget.
    """
    _compare_form(name, got, plain)
    finite = truth.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite], plain[~finite]):
        raise Mismatch(f"{name}: NaN or infinity not where the reference has it")
    if not bool(finite.any()):
        return
    got, plain, truth = got[finite], plain[finite], truth[finite]
    largest = float(truth.abs().max())
    degenerate |= generated
    if not degenerate and not SMALLEST <= largest <= LARGEST:
        raise ValueError(
            f"{name}: the case is ill-scaled, its largest entry is {largest:.2g} and should lie "
            f"between {SMALLEST} and {LARGEST}"
        )
    slack = GENERATED_FACTOR if generated else 1.0
    spacing = slack * SPACINGS[dtype] * torch.finfo(dtype).eps
    factor = slack * (GRADIENT_FACTOR if gradient else FORWARD_FACTOR)
    error, own = measure(got, truth), measure(plain, truth)
    allowed = factor * own.largest + spacing * (max(largest, 1.0) if degenerate else largest)
    if error.largest > allowed:
        raise Mismatch(
            f"{name}: error {error.largest:.3g} over the {allowed:.3g} allowed "
            f"(reference in {dtype}: {own.largest:.3g}, largest entry {largest:.3g})"
        )
    allowed = factor * own.relative_norm + spacing
    if not degenerate and error.relative_norm > allowed:
        raise Mismatch(
            f"{name}: relative norm of the error {error.relative_norm:.3g} over the {allowed:.3g} "
            f"allowed (reference in {dtype}: {own.relative_norm:.3g})"
        )


def _compare_form(name: str, got: Tensor, expected: Tensor) -> None:
    if not isinstance(got, Tensor):
        raise Mismatch(f"{name}: expected a tensor, got {type(got).__name__}")
    for what in ("dtype", "shape", "device"):
        have, want = getattr(got, what), getattr(expected, what)
        if have != want:
            raise Mismatch(f"{name}: {what} is {have}, the reference's is {want}")
