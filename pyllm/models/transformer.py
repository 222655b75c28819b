"""The decoder-only transformer: embedding, pre-norm blocks, final norm, output projection."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyllm._checks import check_size, shown
from pyllm.layers import (
    MLP,
    CausalSelfAttention,
    Dispatcher,
    KVCache,
    MoE,
    RouterStatistics,
    StepCache,
)
from pyllm.layers._checks import check_fits
from pyllm.layers.norm import NORMS
from pyllm.layers.position import LearnedPositions, RotaryTable, SinusoidalPositions
from pyllm.models.config import ModelConfig
from pyllm.models.counting import count_parameters
from pyllm.models.outline import is_outlined
from pyllm.ops import linear_cross_entropy
from pyllm.ops._checks import check_index_range, check_integer, check_same_device, check_shape

IGNORE_INDEX = -100
"""The target of a position that does not count in the loss."""


class ModelOutput(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor | None
    """(B, T, V), when no targets were given."""
    loss: Tensor | None
    """Cross-entropy in nats per token, when targets were given: a scalar, or (B, T)."""
    balance_loss: Tensor
    """Mean over the MoE layers; 1 when the load is even; 0 for a dense model."""
    z_loss: Tensor
    """Mean over the MoE layers."""
    tokens_per_expert: Tensor
    """(MoE layers, E) int32."""


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher | None) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.layer = layer
        self.attention_norm = norm(config.d_model, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.window,
            config.attention_sinks,
        )
        self.ffn_norm = norm(config.d_model, config.norm_eps)
        if config.is_moe(layer):
            self.ffn: nn.Module = MoE(
                config.d_model,
                config.d_ff,
                config.n_experts,
                config.top_k,
                config.activation,
                dispatcher,
                n_shared=config.n_shared_experts,
                router_bias=config.router_bias,
            )
        else:
            self.ffn = MLP(config.d_model, config.d_ff_dense, config.activation)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | StepCache | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """(B, T, D) to (B, T, D), and the router's statistics of an MoE layer."""
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.attention(normed_BTD, rotary, cache, self.layer, counts)
        normed_BTD = self.ffn_norm(x_BTD)
        if isinstance(self.ffn, MoE):
            y_BTD, statistics = self.ffn(normed_BTD)
            return x_BTD + y_BTD, statistics
        return x_BTD + self.ffn(normed_BTD), None


