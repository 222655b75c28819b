"""One frozen dataclass describes every model of the family, and the presets are plain Python."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from pyllm._checks import check_choice, check_number, check_size, shown

_CHOICES = {
    "norm": ("rms", "layer"),
    "position": ("rope", "learned", "sinusoidal"),
    "activation": ("swiglu", "gelu"),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
}
_RANGES = {
    # Below, float32 has no room for 1 / eps ** 1.5, which a gradient holds; above, it is no norm.
    "norm_eps": (1e-12, 1.0),
    # Below 1, the angles overflow: 1e-300 to the power of -1.
    "rope_theta": (1.0, 1e30),
    "rope_factor": (1.0, 1e6),
}
_OPTIONAL = ("window", "rope_original_len")
_MAY_BE_ZERO = ("moe_every", "attention_sinks", "n_shared_experts")
# The kernels count in int32. No published model has over 1,000 layers (arXiv:2203.00555), and each
# costs a millisecond to build, even without memory.
_LARGEST = {"n_layers": 10_000}
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer, dense or sparse.

    Raises:
        ValueError: a size that is no whole number, not positive or beyond int32, a number out of
            its range, heads that do not divide, an unknown choice.
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
    top_k + n_shared_experts times as wide, so that every layer has the same active compute."""
    norm: str = "rms"
    """rms or layer."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    position: str = "rope"
    """rope, learned or sinusoidal."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: str = "none"
    """How the wavelengths are stretched for a context longer than the one first trained on: none,
    linear, llama3 or yarn."""
    rope_factor: float = 1.0
    """How many times longer the context becomes."""
    rope_original_len: int | None = None
    """The context first trained on; llama3 and yarn need it."""
    activation: str = "swiglu"
    """swiglu or gelu."""
    n_experts: int = 8
    """Experts in each MoE layer."""
    top_k: int = 2
    """Experts that run for each token."""
    n_shared_experts: int = 0
    """Experts beside them that run for every token (DeepSeekMoE, arXiv:2401.06066), as one network
    of n_shared_experts * d_ff."""
    router_bias: bool = False
    """Balance the load by a bias on the choice of experts (DeepSeek-V3, arXiv:2412.19437) that the
    trainer moves; it does not touch their weights."""
    moe_every: int = 1
    """0: dense. 1: every layer is an MoE. 2: every other one."""
    window: int | None = None
    """Positions a query sees, its own included; None for all."""
    attention_sinks: int = 0
    """First positions that stay in sight whatever the window (arXiv:2309.17453)."""
    tie_embeddings: bool = True
    """Is the output projection the embedding matrix?"""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _CHOICES:
                check_choice(f"ModelConfig: {name}", value, _CHOICES[name])
            elif name in _RANGES:
                number = check_number(f"ModelConfig: {name}", value, *_RANGES[name])
                object.__setattr__(self, name, number)
            elif field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(
                        f"ModelConfig: {name} must be true or false, got {shown(value)}"
                    )
            elif name not in _OPTIONAL or value is not None:
                least = 0 if name in _MAY_BE_ZERO else 1
                most = _LARGEST.get(name, _LARGEST_SIZE)
                # NumPy's integers become Python's, which JSON can hold.
                size = check_size(f"ModelConfig: {name}", value, least, most)
                object.__setattr__(self, name, size)
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
        self._check_meaning()

    def _check_meaning(self) -> None:
        """A setting that would do nothing here is a mistake, not a default."""
        if self.rope_scaling == "none":
            if self.rope_factor != 1 or self.rope_original_len is not None:
                raise ValueError(
                    f"ModelConfig: rope_factor ({self.rope_factor}) and rope_original_len "
                    f"({self.rope_original_len}) need a rope_scaling, got none"
                )
        elif self.position != "rope":
            raise ValueError(
                f"ModelConfig: rope_scaling {self.rope_scaling} needs position rope, "
                f"got {self.position}"
            )
        elif self.rope_scaling != "linear" and self.rope_original_len is None:
            raise ValueError(
                f"ModelConfig: rope_scaling {self.rope_scaling} needs rope_original_len, got None"
            )
        dense_width = self.d_ff_dense if self.n_moe_layers < self.n_layers else 0
        if max(dense_width, self.n_shared_experts * self.d_ff) > _LARGEST_SIZE:
            raise ValueError(
                f"ModelConfig: top_k ({self.top_k}) and n_shared_experts ({self.n_shared_experts}) "
                f"times d_ff ({self.d_ff}) must be at most {_LARGEST_SIZE:,}"
            )
        if self.attention_sinks and self.window is None:
            raise ValueError(
                f"ModelConfig: attention_sinks ({self.attention_sinks}) need a window, got None"
            )
        if self.moe_every > self.n_layers:
            raise ValueError(
                f"ModelConfig: moe_every ({self.moe_every}) makes none of {self.n_layers} layers a "
                "mixture; give 0 for a dense model"
            )
        if not self.moe_every and (self.n_shared_experts or self.router_bias):
            raise ValueError(
                f"ModelConfig: n_shared_experts ({self.n_shared_experts}) and router_bias "
                f"({self.router_bias}) need experts, got moe_every 0"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def d_ff_dense(self) -> int:
        """Hidden width of a dense layer: of as many experts as a mixture runs for a token."""
        return self.d_ff * (self.top_k + self.n_shared_experts if self.moe_every else 1)

    def is_moe(self, layer: int) -> bool:
        """Is this layer a mixture of experts?"""
        return self.moe_every > 0 and layer % self.moe_every == self.moe_every - 1

    @property
    def n_moe_layers(self) -> int:
        """How many layers are mixtures of experts."""
        return self.n_layers // self.moe_every if self.moe_every else 0


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

_LARGE = ModelConfig(vocab_size=50_257, max_seq_len=2048, moe_every=0)

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
    "dense-50m": replace(_MOE_158M, n_layers=8, d_ff=1408, moe_every=0),
    # GPT-2's shape (its small model, without the biases).
    "dense-124m": ModelConfig(
        vocab_size=50_257,
        max_seq_len=1024,
        n_layers=12,
        d_model=768,
        n_heads=12,
        n_kv_heads=12,
        d_ff=3072,
        norm="layer",
        position="learned",
        activation="gelu",
        moe_every=0,
    ),
    "dense-500m": replace(_LARGE, n_layers=24, d_model=1280, n_heads=20, n_kv_heads=5, d_ff=3584),
    "dense-1b": replace(_LARGE, n_layers=20, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=5632),
    # Llama 3.2's shape of this size.
    "dense-3b": replace(_LARGE, n_layers=28, d_model=3072, n_heads=24, n_kv_heads=8, d_ff=8192),
}


def preset(name: str) -> ModelConfig:
    """A preset by name.

    Raises:
        ValueError: unknown name; the message names the nearest known one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown preset {shown(name)}; did you mean {near[0]!r}? "
            f"Known presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
