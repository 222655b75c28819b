"""The forward pass of llama.cpp's architecture `llama`, from nothing but a GGUF file, in NumPy.

Written after llama.cpp's sources (`src/models/llama.cpp`, `build_moe_ffn` in `src/llama-graph.cpp`,
`ggml_rope_yarn_corr_dims` in `ggml/src/ggml.c`, `rope_yarn` in `ggml/src/ggml-cpu/ops.cpp`), not
after pyllm: it tells whether names, layout, rotary pairs and metadata are what llama.cpp expects,
where llama.cpp itself is not installed. One sequence at a time, float64.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

Array = np.ndarray[Any, Any]


class GGUF:
    """Metadata and tensors of a file."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields = {field.name: field.contents() for field in reader.fields.values()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors: dict[str, Array] = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture."""
        return self.fields.get(f"llama.{key}", default)


def logits(file: GGUF, ids: list[int]) -> Array:
    """(T, V)."""
    weights = file.tensors
    n_heads, n_kv_heads = file.get("attention.head_count"), file.get("attention.head_count_kv")
    eps = file.get("attention.layer_norm_rms_epsilon")
    n_tokens, width = len(ids), file.get("embedding_length")
    turns = _turns(file, n_tokens)
    hidden = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
    x = weights["token_embd.weight"][ids]
    for layer in range(file.get("block_count")):

        def weight(name: str, layer: int = layer) -> Array:
            return weights[f"blk.{layer}.{name}.weight"]

        y = _norm(x, weight("attn_norm"), eps)
        q, k, v = (
            (y @ weight(f"attn_{name}").T).reshape(n_tokens, heads, -1).transpose(1, 0, 2)
            for name, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
        )
        q, k = _rope(q, turns), _rope(k, turns)
        k, v = (part.repeat(n_heads // n_kv_heads, axis=0) for part in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        mixed = (_softmax(scores + hidden) @ v).transpose(1, 0, 2).reshape(n_tokens, width)
        x = x + mixed @ weight("attn_output").T
        y = _norm(x, weight("ffn_norm"), eps)
        if file.get("expert_count"):
            chosen = _route(y @ weight("ffn_gate_inp").T, file.get("expert_used_count"))
            experts = zip(
                weight("ffn_gate_exps"), weight("ffn_up_exps"), weight("ffn_down_exps"), strict=True
            )
            outputs = [_mlp(y, gate, up, down) for gate, up, down in experts]
            x = x + sum(chosen[:, [e]] * output for e, output in enumerate(outputs))
        else:
            x = x + _mlp(y, weight("ffn_gate"), weight("ffn_up"), weight("ffn_down"))
    x = _norm(x, weights["output_norm.weight"], eps)
    # Without an output tensor, the embedding is taken once more.
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _mlp(x: Array, gate: Array, up: Array, down: Array) -> Array:
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def _route(scores: Array, used: int) -> Array:
    """(T, E): softmax over all, the best ones kept, their weights made to sum to one."""
    p = _softmax(scores)
    kept = p >= np.sort(p, axis=-1)[:, [-used]]
    return p * kept / (p * kept).sum(-1, keepdims=True)


def _turns(file: GGUF, n_tokens: int) -> tuple[Array, Array]:
    """Cosines and sines (T, K/2)."""
    n_dims, base = file.get("rope.dimension_count"), file.get("rope.freq_base")
    plane = np.arange(n_dims // 2)
    freqs = file.tensors.get("rope_freqs.weight", np.ones(n_dims // 2))
    extrapolated = np.outer(np.arange(n_tokens), base ** (-2 * plane / n_dims) / freqs)
    factor = file.get("rope.scaling.factor", 1.0)
    angle, magnitude = extrapolated / factor, 1.0
    if file.get("rope.scaling.type") == "yarn":
        context = file.get("rope.scaling.original_context_length")
        low, high = (
            n_dims * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(base))
            for turns in (32.0, 1.0)  # beta_fast and beta_slow, where the file has none
        )
        low, high = max(0, np.floor(low)), min(n_dims - 1, np.ceil(high))
        ramp = 1 - np.clip((plane - low) / max(0.001, high - low), 0, 1)
        angle = angle * (1 - ramp) + extrapolated * ramp
        magnitude = 1 + 0.1 * np.log(factor)
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude


def _rope(x: Array, turns: tuple[Array, Array]) -> Array:
    """Neighbouring channels turn together (LLAMA_ROPE_TYPE_NORM)."""
    cos, sin = turns
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
