"""The native path of generation: whole steps of a model in C++, where it can run there."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.modules.module
from torch import Tensor, nn

from pyllm.cpu_kernels.decode_step import (
    MAX_TOKENS,
    DecodeStep,
    Feedforward,
    LayerWeights,
    ModelWeights,
    Weights,
)
from pyllm.layers import KVCache, LocalDispatcher, MoE
from pyllm.layers.int8 import SCALE, Int8Dispatcher
from pyllm.layers.kv_cache import PIECE
from pyllm.layers.norm import NORMS
from pyllm.layers.position import LearnedPositions
from pyllm.models import Int8Transformer, Transformer
from pyllm.models.transformer import Block
from pyllm.ops._registry import choose_face
from pyllm.reference._precision import LARGEST_INT8_WIDTH

DTYPES = (torch.float32, torch.bfloat16)
CACHE_DTYPES = (*DTYPES, torch.int8)
DISPATCHERS = (LocalDispatcher, Int8Dispatcher)


class NativeModel:
    """A transformer on the CPU whose steps are one C++ call each.

    It computes what ``model.hidden`` and the output projection do, in float32 whatever the weights
    are kept in; with int8 weights in int8 products, as the layers of :mod:`pyllm.layers.int8` do.
    Matrices are not copied; norms, routers and positions of a bfloat16 model are, to float32, so
    that a change to its weights wants a new one (a session makes one for each prompt).
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._step = DecodeStep(_weights(model))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew from a copy of the model."""
        return NativeModel, (self.model,)

    def next_logits(
        self, ids_BT: Tensor, cache: KVCache, counts: Sequence[int] | None = None
    ) -> Tensor:
        """See :func:`pyllm.generate.next_logits`; in float32.

        Raises:
            ValueError: more positions than the context, an id that is not in the vocabulary, a
                cache that does not fit, counts that are not between 0 and T.
        """
        starts, real = self.model.checked_step(ids_BT, cache, counts)
        batch, n_tokens = ids_BT.shape
        self._check(cache, batch)
        ids_BT, counts = ids_BT.long(), [n_tokens] * batch if real is None else real
        if not any(counts):
            raise ValueError("next_logits: expected at least one new token, got none")
        # Now, and not with a later piece, when the first have been written.
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        if end > cache.max_length:
            raise ValueError(
                f"kv cache: {end} positions do not fit into {cache.max_length}; generate fewer "
                "tokens or make a larger cache"
            )
        piece = PIECE if cache.rolling else max(MAX_TOKENS // batch, PIECE)
        logits: list[Tensor] = []
        rows: list[int] = []
        for before in range(0, max(counts), piece):
            ids = ids_BT[:, before : before + piece].contiguous()
            starts, here = cache.claim(ids.shape[1], counts, before)
            running = [row for row in range(batch) if here[row]]
            ending = [row for row in running if counts[row] <= before + piece]
            starts_B, here_B = torch.tensor([starts, here], dtype=torch.int32, device="cpu")
            found = self._step(
                ids,
                starts_B,
                here_B,
                cache.store,
                cache.sinks,
                cache.rolling,
                len(running) if ending else 0,
                cache.scales,
            )
            if found is not None:
                whole = ending == running
                logits.append(found if whole else found[[running.index(row) for row in ending]])
                rows += ending
        cache.advance(counts)
        if len(logits) == 1:
            return logits[0]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return torch.cat(logits)[order]

    def _check(self, cache: KVCache, batch: int) -> None:
        config = self.model.config
        layers, _, rows, _, groups, width = cache.store.shape
        if (layers, rows, groups, width) != (
            config.n_layers,
            batch,
            config.n_kv_heads,
            config.head_dim,
        ) or cache.store.dtype not in CACHE_DTYPES:
            raise ValueError(
                f"kv cache: it is {tuple(cache.store.shape)} in {cache.store.dtype}, which does "
                "not fit; make a cache for this batch and this model"
            )
        cache.check_window("model", config.window, config.attention_sinks)


def native_model(model: Transformer) -> NativeModel | None:
    """The native path of this model; None where it has to run in PyTorch.

    That is: off the CPU, without the C++ kernels or with another face forced, with weights that
    are not all float32, all bfloat16 or int8, with experts elsewhere, or with hooks, which would
    not be called.
    """
    if choose_face("decode_attention", "cpu", None) != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if not is_plain(model) or not _is_as_configured(model):
        return None
    int8 = isinstance(model, Int8Transformer)
    dtypes = {torch.float32} if int8 else {weight.dtype for weight in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return None
    state = model.state_dict().values()
    if any(weight.device.type != "cpu" or not weight.is_contiguous() for weight in state):
        return None
    if int8 and any(weight.shape[-1] > LARGEST_INT8_WIDTH for weight in state):
        return None  # PyTorch's path says why
    return NativeModel(model)


def is_plain(model: Transformer) -> bool:
    """Is this the model as it is written, with nothing put in or around that C++ would pass by?"""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    for module in model.modules():
        ours = type(module).__module__.startswith(("pyllm.layers.", "pyllm.models."))
        if not ours and type(module) not in (nn.Linear, nn.Embedding, nn.ModuleList):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(callable(value) for name, value in vars(module).items() if name != "dispatcher"):
            return False  # a method put in its place
        if isinstance(module, MoE) and type(module.dispatcher) not in DISPATCHERS:
            return False
    return True


def _is_as_configured(model: Transformer) -> bool:
    """Does every part still have the sizes and settings that the configuration says?"""
    config = model.config
    width, heads = config.d_model, config.n_heads + 2 * config.n_kv_heads
    parts = 2 if config.activation == "swiglu" else 1
    words = (config.vocab_size, width)
    shapes: list[tuple[Any, tuple[int, ...]]] = [(model.embedding.weight, words)]
    if model.output is not None:
        shapes.append((model.output.weight, words))
    if model.rotary is not None:
        half = config.head_dim // 2
        shapes.append((model.rotary.cos, (config.max_seq_len, half)))
        shapes.append((model.rotary.sin, (config.max_seq_len, half)))
    positions: Any = model.positions
    if positions is not None:
        table = positions.weight if isinstance(positions, LearnedPositions) else positions.table
        shapes.append((table, (config.max_seq_len, width)))
    norms: list[Any] = [model.final_norm]
    settings: list[tuple[Any, Any]] = [(model.rotary is None, config.position != "rope")]
    settings += [
        (model.output is None, config.tie_embeddings),
        (len(model.blocks), config.n_layers),
    ]
    for layer, block in enumerate(model.blocks):
        attention: Any = block.attention
        norms += [block.attention_norm, block.ffn_norm]
        shapes.append((attention.qkv_proj.weight, (heads * config.head_dim, width)))
        shapes.append((attention.out_proj.weight, (width, width)))
        settings += [
            (attention.window, config.window),
            (attention.sinks, config.attention_sinks),
            (attention.heads, [config.n_heads, config.n_kv_heads, config.n_kv_heads]),
            (isinstance(block.ffn, MoE), config.is_moe(layer)),
        ]
        mlp: Any = block.ffn
        hidden = config.d_ff_dense
        if isinstance(mlp, MoE):
            n_experts, d_ff = config.n_experts, config.d_ff
            shapes.append((mlp.router, (n_experts, width)))
            shapes.append((mlp.w_in, (n_experts, parts * d_ff, width)))
            shapes.append((mlp.w_out, (n_experts, width, d_ff)))
            if mlp.router_bias is not None:
                shapes.append((mlp.router_bias, (n_experts,)))
            settings += [(mlp.top_k, config.top_k), (mlp.activation, config.activation)]
            mlp, hidden = mlp.shared, config.n_shared_experts * d_ff
        if mlp is not None:
            shapes.append((mlp.in_proj.weight, (parts * hidden, width)))
            shapes.append((mlp.out_proj.weight, (width, hidden)))
            settings.append((mlp.gated, parts == 2))
    settings += [(norm.eps, config.norm_eps) for norm in norms]
    settings += [(type(norm), NORMS[config.norm]) for norm in norms]
    shapes += [(norm.weight, (width,)) for norm in norms]
    return all(tensor.shape == shape for tensor, shape in shapes) and all(
        found == wanted for found, wanted in settings
    )


def _weights(model: Transformer) -> ModelWeights:
    config, rotary = model.config, model.rotary
    positions: Tensor | None = None
    if isinstance(model.positions, LearnedPositions):
        positions = _float(model.positions.weight)
    elif model.positions is not None:
        positions = _float(model.positions.table)
    return ModelWeights(
        layers=[_layer(block) for block in model.blocks],  # type: ignore[arg-type]
        embedding=_matrix(model.embedding),
        output=_matrix(model.embedding if model.output is None else model.output),
        final_norm=_norm(model.final_norm)[0],
        final_norm_bias=_norm(model.final_norm)[1],
        rotary=None if rotary is None else (_float(rotary.cos), _float(rotary.sin)),
        positions=positions,
        layer_norm=config.norm == "layer",
        gated=config.activation == "swiglu",
        eps=config.norm_eps,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        top_k=config.top_k,
        window=config.window,
        sinks=config.attention_sinks,
    )


def _layer(block: Block) -> LayerWeights:
    ffn = block.ffn
    mixture = ffn if isinstance(ffn, MoE) else None
    mlp: Any = ffn.shared if isinstance(ffn, MoE) else ffn
    bias = None if mixture is None else mixture.router_bias
    return LayerWeights(
        attention_norm=_norm(block.attention_norm)[0],
        attention_norm_bias=_norm(block.attention_norm)[1],
        qkv=_matrix(block.attention.qkv_proj),
        out=_matrix(block.attention.out_proj),
        ffn_norm=_norm(block.ffn_norm)[0],
        ffn_norm_bias=_norm(block.ffn_norm)[1],
        router=None if mixture is None else _float(mixture.router),
        router_bias=None if bias is None else _float(bias),
        experts=None
        if mixture is None
        else Feedforward(_matrix(mixture, "w_in"), _matrix(mixture, "w_out")),
        mlp=None if mlp is None else Feedforward(_one(mlp.in_proj), _one(mlp.out_proj)),
    )


def _matrix(layer: nn.Module, name: str = "weight") -> Weights:
    scale = getattr(layer, name + SCALE, None)
    return Weights(getattr(layer, name).detach(), None if scale is None else _float(scale))


def _one(layer: nn.Module) -> Weights:
    """A matrix as the only one of its kind."""
    weights = _matrix(layer)
    scale = None if weights.scale is None else weights.scale.unsqueeze(0)
    return Weights(weights.weight.unsqueeze(0), scale)


def _norm(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32."""
    weight: Tensor = getattr(layer, "weight")  # noqa: B009, for a type checker it is a module, too
    bias = getattr(layer, "bias", None)
    return _float(weight), None if bias is None else _float(bias)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
