"""Parameters and floating-point operations of a model, computed from its configuration alone."""

from typing import NamedTuple

from pyllm._checks import check_size
from pyllm.models.config import ModelConfig


class ParameterCount(NamedTuple):
    """Parameters of a model; a tied output projection counts once, as embedding."""

    total: int
    active: int
    """Those that take part in one token, embeddings left out."""
    embedding: int
    """Token and position embeddings, and an untied output projection."""
    experts: int
    """All experts of all MoE layers."""


class FlopCount(NamedTuple):
    """Floating-point operations of one forward pass; a multiply-add counts as two."""

    total: int
    experts: int
    """What the chosen experts take."""
    experts_dense: int
    """What they would take if every expert ran for every token."""
    attention: int
    """Scores and weighted sums, without the projections."""
    output: int
    """The output projection."""

    @property
    def saved_by_sparsity(self) -> float:
        """Share of the expert operations that are not done."""
        return 1 - self.experts / self.experts_dense if self.experts_dense else 0.0


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The sizes of all matrices, added up: nothing is built, however large the model."""
    width = config.d_model
    embedding = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embedding += config.max_seq_len * width
    heads = config.n_heads + 2 * config.n_kv_heads
    attention = heads * config.head_dim * width + width * width
    norm = width * (2 if config.norm == "layer" else 1)
    per_channel = (3 if config.activation == "swiglu" else 2) * width
    expert = per_channel * config.d_ff
    sparse, dense = config.n_moe_layers, config.n_layers - config.n_moe_layers
    shared = config.n_layers * (attention + 2 * norm) + norm
    shared += sparse * config.n_experts * width  # the routers
    shared += dense * per_channel * config.d_ff_dense
    shared += sparse * config.n_shared_experts * expert
    experts = sparse * config.n_experts * expert
    running = sparse * config.top_k * expert
    return ParameterCount(embedding + shared + experts, shared + running, embedding, experts)


def count_flops(config: ModelConfig, n_tokens: int) -> FlopCount:
    """Forward operations of one sequence of ``n_tokens``, matrix products only.

    Norms, activations, softmax and rotary positions are left out: under 2% at these widths.
    A training step takes three times as many (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1).

    Raises:
        ValueError: ``n_tokens`` is no whole number, or below 1.
    """
    n_tokens = check_size("count_flops: n_tokens", n_tokens, 1)
    parameters = count_parameters(config)
    norms = (2 * config.n_layers + 1) * config.d_model * (2 if config.norm == "layer" else 1)
    running = parameters.experts * config.top_k // config.n_experts
    experts = 2 * running * n_tokens
    projections = 2 * (parameters.active - running - norms) * n_tokens
    reach = min(n_tokens, config.window or n_tokens)
    # Query t sees min(t + 1, window) keys: a triangle, then a band.
    pairs = reach * (reach + 1) // 2 + (n_tokens - reach) * reach
    # Sinks: the first that lie before the window of a query, 1, 2, ... of them, then all.
    before = n_tokens - reach
    ramp = min(before, config.attention_sinks)
    pairs += ramp * (ramp + 1) // 2 + (before - ramp) * ramp
    attention = 4 * config.n_layers * config.d_model * pairs
    output = 2 * config.vocab_size * config.d_model * n_tokens
    return FlopCount(
        total=projections + experts + attention + output,
        experts=experts,
        experts_dense=2 * parameters.experts * n_tokens,
        attention=attention,
        output=output,
    )