class Transformer(nn.Module):
    """A language model.

    Args:
        config: the architecture.
        dispatcher: handed to every MoE layer; by default all experts live here.

    Attributes:
        recompute: when training, keep only each block's input and compute the rest once more in
            the backward (Chen et al. 2016, arXiv:1604.06174).

    Raises:
        ValueError: the model is larger than the machine's memory (on the CPU), or than any model.
    """

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        _check_fits(config)
        self.config = config
        self.recompute = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self._add_positions()
        self.blocks = nn.ModuleList(
            Block(config, layer, dispatcher) for layer in range(config.n_layers)
        )
        self.final_norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.output: nn.Linear | None = None
        if not config.tie_embeddings:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()

    def _add_positions(self) -> None:
        config = self.config
        self.rotary: RotaryTable | None = None
        self.positions: LearnedPositions | SinusoidalPositions | None = None
        if is_outlined() and config.position != "learned":
            return
        if config.position == "rope":
            self.rotary = RotaryTable(
                config.max_seq_len,
                config.head_dim,
                config.rope_theta,
                config.rope_scaling,
                config.rope_factor,
                config.rope_original_len,
            )
        elif config.position == "learned":
            self.positions = LearnedPositions(config.max_seq_len, config.d_model)
        else:
            self.positions = SinusoidalPositions(config.max_seq_len, config.d_model)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all weights anew from the global generator.

        Embeddings and router: standard deviation 0.02. Matrices: ``1/sqrt(fan in)``, so that unit
        inputs give unit outputs; those that write to the residual stream are divided by
        ``sqrt(2 * n_layers)`` besides (GPT-2, sec. 2.3), so that its variance does not grow with
        depth.
        """
        depth = (2 * self.config.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding", "positions")) or name.endswith("router"):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() >= 2:
                writes = name.endswith(("out_proj.weight", "w_out"))
                std = parameter.shape[-1] ** -0.5 * (depth if writes else 1.0)
                nn.init.normal_(parameter, std=std)
        for block in self.blocks:
            if isinstance(block.ffn, MoE) and block.ffn.router_bias is not None:
                block.ffn.router_bias.zero_()

    def move_router_bias(self, tokens_per_expert: Tensor, rate: float) -> None:
        """After a step, make busy experts less and idle ones more likely to be chosen.

        Args:
            tokens_per_expert: (MoE layers, E), over the whole step.
            rate: how far each bias moves.

        Raises:
            ValueError: the model has no router biases, or counts of another shape.
        """
        if not self.config.router_bias:
            raise ValueError("move_router_bias: the model has none; set router_bias in its config")
        expected = (self.config.n_moe_layers, self.config.n_experts)
        check_shape("move_router_bias", "tokens_per_expert", tokens_per_expert, expected)
        mixtures = (block.ffn for block in self.blocks if isinstance(block.ffn, MoE))
        for layer, counts_E in zip(mixtures, tokens_per_expert, strict=True):
            layer.move_bias(counts_E, rate)

    @property
    def output_weight(self) -> Tensor:
        """(V, D)."""
        return self.embedding.weight if self.output is None else self.output.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations."""
        return self.embedding.weight.dtype

    def project(self, x: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        return nn.functional.linear(x, self.output_weight)

    def losses(self, x_ND: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
        """Cross-entropy in nats of hidden states (N, D) with the words that follow: a scalar, or
        (N,) for ``none``. The logits are never whole in memory."""
        return linear_cross_entropy(
            x_ND,
            self.output_weight,
            targets_N,
            ignore_index=IGNORE_INDEX,
            reduction=reduction,
        )

    def new_cache(
        self,
        batch: int = 1,
        max_length: int | None = None,
        rolling: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty kv cache for this model.

        Args:
            batch: sequences side by side.
            max_length: positions of each; by default the model's context.
            rolling: keep only what the window and the sinks can see; by default where the model
                has a window.
            dtype: of the keys and values, floating point or int8; by default the model's.

        Raises:
            ValueError: a size below 1, rolling without a window, more than the machine's memory.
        """
        config = self.config
        return KVCache(
            config.n_layers,
            batch,
            config.max_seq_len if max_length is None else max_length,
            config.n_kv_heads,
            config.head_dim,
            window=config.window,
            sinks=config.attention_sinks,
            rolling=config.window is not None if rolling is None else rolling,
            dtype=self.dtype if dtype is None else dtype,
            device=self.embedding.weight.device,
        )

    def hidden(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        counts: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """Token ids to the last hidden states (B, T, D), after the final norm.

        Args:
            input_ids_BT: (B, T) int64.
            cache: appended to; the T tokens come after what it holds.
            counts: (B,) how many of the T are real in each sequence of the cache, the others being
                padding on the right whose hidden states mean nothing; None for all. Padding is
                routed to experts and counted in the statistics like any token.

        Raises:
            ValueError: ids of a wrong shape, dtype or device, more positions than the model's
                context, a cache that does not fit, counts that are not between 0 and T or come
                without a cache; on the CPU also an id out of range.
        """
        starts, real = self.checked_step(input_ids_BT, cache, counts)
        n_tokens = input_ids_BT.shape[1]
        x_BTD, rotary = self._embed(input_ids_BT, starts)
        statistics = []
        for block in self.blocks:
            # What a cache took in cannot be computed once more: it has changed since.
            if self.recompute and self.training and torch.is_grad_enabled() and cache is None:
                # Nothing in a block is random; reading a GPU's generators would wait for it.
                x_BTD, routed = checkpoint(
                    block, x_BTD, rotary, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD, routed = block(x_BTD, rotary, cache, real)
            if routed is not None:
                statistics.append(routed)
        if cache is not None:
            cache.advance(n_tokens if real is None else real)
        return self.final_norm(x_BTD), statistics

    def step(self, ids_B: Tensor, cache: StepCache) -> Tensor:
        """One new token a row to the last hidden states (B, D), and nothing asked of the device.

        What :meth:`hidden` computes, without its checks: the caller knows that the ids are words
        and that the cache fits and has room. A row that stands still gives numbers all the same.

        Args:
            ids_B: (B,) int64.
            cache: says where the tokens stand, and takes their keys and values in.
        """
        x_B1D = self.embedding(ids_B.unsqueeze(1))
        table = self.rotary if self.positions is None else self.positions
        assert table is not None
        # A row that has used its whole context stands beyond it.
        positions_B1 = cache.starts_B.unsqueeze(1).clamp(max=self.config.max_seq_len - 1).long()
        found = table.at(positions_B1)
        rotary = found if self.positions is None else None
        x_B1D = x_B1D if self.positions is None else x_B1D + found
        for block in self.blocks:
            x_B1D, _ = block(x_B1D, rotary, cache)
        return self.final_norm(x_B1D).squeeze(1)

    def checked_step(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None,
        counts: Tensor | Sequence[int] | None,
    ) -> tuple[list[int], list[int] | None]:
        """Can these tokens be run? Where each sequence starts, and how many of its tokens are real,
        or None where all are.

        Raises:
            ValueError: see :meth:`hidden`.
        """
        self._check_ids("input_ids", input_ids_BT, ("B", "T"))
        real = _checked_counts(input_ids_BT, cache, counts)
        starts = [0] if cache is None else [cache.held(row) for row in range(cache.batch)]
        if real is None:
            end = max(starts) + input_ids_BT.shape[1]
        else:
            end = max(start + count for start, count in zip(starts, real, strict=True))
        if end > self.config.max_seq_len:
            raise ValueError(
                f"{end} tokens do not fit into the model's context of {self.config.max_seq_len}"
            )
        return starts, real

    def _embed(
        self, input_ids_BT: Tensor, starts: list[int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embeddings with positions added, and the rotary tables of a model that turns instead."""
        x_BTD = self.embedding(input_ids_BT)
        n_tokens, context = input_ids_BT.shape[1], self.config.max_seq_len
        table = self.rotary if self.positions is None else self.positions
        assert table is not None
        if min(starts) == max(starts) <= context - n_tokens:
            found = table(starts[0], n_tokens)
        else:
            steps_T = torch.arange(n_tokens, device=x_BTD.device)
            starts_B1 = torch.tensor(starts, device=x_BTD.device).unsqueeze(1)
            # Padding may lie beyond the context, and stands where the last token would.
            found = table.at((starts_B1 + steps_T).clamp(max=context - 1))
        return (x_BTD, found) if self.positions is None else (x_BTD + found, None)

    def forward(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> ModelOutput:
        """Logits, or with targets the loss: then the logits are never whole in memory.

        Args:
            input_ids_BT: (B, T) int64.
            targets_BT: (B, T) int64, the token that follows each; -100 where none counts.
            cache: appended to; the T tokens come after what it holds.
            reduction: of the loss, ``mean``, ``sum`` or ``none`` (B, T).

        Raises:
            ValueError: ids or targets of a wrong shape, dtype or device, more positions than the
                context, a cache that does not fit, an unknown reduction; on the CPU also an id or
                a target out of range.
        """
        if targets_BT is not None:
            check_integer("Transformer", input_ids=input_ids_BT)
            check_shape("Transformer", "input_ids", input_ids_BT, ("B", "T"))
            self._check_ids("targets", targets_BT, tuple(input_ids_BT.shape), IGNORE_INDEX)
        x_BTD, statistics = self.hidden(input_ids_BT, cache)
        logits = loss = None
        if targets_BT is None:
            logits = self.project(x_BTD)
        else:
            loss = self.losses(x_BTD.flatten(0, 1), targets_BT.flatten(), reduction)
            if reduction == "none":
                loss = loss.view_as(targets_BT)
        if not statistics:
            zero = x_BTD.new_zeros((), dtype=torch.float32)
            counts = torch.zeros(0, 0, dtype=torch.int32, device=x_BTD.device)
            return ModelOutput(logits, loss, zero, zero, counts)
        balance, z, counts = (torch.stack(list(values)) for values in zip(*statistics, strict=True))
        return ModelOutput(logits, loss, balance.mean(), z.mean(), counts)

    def _check_ids(
        self,
        name: str,
        ids_BT: Tensor,
        shape: tuple[int | str, ...],
        ignore_index: int | None = None,
    ) -> None:
        check_integer("Transformer", **{name: ids_BT})
        check_shape("Transformer", name, ids_BT, shape)
        check_same_device("Transformer", **{name: ids_BT, "weights": self.embedding.weight})
        check_index_range("Transformer", name, ids_BT, self.config.vocab_size, ignore_index)


def _checked_counts(
    input_ids_BT: Tensor, cache: KVCache | None, counts: Tensor | Sequence[int] | None
) -> list[int] | None:
    """Real tokens of each sequence, or None where all are."""
    batch, n_tokens = input_ids_BT.shape
    if cache is not None and not cache.is_even:
        check_shape("Transformer", "input_ids", input_ids_BT, (cache.batch, "T"))
    if counts is None:
        return None
    if cache is None:
        raise ValueError(f"Transformer: counts are for a kv cache, got {shown(counts)} without one")
    values = counts.tolist() if isinstance(counts, Tensor) else counts
    if not isinstance(values, Sequence) or not len(values) == batch == cache.batch:
        raise ValueError(
            f"Transformer: counts must be {batch} whole numbers for a cache of {batch} sequences, "
            f"got {shown(values)} for one of {cache.batch}"
        )
    real = [check_size("Transformer: counts", count, 0, n_tokens) for count in values]
    return None if min(real, default=n_tokens) == n_tokens else real


def _check_fits(config: ModelConfig) -> None:
    """The whole, and not only each of its layers."""
    if not isinstance(config, ModelConfig):
        raise ValueError(f"Transformer: config must be a ModelConfig, got {shown(config)}")
    parameters = count_parameters(config).total
    # The table of rotary or sinusoidal positions.
    row = {"rope": config.head_dim // 2, "learned": 0, "sinusoidal": config.d_model}
    table = config.max_seq_len * row[config.position]
    what = f"a model of {parameters:,} parameters with a context of {config.max_seq_len:,} tokens"
    remedy = "make it narrower, shallower, or with fewer experts or words"
    check_fits(what, parameters, table, remedy)
