"""What a PyTorch user would call instead of each operation: the peers in ``benchmarks/ops.py``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.reference.decode_attention import widened
from pyllm.reference.int8_linear import quantize_rows

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


def _one_length(v: Values) -> int:
    """Positions before the new tokens, for peers that know neither rings nor ragged batches."""
    starts, counts = v["starts"].tolist(), v["counts"].tolist()
    if v["rolling"] or len(set(starts)) > 1 or set(counts) != {v[_new(v)].shape[1]}:
        raise NotImplementedError("PyTorch has no rolling cache and no ragged batch")
    return starts[0]


def _new(v: Values) -> str:
    return "q" if "q" in v else "k"


def _kept_for_append(v: Values) -> Values:
    if v["k_scales"] is not None:
        raise NotImplementedError("PyTorch has no int8 cache")
    start = _one_length(v)
    return {**v, "new": slice(start, start + v["k"].shape[1])}


def _kv_append(v: Values) -> Tensor:
    v["k_cache"][:, v["new"]] = v["k"]
    v["v_cache"][:, v["new"]] = v["v"]
    return v["k_cache"]


def _kept_for_decode(v: Values) -> Values:
    """The cache as PyTorch's attention is fastest with it: heads first, each in one piece. An int8
    cache beforehand in the dtype of the queries: PyTorch has none, reads two or four times as much,
    and is not charged for the conversion."""
    end = _one_length(v) + v["q"].shape[1]
    if v["window"] or v["q"].shape[1] > 1:
        raise NotImplementedError("scaled_dot_product_attention has no window and needs a mask")
    cache = {}
    for name, scales in (("k_cache", v["k_scales"]), ("v_cache", v["v_scales"])):
        held = v[name] if scales is None else widened(v[name], scales, torch.float32).to(v["q"])
        cache[name] = held[:, :end].transpose(1, 2).contiguous()
    return {**v, **cache}


def _decode_attention(v: Values) -> Tensor:
    y = F.scaled_dot_product_attention(
        v["q"].transpose(1, 2),
        v["k_cache"],
        v["v_cache"],
        scale=v["scale"],
        enable_gqa=v["q"].shape[2] != v["k_cache"].shape[1],
    )
    return y.transpose(1, 2)


def _kept_for_int8(v: Values) -> Values:
    """Quantised beforehand: `_int_mm` neither quantises nor scales, and is not charged for it."""
    if not v["quantize_input"]:
        raise NotImplementedError("_int_mm multiplies integers only")
    return {**v, "q": quantize_rows(v["x"])[0], "weight_DF": v["weight"].T}


def _int8_linear(v: Values) -> Tensor:
    return torch._int_mm(v["q"], v["weight_DF"])


def _linear_cross_entropy(v: Values) -> Tensor:
    logits = F.linear(v["x"], v["weight"])
    return F.cross_entropy(
        logits.float(), v["targets"], ignore_index=v["ignore_index"], reduction="none"
    )


def _picked(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, whose backward on a card sorts; that of index_select adds as it comes."""
    return x.index_select(0, rows) if x.is_cuda else x[rows]


def _moe_ffn(v: Values) -> Tensor:
    """Mixtral's block with PyTorch's grouped matrix product, as transformers 5 runs it. Nothing in
    it waits for a card, as ``bincount`` would."""
    top_k = v["experts"].shape[1]
    experts = v["experts"].reshape(-1).long()
    order = experts.argsort(stable=True)
    names = torch.arange(v["w_in"].shape[0], device=experts.device)
    ends = torch.searchsorted(experts[order], names, right=True, out_int32=True)
    rows = _picked(v["x"], order // top_k)
    pre = F.grouped_mm(rows, v["w_in"].transpose(1, 2), offs=ends)
    if v["activation"] == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(pre, approximate="tanh")
    y = F.grouped_mm(hidden, v["w_out"].transpose(1, 2), offs=ends)
    y = y * _picked(v["weights"].reshape(-1, 1), order).to(y.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return _picked(y, back).unflatten(0, (-1, top_k)).sum(1)


PEERS: dict[str, Callable[[Values], Tensor]] = {
    "rms_norm": _rms_norm,
    "attention": _attention,
    "kv_append": _kv_append,
    "decode_attention": _decode_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "int8_linear": _int8_linear,
    "moe_ffn": _moe_ffn,
}
"""Operation to the forward of its peer: named inputs to the first output; autograd goes back."""

KEPT: dict[str, Callable[[Values], Values]] = {
    "kv_append": _kept_for_append,
    "decode_attention": _kept_for_decode,
    "int8_linear": _kept_for_int8,
}
"""Operation to how its peer would have kept the inputs from call to call; not timed."""
