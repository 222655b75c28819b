"""One frozen dataclass describes every model of the family, and the presets are plain Python."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

_CHOICES = {
    "norm": ("rms", "layer"),
    "position": ("rope", "learned", "sinusoidal"),
    "activation": ("swiglu", "gelu"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer, dense or sparse.

    Raises:
        ValueError: a size that is not positive, heads that do not divide, an unknown choice.
    """

    vocab_size: int = 4096
    """Words in the vocabulary."""
    max_seq_len: int = 512
    """Longest context, in tokens."""
    n_layers: int = 4
    """Transformer blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    n_heads: int = 4
    """Query heads; each is d_model / n_heads wide."""
    n_kv_heads: int = 2
    """Key-value heads; must divide n_heads."""
    d_ff: int = 384
    """Hidden width of an expert. A dense layer of a model with experts (moe_every above 1) is
    top_k times as wide, so that every layer has the same active compute."""
    norm: str = "rms"
    """rms or layer."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    position: str = "rope"
    """rope, learned or sinusoidal."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    activation: str = "swiglu"
    """swiglu or gelu."""
    n_experts: int = 8
    """Experts in each MoE layer."""
    top_k: int = 2
    """Experts that run for each token."""
    moe_every: int = 1
    """0: dense. 1: every layer is an MoE. 2: every other one."""
    window: int | None = None
    """Positions a query sees, its own included; None for all."""
    tie_embeddings: bool = True
    """Is the output projection the embedding matrix?"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                if value not in _CHOICES[field.name]:
                    raise ValueError(
                        f"ModelConfig: {field.name} must be one of "
                        f"{', '.join(_CHOICES[field.name])}, got {value!r}"
                    )
            elif field.type is int or field.name == "window":
                self._check_size(field.name, value)
            elif field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(
                        f"ModelConfig: {field.name} must be true or false, got {value!r}"
                    )
            elif not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(
                    f"ModelConfig: {field.name} must be a positive number, got {value!r}"
                )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"ModelConfig: d_model ({self.d_model}) must be a multiple of n_heads "
                f"({self.n_heads})"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"ModelConfig: n_heads ({self.n_heads}) must be a multiple of n_kv_heads "
                f"({self.n_kv_heads})"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"ModelConfig: rope needs an even head size, got d_model / n_heads = "
                f"{self.head_dim}"
            )
        if self.moe_every and self.top_k > self.n_experts:
            raise ValueError(
                f"ModelConfig: top_k ({self.top_k}) must not exceed n_experts ({self.n_experts})"
            )

    def _check_size(self, name: str, value: Any) -> None:
        if name == "window" and value is None:
            return
        least = 0 if name == "moe_every" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"ModelConfig: {name} must be a whole number of at least {least}, got {value!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    def is_moe(self, layer: int) -> bool:
        """Is this layer a mixture of experts?"""
        return self.moe_every > 0 and layer % self.moe_every == self.moe_every - 1

    @property
    def n_moe_layers(self) -> int:
        """How many layers are mixtures of experts."""
        return sum(self.is_moe(layer) for layer in range(self.n_layers))


_MOE_158M = ModelConfig(
    vocab_size=50_257,
    max_seq_len=1024,
    n_layers=6,
    d_model=512,
    n_heads=8,
    n_kv_heads=4,
    d_ff=864,
    n_experts=16,
    top_k=2,
)

PRESETS: dict[str, ModelConfig] = {
    "moe-tiny": ModelConfig(),
    "moe-158m-gpt": replace(
        _MOE_158M,
        n_kv_heads=8,
        d_ff=1280,
        norm="layer",
        position="learned",
        activation="gelu",
    ),
    "moe-158m": _MOE_158M,
    # The dense twin: the same active compute as moe-158m, but for the router.
    "dense-21m": replace(_MOE_158M, d_ff=2 * _MOE_158M.d_ff, moe_every=0),
}


def preset(name: str) -> ModelConfig:
    """A preset by name.

    Raises:
        ValueError: unknown name; the message names the nearest known one.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown preset {name!r}; did you mean {near[0]!r}? "
            f"Known presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
