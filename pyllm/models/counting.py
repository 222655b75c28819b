"""Parameters and floating-point operations of a model, computed from its configuration alone."""

from typing import NamedTuple

import torch

from pyllm.models.config import ModelConfig
from pyllm.models.transformer import Transformer


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
    """Count on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        model = Transformer(config)
    total = embedding = experts = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name.startswith(("embedding", "positions", "output")):
            embedding += parameter.numel()
        elif name.endswith(("ffn.w_in", "ffn.w_out")):
            experts += parameter.numel()
    running = experts * config.top_k // config.n_experts
    return ParameterCount(total, total - embedding - experts + running, embedding, experts)


def count_flops(config: ModelConfig, n_tokens: int) -> FlopCount:
    """Forward operations of one sequence of ``n_tokens``, matrix products only.

    Norms, activations, softmax and rotary positions are left out: under 2% at these widths.
    A training step takes three times as many (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1).
    """
    parameters = count_parameters(config)
    norms = (2 * config.n_layers + 1) * config.d_model * (2 if config.norm == "layer" else 1)
    running = parameters.experts * config.top_k // config.n_experts
    experts = 2 * running * n_tokens
    projections = 2 * (parameters.active - running - norms) * n_tokens
    reach = min(n_tokens, config.window or n_tokens)
    # Query t sees min(t + 1, window) keys: a triangle, then a band.
    pairs = reach * (reach + 1) // 2 + (n_tokens - reach) * reach
    attention = 4 * config.n_layers * config.d_model * pairs
    output = 2 * config.vocab_size * config.d_model * n_tokens
    return FlopCount(
        total=projections + experts + attention + output,
        experts=experts,
        experts_dense=2 * parameters.experts * n_tokens,
        attention=attention,
        output=output,
    )
