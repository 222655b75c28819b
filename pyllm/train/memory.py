"""How much memory a training step takes at its peak, found by running it without numbers.

The step runs on PyTorch's FakeTensors: shapes and lifetimes are those of a real step, so what is
saved for the backward, what autocast copies and what recomputation gives back is not guessed at. A
ledger hears of every tensor that is made and of every storage that dies. Two things it cannot hear:
what the faces of the operations allocate inside (formulas, :func:`inner_memory`), and the state of
an 8-bit optimizer, whose library need not be here (its shapes, ``optimizer.kept_state``).
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyllm.models import ModelConfig, Transformer
from pyllm.ops._registry import PREFERENCES, choose_face
from pyllm.reference._loss_sizes import (
    SPAN,
    Card,
    card_of,
    cuda_scratch,
    slab_splits,
    slab_words,
    triton_scratch,
)
from pyllm.reference._precision import accumulation_dtype, product_dtype
from pyllm.reference.linear_cross_entropy import CHUNK
from pyllm.train.config import TrainConfig
from pyllm.train.device import autocast
from pyllm.train.muon import Muon
from pyllm.train.optimizer import kept_state, make_optimizers, step_loss

SMALL_CARD = Card(1 << 32, 132)
"""Of 4 GiB; the multiprocessors of a large one, which ask for more sums side by side."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that are held at the moment when a step holds most, by what they are."""

    weights: int = 0
    """Parameters and tables of positions."""
    copies: int = 0
    """Weights in the precision of the matrix products, where that is another."""
    gradients: int = 0
    """Of the parameters, summed over micro-batches."""
    optimizer: int = 0
    """Its state."""
    activations: int = 0
    """What the forward keeps for the backward, and what it is working on."""
    logits: int = 0
    """The chunk of them that the loss holds at a time."""
    workspace: int = 0
    """Gradients on their way, and what an operation or the optimizer takes and gives back."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


def estimate_memory(
    model: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    device: str = "cuda",
    memory: int | None = None,
) -> MemoryEstimate:
    """The peak of a step of ``train``, once the optimizer has its state.

    Args:
        model: the architecture.
        train: ``batch_size`` sequences in a micro-batch; with more than one micro-batch in a step,
            gradients are held while the next one runs.
        dtype: of the matrix products.
        device: ``cuda`` or ``cpu``, whose faces run. It need not be here.
        memory: bytes of the card that is meant: the loss works in larger pieces on a larger one. By
            default what this process may take of the one that is here, else 4 GiB.

    Raises:
        ValueError: the sequences are longer than the model's context.
    """
    relevant = ("batch_size", "seq_len", "optimizer", "recompute", "balance_coef", "z_coef")
    chosen = {name: getattr(train, name) for name in relevant}
    # Any two micro-batches are as large as any more: that is what may be kept in the cache.
    settings = TrainConfig(**chosen, accumulation=min(train.accumulation, 2))
    card = _card(memory) if device == "cuda" else SMALL_CARD
    return _estimate(model, settings, dtype, device, card)


def _card(memory: int | None) -> Card:
    here = torch.cuda.is_available()
    card = card_of(torch.cuda.current_device()) if here else SMALL_CARD
    if memory is not None:
        # All cards up to 4 GiB are alike to the loss: one estimate serves them.
        card = replace(card, memory=max(memory, SMALL_CARD.memory))
    return card


def measure_memory(config: ModelConfig, train: TrainConfig, dtype: torch.dtype) -> int:
    """The peak of a step that is really taken, on the CPU: bytes in PyTorch's allocator.

    By the profiler, which hears of every allocation, so by another way than the estimate; what the
    C++ kernels take for themselves is in neither.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Transformer(config).train()
        model.recompute = train.recompute
        optimizers = make_optimizers(model, train, dtype)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for passes in (0, min(train.accumulation, 2)):  # the first step only makes the state
            for _ in range(passes):
                inputs = torch.randint(config.vocab_size, (train.batch_size, train.seq_len))
                with autocast(torch.device("cpu"), dtype):
                    loss = step_loss(model(inputs, inputs.clone()), train)
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [
        each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@lru_cache(maxsize=256)
def _estimate(
    model: ModelConfig, train: TrainConfig, dtype: torch.dtype, device: str, card: Card
) -> MemoryEstimate:
    updating = _update_peak(model, train.optimizer, dtype)
    passing = _passes_peak(model, train, dtype, device, card)
    passing = replace(passing, optimizer=updating.optimizer)
    return max(passing, updating, key=lambda estimate: estimate.total)


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Tensors made in here are fake."""
    # Imported here: it brings PyTorch's compiler along, 150 MB and a second.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield
    gc.collect()  # hooks make cycles of parameters and ledger


def _passes_peak(
    config: ModelConfig, train: TrainConfig, dtype: torch.dtype, device: str, card: Card
) -> MemoryEstimate:
    """Of forward and backward, the optimizer's state not counted."""
    with _without_numbers():
        model = Transformer(config).train()
        model.recompute = train.recompute
        ledger = Ledger(device, dtype, card)
        ledger.watch(model)
        with ledger:
            if train.accumulation > 1:
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                    ledger.hold(parameter.grad, "gradients")
            inputs = torch.zeros(train.batch_size, train.seq_len, dtype=torch.long)
            targets = torch.zeros_like(inputs)
            ledger.hold(inputs, "activations")
            ledger.hold(targets, "activations")
            with ledger.forward(), autocast(torch.device("cpu"), dtype):
                loss = step_loss(model(inputs, targets), train)
            loss.backward()
    return ledger.peak


@lru_cache(maxsize=16)
def _update_peak(config: ModelConfig, kind: str, dtype: torch.dtype) -> MemoryEstimate:
    """Of the optimizer's step. AdamW writes in place, in one pass; Muon needs room to work in."""
    with _without_numbers():
        model = Transformer(config)
        ledger = Ledger("cpu")
        ledger.watch(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            ledger.hold(parameter.grad, "gradients")
        for kept in kept_state(model, kind).values():
            for tensor in kept.values():
                ledger.charge("optimizer", tensor.numel() * tensor.element_size())
        ledger.record()
        if kind == "muon":
            for optimizer in make_optimizers(model, TrainConfig(optimizer="muon"), dtype):
                if isinstance(optimizer, Muon):
                    optimizer.make_state()
                    for state in optimizer.state.values():
                        ledger.hold(state["momentum_buffer"], "optimizer")
                        ledger.charge("optimizer", -state["momentum_buffer"].nbytes)
                    with ledger:
                        optimizer.step()
    return ledger.peak


class Ledger(TorchDispatchMode):
    """Hears of every tensor that PyTorch makes while it is active, fake or real.

    Args:
        device: whose faces are assumed to run.
        dtype: of the matrix products; float16 stands for a card without bfloat16 and Triton, where
            the card itself is not here to be asked.
        card: how large it is.

    Attributes:
        peak: what was held at the worst moment so far.
    """

    def __init__(
        self, device: str, dtype: torch.dtype = torch.float32, card: Card = SMALL_CARD
    ) -> None:
        super().__init__()
        self.peak = MemoryEstimate()
        self._device = device
        self._dtype = dtype
        self._card = card
        self._held: dict[int, tuple[int, str, Any]] = {}
        self._sums = dict.fromkeys((part.name for part in fields(MemoryEstimate)), 0)
        self._forwards = 0

    def watch(self, model: Transformer) -> None:
        """Its weights count as such, its gradients too, and a block that is run again in the
        backward makes activations."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.hold(tensor, "weights")
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._accumulated)

        def enter(*_: Any) -> None:
            self._forwards += 1

        def leave(*_: Any) -> None:
            self._forwards -= 1

        for block in model.blocks:
            block.register_forward_pre_hook(enter)
            # Recomputation stops in the middle of a block, once it has all.
            block.register_forward_hook(leave, always_call=True)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is made in here is an activation."""
        self._forwards += 1
        yield
        self._forwards -= 1

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor under ``kind``, from now until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            size, before, reference = self._held[key]
            self._sums[before] -= size
        else:
            size, reference = storage.nbytes(), weakref.ref(storage, lambda _: self._drop(key))
        self._held[key] = (size, kind, reference)
        self._sums[kind] += size

    def charge(self, kind: str, size: int) -> None:
        """Count ``size`` bytes that no tensor stands for."""
        self._sums[kind] += size

    def record(self, **more: int) -> None:
        """Is this the worst moment so far, with so much ``more`` than what is held?"""
        now = {name: size + more.get(name, 0) for name, size in self._sums.items()}
        if sum(now.values()) > self.peak.total:
            self.peak = MemoryEstimate(**now)

    def _drop(self, key: int) -> None:
        size, kind, _ = self._held.pop(key)
        self._sums[kind] -= size

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.hold(parameter.grad, "gradients")

    def _kind(self, func: Any, arguments: tuple[Any, ...]) -> str:
        if func is torch.ops.aten._to_copy.default:
            source = self._held.get(arguments[0].untyped_storage()._cdata)
            if source is not None and source[1] == "weights":
                return "copies"
        return "activations" if self._forwards else "workspace"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_sum_of_gradients(func, args):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self.hold(tensor, self._kind(func, args))
        inner = {}
        if func.namespace == "pyllm":
            face = self._face(func._opname, args[-1]).partition(",")[0]
            inner = inner_memory(func._opname, face, args, self._card)
        self.record(**inner)
        return result

    def _is_sum_of_gradients(self, func: Any, arguments: tuple[Any, ...]) -> bool:
        """Two gradients of one tensor, which autograd adds in place unless they are fake."""
        if func is not torch.ops.aten.add.Tensor or self._forwards:
            return False
        one, other = arguments
        return (
            torch._C._current_graph_task_id() >= 0
            and isinstance(other, Tensor)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
        )

    def _face(self, name: str, running: str) -> str:
        """Which one runs on the device that is meant."""
        if self._device == "cpu":
            return running
        op = name.removesuffix("_forward").removesuffix("_backward")
        if torch.cuda.is_available():
            return choose_face(op, self._device, None).split(",")[0]
        faces = PREFERENCES[op].get(self._device, ())
        old = self._dtype == torch.float16
        return next((face for face in faces if not (old and face == "triton")), "reference")


def inner_memory(
    name: str, face: str, arguments: tuple[Any, ...], card: Card = SMALL_CARD
) -> dict[str, int]:
    """What ``<op>_forward`` or ``<op>_backward`` holds inside at its peak, beside its results:
    bytes of ``logits`` and ``workspace``.

    Only what grows with the model and is not small beside its results; the C++ faces of the CPU
    work in a few MB of the cache.
    """
    if name == "linear_cross_entropy_backward":
        return _loss_backward(face, card, *arguments)
    formula = _INNER.get(name)
    return {} if formula is None else formula(face, *arguments)


def _loss_forward(face: str, x_ND: Tensor, weight_VD: Tensor, *_: Any) -> dict[str, int]:
    if face == "cpu":
        return {}
    if face in ("triton", "cuda"):  # the largest logit and the sum of each span, and the target's
        words = SPAN if face == "triton" else 128 if x_ND.element_size() == 2 else 64
        spans = -(-weight_VD.shape[0] // words)
        return {"workspace": (2 * spans + 1) * x_ND.shape[0] * _wide(x_ND)}
    wide, product = _wide(x_ND), _product(x_ND)
    chunk = min(CHUNK, x_ND.shape[0]) * weight_VD.shape[0]
    widened = 0 if product == x_ND.element_size() else weight_VD.numel() * product
    # The logits, and their exponentials in the log-sum-exp.
    return {"logits": chunk * 2 * wide, "workspace": widened}


def _loss_backward(
    face: str, card: Card, dloss_N: Tensor, x_ND: Tensor, weight_VD: Tensor, *_: Any
) -> dict[str, int]:
    wide, size = _wide(x_ND), x_ND.element_size()
    (n_rows, width), n_words = x_ND.shape, weight_VD.shape[0]
    if face == "triton":
        slab = slab_words(n_rows, n_words, size, card)
        splits = slab_splits(n_rows, width, slab, size, card)
        scratch = triton_scratch(n_rows, width, size, slab, splits)
        return {"logits": scratch.logits, "workspace": scratch.rest}
    if face == "cuda":
        scratch = cuda_scratch(n_rows, n_words, width, size)
        return {"logits": scratch.logits, "workspace": scratch.rest}
    if face == "cpu":
        if x_ND.dtype == torch.float16:  # all of it in float32
            return {"workspace": 2 * (x_ND.numel() + weight_VD.numel()) * wide}
        return {}
    product = _product(x_ND)
    chunk = min(CHUNK, x_ND.shape[0]) * weight_VD.shape[0]
    # The sum of the weight's gradient in float32; a widened copy of the weight beside a chunk, or
    # the chunk's logits and their gradients, or its part of the weight's gradient.
    widened = 0 if product == size else weight_VD.numel() * product + chunk * product
    gradients = chunk * (2 * wide + (size if size != wide else 0))
    part = weight_VD.numel() * size + chunk * (wide + size)
    sum_VD = weight_VD.numel() * wide
    largest = max(widened, gradients, part)
    logits = min(gradients, largest)
    return {"logits": logits, "workspace": sum_VD + largest - logits}


def _experts_forward(
    face: str, x_ND: Tensor, w_in: Tensor, w_out: Tensor, weights_NA: Tensor, *_: Any
) -> dict[str, int]:
    if face == "cpu":
        return {}
    rows, width, hidden = weights_NA.numel(), x_ND.shape[1], w_out.shape[2]
    if face == "reference":  # tokens gathered, outputs, and one expert's hidden rows
        numbers = rows * 2 * width + rows // w_in.shape[0] * (w_in.shape[1] + hidden)
        # Afterwards outputs weighted and summed in float32.
        return {"workspace": numbers * x_ND.element_size() + rows * width * _wide(x_ND)}
    return {"workspace": rows * (hidden + width) * x_ND.element_size()}


def _experts_backward(
    face: str, dy_ND: Tensor, x_ND: Tensor, w_in: Tensor, w_out: Tensor, weights_NA: Tensor, *_: Any
) -> dict[str, int]:
    if face == "cpu":
        return {}
    rows, width, hidden = weights_NA.numel(), x_ND.shape[1], w_out.shape[2]
    size, wide = x_ND.element_size(), _wide(x_ND)
    if face == "reference":
        each = rows // w_in.shape[0]
        numbers = rows * 3 * width
        return {"workspace": numbers * size + each * 8 * hidden * wide + rows * width * wide}
    return {"workspace": rows * (w_in.shape[1] + hidden + width) * size}


def _attention_forward(
    face: str, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *_: Any
) -> dict[str, int]:
    if face == "cuda":
        return {"workspace": _copied(q_BTHK, k_BSGK, v_BSGK)}
    if face != "reference":
        return {}
    batch, n_queries, n_heads, _width = q_BTHK.shape
    scores = batch * n_heads * n_queries * k_BSGK.shape[1]
    return {"workspace": scores * 3 * _wide(q_BTHK)}


def _attention_backward(
    face: str,
    dy_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    y_BTHK: Tensor,
    lse_BHT: Tensor,
    *_: Any,
) -> dict[str, int]:
    of_rows = lse_BHT.numel() * _wide(q_BTHK)
    if face == "triton":  # delta, and the log-sum-exp in base 2
        return {"workspace": 2 * of_rows}
    if face == "cuda":
        return {"workspace": of_rows + _copied(dy_BTHK, q_BTHK, k_BSGK, v_BSGK, y_BTHK)}
    if face != "reference":
        return {}
    batch, n_queries, n_heads, _width = q_BTHK.shape
    scores = batch * n_heads * n_queries * k_BSGK.shape[1]
    return {"workspace": scores * 5 * _wide(q_BTHK)}


def _copied(*tensors: Tensor) -> int:
    """Bytes of the copies that a face makes which wants its tensors in one piece."""
    return sum(x.numel() * x.element_size() for x in tensors if not x.is_contiguous())


def _wide(tensor: Tensor) -> int:
    """Bytes of a number in the dtype that sums are taken in."""
    return accumulation_dtype(tensor.dtype).itemsize


def _product(tensor: Tensor) -> int:
    """Bytes of a number of a matrix product whose results can be large."""
    return product_dtype(tensor.dtype).itemsize


_INNER: dict[str, Callable[..., dict[str, int]]] = {
    "linear_cross_entropy_forward": _loss_forward,
    "moe_ffn_forward": _experts_forward,
    "moe_ffn_backward": _experts_backward,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
}
