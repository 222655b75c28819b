"""A whole model's forward pass over a few new tokens in one C++ call: ``csrc/cpu/decode_step.cpp``.

It has no door: it is not one operation but the whole of :class:`pyllm.models.Transformer`, which is
its reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import ring_of
from pyllm.cpu_kernels._launch import extension

MAX_TOKENS = 512
"""New tokens in one call, of all sequences together (but 16 of each in any case); of more the
caller makes pieces. Each call reads all experts that any of its tokens chose, so that few large
pieces are faster than many small ones; what a token needs in between is 30 kB in moe-158m."""

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


@dataclass(frozen=True)
class Weights:
    """A matrix whose rows are its outputs, or several of them one after the other."""

    weight: Tensor
    """(..., F, D), contiguous: float32, bfloat16 or int8."""
    scale: Tensor | None = None
    """(..., F) float32, of int8."""


@dataclass(frozen=True)
class Feedforward:
    """Networks of one shape: experts, or a single one."""

    w_in: Weights
    """(E, F, D) or (E, 2F, D), gate rows first."""
    w_out: Weights
    """(E, D, F)."""


@dataclass(frozen=True)
class LayerWeights:
    """One block. Norms and router are float32."""

    attention_norm: Tensor
    attention_norm_bias: Tensor | None
    qkv: Weights
    out: Weights
    ffn_norm: Tensor
    ffn_norm_bias: Tensor | None
    router: Tensor | None
    router_bias: Tensor | None
    experts: Feedforward | None
    mlp: Feedforward | None
    """Beside the experts, or in place of them."""


@dataclass(frozen=True)
class ModelWeights:
    """Everything that the step reads."""

    layers: Sequence[LayerWeights]
    embedding: Weights
    output: Weights
    final_norm: Tensor
    final_norm_bias: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, (context, K/2) float32."""
    positions: Tensor | None
    """(context, D) float32, added to the embeddings."""
    layer_norm: bool
    gated: bool
    eps: float
    n_heads: int
    n_kv_heads: int
    head_dim: int
    top_k: int
    window: int | None
    sinks: int


class DecodeStep:
    """Runs new tokens through a model whose weights it holds on to; see :meth:`__call__`.

    Raises:
        ValueError: weights of another dtype, on another device, or not contiguous.
    """

    def __init__(self, model: ModelWeights) -> None:
        self.model = model
        native = extension()
        self._plan = native.Plan(
            weights=native.WEIGHT_TYPES[_type_of(model.embedding.weight)],
            layer_norm=model.layer_norm,
            gated=model.gated,
            eps=model.eps,
            width=model.embedding.weight.shape[1],
            heads=model.n_heads,
            groups=model.n_kv_heads,
            head_width=model.head_dim,
            top_k=model.top_k,
            window=model.window or 0,
            sinks=model.sinks,
            cos=_floats(model.rotary and model.rotary[0]),
            sin=_floats(model.rotary and model.rotary[1]),
            positions=_floats(model.positions),
            embedding=self._matrix(model.embedding),
            output=self._matrix(model.output),
            final_norm=_floats(model.final_norm),
            final_norm_bias=_floats(model.final_norm_bias),
            layers=[self._layer(layer) for layer in model.layers],
        )

    def __call__(
        self,
        ids_BT: Tensor,
        starts_B: Tensor,
        counts_B: Tensor,
        store_L2BSGK: Tensor,
        sinks: int,
        rolling: bool,
        n_logits: int,
        scales_L2BSG: Tensor | None = None,
    ) -> Tensor | None:
        """Run the tokens, and write their keys and values into the cache.

        Args:
            ids_BT: int64, in the vocabulary; of row ``b``, the first ``counts_B[b]`` are real.
            starts_B, counts_B: int32, as :func:`pyllm.ops.kv_append` has them.
            store_L2BSGK: the cache, contiguous: float32, bfloat16, or int8 with scales.
            sinks, rolling: of the cache.
            n_logits: how many sequences have new tokens; 0 for no logits.
            scales_L2BSG: of an int8 cache, contiguous float32.

        Returns:
            (R, V) float32: what follows the last new token of each of them, in order.

        Raises:
            ValueError: a cache of another dtype, not contiguous or without its scales.
        """
        batch, n_tokens = ids_BT.shape
        n_slots = store_L2BSGK.shape[3]
        if store_L2BSGK.dtype == torch.int8 and scales_L2BSG is None:
            raise ValueError("decode_step: an int8 cache needs scales, got None")
        logits_RV = None
        if n_logits:
            # Not whatever dtype and device new tensors have by default.
            logits_RV = torch.empty(
                n_logits, self.model.output.weight.shape[0], dtype=torch.float32, device="cpu"
            )
        self._plan.step(
            ids_BT.data_ptr(),
            starts_B.data_ptr(),
            counts_B.data_ptr(),
            batch,
            n_tokens,
            store_L2BSGK.data_ptr(),
            extension().WEIGHT_TYPES[_type_of(store_L2BSGK)],
            _floats(scales_L2BSG),
            n_slots,
            ring_of(n_slots, sinks, rolling),
            _address(logits_RV),
            torch.get_num_threads(),
        )
        return logits_RV

    def _matrix(self, weights: Weights) -> Any:
        weight, scale = weights.weight, weights.scale
        if _type_of(weight) != _type_of(self.model.embedding.weight):
            raise ValueError(
                f"decode_step: all matrices must have one dtype, got {weight.dtype} beside "
                f"{self.model.embedding.weight.dtype}"
            )
        rows = weight.shape[:-1].numel()
        return extension().Matrix(_address(weight), _floats(scale), rows)

    def _networks(self, networks: Feedforward | None) -> Any:
        if networks is None:
            return None
        count, _, hidden = networks.w_out.weight.shape
        w_in, w_out = self._matrix(networks.w_in), self._matrix(networks.w_out)
        return extension().Networks(w_in, w_out, count, hidden)

    def _layer(self, layer: LayerWeights) -> Any:
        norms = ("attention_norm", "attention_norm_bias", "ffn_norm", "ffn_norm_bias")
        plain = (*norms, "router", "router_bias")
        return extension().PlanLayer(
            **{name: _floats(getattr(layer, name)) for name in plain},
            qkv=self._matrix(layer.qkv),
            out=self._matrix(layer.out),
            experts=self._networks(layer.experts),
            mlp=self._networks(layer.mlp),
        )


def _type_of(weight: Tensor) -> str:
    if weight.dtype not in _TYPES:
        expected = ", ".join(str(known) for known in _TYPES)
        raise ValueError(f"decode_step: weights and cache must be {expected}, got {weight.dtype}")
    return _TYPES[weight.dtype]


def _floats(tensor: Tensor | None) -> int:
    """The address of what is float32 whatever the matrices are kept in."""
    if tensor is not None and tensor.dtype != torch.float32:
        raise ValueError(
            f"decode_step: scales, norms, routers and positions must be float32, got {tensor.dtype}"
        )
    return _address(tensor)


def _address(tensor: Tensor | None) -> int:
    """0 for what there is not."""
    if tensor is None:
        return 0
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"decode_step: every tensor must be contiguous and on the CPU, got strides "
            f"{tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()
