r"""Muon: momentum whose direction is orthogonalised, for the matrices of a model.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The momentum M of a matrix is replaced by
the nearest semi-orthogonal matrix, so that every direction is learned at one speed:

.. math:: G \to M = \mu M + G, \qquad O = \mathrm{NS}(G + \mu M), \qquad
          W \leftarrow W - \eta\,(0.2 \sqrt{\max(m, n)}\; O + \lambda W)

The factor makes an update as large as AdamW's (root mean square about 0.2), so both take one
learning rate (Moonlight, arXiv:2502.16982, eq. 4). Stacked experts (E, m, n) are E matrices,
orthogonalised in one batch.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's Newton-Schulz step; it lifts every singular value to 0.7 ... 1.2."""


def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The semi-orthogonal factor of (..., m, n), by Newton-Schulz iterations in ``dtype``.

    ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from X of unit Frobenius norm.
    """
    a, b, c = _QUINTIC
    x = matrix.reshape(-1, *matrix.shape[-2:]).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for tensors of two or three dimensions (the first of three counts matrices).

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate, on AdamW's scale.
        momentum: Nesterov's.
        weight_decay: decoupled, as in AdamW.
        dtype: of the Newton-Schulz iterations; bfloat16 is enough where it is fast.

    A matrix whose gradient is exactly zero (an expert that got no token) is left as it is:
    orthogonalising would blow the rest of its momentum up to an update of full size.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon: expected matrices or stacks of them, got shape "
                        f"{tuple(parameter.shape)}"
                    )

    def make_state(self) -> None:
        """Zeros for the momentum of each matrix, if it has none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns what ``closure`` returns.

        Where memory runs out, each matrix and its momentum are both updated or both untouched: all
        room is taken before either is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"]
                ahead = momentum.mul(group["momentum"]).add_(parameter.grad)
                torch.add(parameter.grad, ahead, alpha=group["momentum"], out=ahead)
                update = orthogonalise(ahead, dtype=self.dtype)
                del ahead
                update *= 0.2 * max(parameter.shape[-2:]) ** 0.5
                update.add_(parameter, alpha=group["weight_decay"])
                used = parameter.grad.flatten(-2).any(-1)[..., None, None]
                update.mul_(used)
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                parameter.sub_(update, alpha=group["lr"])
        return loss
