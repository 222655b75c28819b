"""Which experts wrote which word."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm.generate.session import checked_ids
from pyllm.layers import Dispatcher, MoE
from pyllm.models import Transformer


class _Recorder:
    """Passes on what an MoE layer dispatches, and remembers the experts, the heaviest first."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner
        self.experts_NA: Tensor | None = None

    def __call__(
        self,
        x_ND: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weights_NA: Tensor,
        experts_NA: Tensor,
        activation: str,
    ) -> Tensor:
        # A bias of the router decides who is chosen and in what order, not what they weigh.
        order_NA = weights_NA.argsort(dim=-1, descending=True, stable=True)
        self.experts_NA = experts_NA.gather(-1, order_NA)
        return self.inner(x_ND, w_in, w_out, weights_NA, experts_NA, activation)


@torch.inference_mode()
def expert_trace(model: Transformer, ids: Sequence[int]) -> Tensor:
    """The experts that run for each token of a text, the one with the largest weight first.

    The experts at position ``t`` take part in writing the token at ``t + 1``.

    Args:
        model: the transformer; its dispatchers are exchanged for the call and put back.
        ids: at least one token, at most the model's context.

    Returns:
        (MoE layers, T, k) int32 on the CPU; no layers for a dense model.

    Raises:
        ValueError: no token, more than the context, or one that is not in the vocabulary.
    """
    ids = checked_ids("expert_trace", model, ids)
    if len(ids) > model.config.max_seq_len:
        raise ValueError(
            f"expert_trace: {len(ids)} tokens do not fit into the model's context of "
            f"{model.config.max_seq_len}"
        )
    layers = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    recorders = [_Recorder(layer.dispatcher) for layer in layers]
    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            layer.dispatcher = recorder
        model.hidden(torch.tensor([ids], device=model.embedding.weight.device))
    finally:
        for layer, recorder in zip(layers, recorders, strict=True):
            layer.dispatcher = recorder.inner
    chosen = [recorder.experts_NA for recorder in recorders if recorder.experts_NA is not None]
    if not chosen:
        return torch.empty(0, len(ids), model.config.top_k, dtype=torch.int32)
    return torch.stack(chosen).to("cpu", torch.int32)
