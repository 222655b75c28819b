"""What a PyTorch user would call instead of each operation: the peers in ``benchmarks/ops.py``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Values = Mapping[str, Any]


def _rms_norm(v: Values) -> Tensor:
    return F.rms_norm(v["x"], v["x"].shape[-1:], v["weight"], v["eps"])


def _attention(v: Values) -> Tensor:
    if v["window"] or (v["causal"] and v["q"].shape[1] != v["k"].shape[1]):
        raise NotImplementedError("scaled_dot_product_attention has no window")
    y = F.scaled_dot_product_attention(
        v["q"].transpose(1, 2),
        v["k"].transpose(1, 2),
        v["v"].transpose(1, 2),
        is_causal=v["causal"],
        scale=v["scale"],
        enable_gqa=True,
    )
    return y.transpose(1, 2)


def _linear_cross_entropy(v: Values) -> Tensor:
    logits = F.linear(v["x"], v["weight"])
    return F.cross_entropy(
        logits.float(), v["targets"], ignore_index=v["ignore_index"], reduction="none"
    )


def _moe_ffn(v: Values) -> Tensor:
    """Mixtral's block with PyTorch's grouped matrix product, as transformers 5 runs it."""
    top_k = v["experts"].shape[1]
    experts = v["experts"].reshape(-1).long()
    order = experts.argsort(stable=True)
    ends = torch.bincount(experts, minlength=v["w_in"].shape[0]).cumsum(0).to(torch.int32)
    rows = v["x"][order // top_k]
    pre = F.grouped_mm(rows, v["w_in"].transpose(1, 2), offs=ends)
    if v["activation"] == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(pre, approximate="tanh")
    y = F.grouped_mm(hidden, v["w_out"].transpose(1, 2), offs=ends)
    y = y * v["weights"].reshape(-1, 1)[order].to(y.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].unflatten(0, (-1, top_k)).sum(1)


PEERS: dict[str, Callable[[Values], Tensor]] = {
    "rms_norm": _rms_norm,
    "attention": _attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "moe_ffn": _moe_ffn,
}
"""Operation to the forward of its peer: named inputs to the first output; autograd goes back."""
