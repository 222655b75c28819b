"""A transformer with int8 weights: a quarter of the memory, and of the reading, of float32."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm._memory import check_memory
from pyllm.layers.int8 import SCALE, make_int8, project
from pyllm.models.config import ModelConfig
from pyllm.models.counting import count_parameters
from pyllm.models.outline import outlined
from pyllm.models.transformer import IGNORE_INDEX, Transformer
from pyllm.ops import quantize_int8

CHUNK = 256
"""Rows whose logits are held at once where a loss is wanted: 51 MB of 50,257 words."""

ROWS = 2048
"""Of a matrix, quantised at once: what is in between takes four times as much."""


class Int8Transformer(Transformer):
    """Embedding, projections and experts in int8, each output channel with a scale of its own;
    activations rounded to int8 row by row (W8A8). Norms, router and learned positions stay float32.

    For inference only. It begins as zeros: :func:`quantize_model` makes one from a float model,
    :func:`pyllm.models.load_model` from a folder that ``scripts/quantize.py`` wrote.

    Args:
        config: the architecture.
        device: where it is.
        zeros: or whatever the memory holds, for a caller that fills in every number: a page that
            was not touched yet takes no memory.

    Raises:
        ValueError: the model is larger than the machine's memory.
    """

    def __init__(
        self, config: ModelConfig, device: str | torch.device = "cpu", *, zeros: bool = True
    ) -> None:
        with outlined():  # the float weights never exist
            super().__init__(config)
            make_int8(self)
        if torch.device(device).type == "cpu":
            state = self.state_dict().values()
            what = f"an int8 model of {count_parameters(config).total:,} parameters"
            remedy = "make it narrower, shallower, or with fewer experts or words"
            check_memory(what, sum(tensor.nbytes for tensor in state), remedy)
        # What to_empty does, by way of meta tensors' empty_like, which imports 65 MB of sympy.
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        if zeros:
            for tensor in self.state_dict().values():
                tensor.zero_()
        # The tables of positions follow from the configuration, and are in no file.
        with torch.device(device):
            self._add_positions()
        self.float()  # whatever dtype new tensors have by default
        self.requires_grad_(False)

    def initialise(self) -> None:
        """Nothing to draw."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.float32

    def project(self, x: Tensor) -> Tensor:
        """(..., D) to logits (..., V)."""
        output = self.embedding if self.output is None else self.output
        return project(x, output.weight, getattr(output, "weight" + SCALE))

    def losses(self, x_ND: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
        """Cross-entropy in nats: a scalar, or (N,)."""
        chunks = zip(x_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
        loss_N = torch.cat(
            [
                F.cross_entropy(
                    self.project(x), targets, ignore_index=IGNORE_INDEX, reduction="none"
                )
                for x, targets in chunks
            ]
        )
        if reduction == "none":
            return loss_N
        total = loss_N.sum()
        return total if reduction == "sum" else total / (targets_N != IGNORE_INDEX).sum().clamp(1)


@torch.no_grad()
def quantize_model(model: Transformer) -> Int8Transformer:
    """The same model in int8; the float one is left as it is.

    Raises:
        ValueError: it is int8 already, or a weight is NaN or infinite.
    """
    if isinstance(model, Int8Transformer):
        raise ValueError("quantize_model: the model is in int8 already")
    result = Int8Transformer(model.config, model.embedding.weight.device, zeros=False)
    fill_int8(result, model.state_dict().items())
    return result.eval()


@torch.no_grad()
def fill_int8(model: Int8Transformer, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Quantise the named tensors of a float model into an int8 one, one at a time.

    Raises:
        ValueError: a number is NaN or infinite; the message names the tensor.
    """
    state = model.state_dict()
    for name, tensor in weights:
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must hold floats, got {tensor.dtype}")
        if name + SCALE not in state:
            state[name].copy_(tensor)
            continue
        rows, q, scale = tensor.flatten(0, -2), state[name], state[name + SCALE]
        pieces = zip(
            rows.split(ROWS), q.flatten(0, -2).split(ROWS), scale.flatten().split(ROWS), strict=True
        )
        for number, (piece, to, to_scale) in enumerate(pieces):
            try:
                found = quantize_int8(piece)
            except ValueError as error:
                raise ValueError(f"{name}, from row {number * ROWS}: {error}") from None
            to.copy_(found[0])
            to_scale.copy_(found[1])
