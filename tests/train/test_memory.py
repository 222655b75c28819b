"""The estimate of a step's memory, against what the allocator says of a real step; and the plan."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pyllm.models import ModelConfig, count_parameters, preset
from pyllm.ops import _registry, available_faces
from pyllm.ops._registry import face_module
from pyllm.reference import _loss_sizes
from pyllm.reference._loss_sizes import Card
from pyllm.testing import OPERATIONS
from pyllm.testing.check import run_forward
from pyllm.testing.declaration import as_tuple
from pyllm.testing.suite import faces_on
from pyllm.train import TRAIN_PRESETS, RunConfig, TrainConfig, memory
from pyllm.train import run as train_run
from pyllm.train.memory import MemoryEstimate, estimate_memory, inner_memory, measure_memory
from pyllm.train.plan import CONTEXT, memory_budget, plan_batch, plan_training, usable

SMALL = ModelConfig(vocab_size=2048, n_layers=2, d_model=128, n_heads=4, d_ff=192)
MODELS = {
    "modern": SMALL,
    "gpt": replace(SMALL, norm="layer", position="learned", activation="gelu", n_kv_heads=4),
    "hybrid": replace(SMALL, moe_every=2, n_shared_experts=1, tie_embeddings=False, top_k=1),
    "dense": replace(SMALL, moe_every=0, d_ff=512),
}
GIB = 2**30


def check(model: ModelConfig, dtype: torch.dtype, within: float = 0.1, **train: object) -> None:
    settings = TrainConfig(**({"batch_size": 4, "seq_len": 128, "accumulation": 2} | train))
    estimate = estimate_memory(model, settings, dtype, "cpu")
    assert estimate.total == pytest.approx(measure_memory(model, settings, dtype), rel=within)


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_what_is_allocated(name: str, dtype: torch.dtype, recompute: bool) -> None:
    check(MODELS[name], dtype, optimizer="adamw", recompute=recompute)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("batch_size", [1, 12])
def test_in_one_micro_batch(batch_size: int, optimizer: str) -> None:
    """Small, the update takes most (with Muon); large, the activations do."""
    check(SMALL, torch.float32, batch_size=batch_size, accumulation=1, optimizer=optimizer)


@pytest.fixture
def reference_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As ``PYLLM_FACE=reference`` has it."""
    monkeypatch.setattr(_registry, "_FORCED_FACE", "reference")
    _registry._best_face.cache_clear()
    memory._estimate.cache_clear()
    yield
    _registry._best_face.cache_clear()
    memory._estimate.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["the loss", "the experts", "the scores"])
def test_what_the_references_take_inside(
    reference_everywhere: None, case: str, dtype: torch.dtype
) -> None:
    """Each is most of the memory here: its formula is what is tested."""
    model, train = {
        "the loss": (replace(SMALL, vocab_size=20_000, n_layers=1), {"batch_size": 4}),
        "the experts": (replace(SMALL, vocab_size=64, n_layers=1, top_k=4), {"batch_size": 16}),
        "the scores": (
            replace(SMALL, vocab_size=64, n_layers=1),
            {"batch_size": 2, "seq_len": 512},
        ),
    }[case]
    check(model, dtype, optimizer="adamw", **train)


def test_a_kernel_without_a_formula_takes_nothing() -> None:
    assert inner_memory("rms_norm_forward", "reference", ()) == {}


FACES = [
    (op, face)
    for op in ("linear_cross_entropy", "moe_ffn", "attention")
    for face in ("triton", "cuda")
    if face in faces_on("cpu", available_faces(op))
]
SIZES = {
    "linear_cross_entropy": {"N": 300, "D": 48, "V": 2000, "ignored": "some"},
    "moe_ffn": {"N": 96, "D": 64, "F": 48, "E": 4, "A": 2, "load": "even", "act": "swiglu"},
    "attention": {
        "T": 48, "past": 0, "B": 2, "G": 2, "J": 2, "K": 32, "window": 0, "causal": True
    },
}  # fmt: skip


def taken(call: Callable[[], object], given: Sequence[object]) -> tuple[int, int]:
    """Bytes that a call holds at most beside what it is given, and those of its results."""
    ledger = memory.Ledger("cpu")
    for value in given:
        if isinstance(value, torch.Tensor):
            ledger.hold(value, "weights")
    before = ledger._sums["weights"]
    with ledger:
        results = as_tuple(call())
    return ledger.peak.total - before, sum(result.nbytes for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "face"), FACES)
def test_what_the_kernels_of_a_card_take_inside(
    op: str, face: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their launchers run here, and what they allocate is heard; what the kernels compute in
    Triton's interpreter or on the CPU does not matter to it."""
    module, case = face_module(op, face), OPERATIONS[op].case(SIZES[op])
    card = Card(1 << 32, 2)
    monkeypatch.setattr(_loss_sizes, "LEAST_SLAB_BYTES", 1 << 19)
    monkeypatch.setattr(_loss_sizes, "MOST_SLAB_BYTES", 1 << 19)
    monkeypatch.setattr(_loss_sizes, "CHUNK_BYTES", 1 << 18)
    if (op, face) == ("linear_cross_entropy", "triton"):

        def cut(x_ND: torch.Tensor, n_words: int) -> tuple[int, int]:
            size = x_ND.element_size()
            slab = _loss_sizes.slab_words(len(x_ND), n_words, size, card)
            return slab, _loss_sizes.slab_splits(*x_ND.shape, slab, size, card)

        blocks = {size: choices[0] for size, choices in module.ROW_GRADIENT.items()}
        assert {size: (each.m, each.n) for size, each in blocks.items()} == _loss_sizes.ROW_BLOCK
        monkeypatch.setattr(module, "_cut", cut)
        monkeypatch.setattr(module, "SPAN", _loss_sizes.SPAN)
    inputs = case.make_inputs(dtype)
    outputs = run_forward(case, case.operation.reference, inputs)
    known = {**inputs, **outputs}
    known |= {f"d{name}": torch.ones_like(value) for name, value in outputs.items()}
    for stage in ("forward", "backward"):
        arguments = list(inputs.values())
        if stage == "backward":
            arguments = [known[name] for name in case.operation.backward]
        function = getattr(module, f"{op}_{stage}")
        peak, results = taken(lambda f=function, given=arguments: f(*given), arguments)
        inner = inner_memory(f"{op}_{stage}", face, tuple(arguments), card)
        estimate = sum(inner.values()) + results
        # Small here, and not counted: the places of the rows, and masks of them.
        assert estimate == pytest.approx(peak, rel=0.1), (stage, inner)
        assert inner or stage == "forward"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe-tiny", "moe-158m", "moe-158m-gpt", "dense-50m"])
@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, False), (torch.bfloat16, True)])
def test_of_a_preset(name: str, dtype: torch.dtype, recompute: bool) -> None:
    """benchmarks/train_memory.py takes more sizes."""
    check(preset(name), dtype, batch_size=2, optimizer="adamw", recompute=recompute)


def test_a_large_card_holds_more_logits() -> None:
    """The loss takes a 64th of the card; a plan for another card asks for that one."""
    model = replace(SMALL, vocab_size=50_000, n_layers=1)
    train = TrainConfig(batch_size=64, seq_len=512)
    none, two, four, large, largest = (
        estimate_memory(model, train, torch.bfloat16, "cuda", memory)
        for memory in (None, 2 * GIB, 4 * GIB, 16 * GIB, 139 * GIB)
    )
    assert none == two == four and four.total < large.total < largest.total
    assert large.logits == 256 << 20 and largest.logits == 1 << 30


def test_a_cap_stands_for_a_smaller_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may take 3.4 GiB of a large card takes the slab of a small one."""
    module = face_module("linear_cross_entropy", "triton")
    if module is None:
        pytest.skip("triton is not installed")
    card = SimpleNamespace(total_memory=139 * GIB, multi_processor_count=132)
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    x_ND = torch.empty(4096, 512, dtype=torch.float16, device="meta")
    slabs = []
    for share in (1.0, 3.4 / 139):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, s=share: s)
        slabs.append(module._cut(x_ND, 50_257))
    assert slabs == [(50_272, 3), (8192, 3)]  # 412 and 67 MB


def test_the_parts_are_what_they_are_called() -> None:
    train = TrainConfig(batch_size=16, seq_len=128, accumulation=2, optimizer="adamw")
    mixed = estimate_memory(SMALL, train, torch.bfloat16, "cpu")
    full = estimate_memory(SMALL, train, torch.float32, "cpu")
    numbers = count_parameters(SMALL).total
    tables = 4 * 2 * SMALL.max_seq_len * SMALL.head_dim // 2
    assert full.weights == pytest.approx(4 * numbers + tables, rel=0.001)
    assert full.gradients == 4 * numbers
    assert full.optimizer == pytest.approx(8 * numbers, rel=0.001)
    # The output projection's copy has gone by then.
    inside = numbers - SMALL.vocab_size * SMALL.d_model
    assert full.copies == 0 and mixed.copies == pytest.approx(2 * inside, rel=0.01)
    assert mixed.activations < 0.7 * full.activations
    again = estimate_memory(SMALL, replace(train, recompute=True), torch.bfloat16, "cpu")
    assert again.activations < 0.6 * mixed.activations and again.copies < mixed.copies
    one = estimate_memory(SMALL, replace(train, accumulation=1), torch.float32, "cpu")
    assert one.gradients < full.gradients, "there are none yet when activations are most"
    eight = estimate_memory(SMALL, replace(train, optimizer="adamw8bit"), torch.float32, "cpu")
    assert eight.optimizer < 0.5 * full.optimizer
    assert full.total == sum(vars(full).values())


def test_a_model_larger_than_this_machine_can_be_planned_for() -> None:
    giant = replace(preset("dense-3b"), n_layers=2, d_model=64 * 1024, n_heads=512, n_kv_heads=512)
    train = TrainConfig(batch_size=1, seq_len=16, optimizer="adamw")
    assert estimate_memory(giant, train, torch.bfloat16).weights > 100 * GIB


def fake_estimate(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """10 for the weights, 10 a sequence (1 when it is recomputed), 20 for an optimizer (5 in 8
    bits). Returns the micro-batches that were asked for."""
    asked = []

    def estimate(model: ModelConfig, train: TrainConfig, *_: object) -> MemoryEstimate:
        asked.append(train.batch_size)
        rows = train.batch_size * (1 if train.recompute else 10)
        state = 5 if train.optimizer == "adamw8bit" else 20
        return MemoryEstimate(weights=10, optimizer=state, activations=rows)

    monkeypatch.setattr("pyllm.train.plan.estimate_memory", estimate)
    return asked


@pytest.mark.parametrize(
    ("budget", "rows", "recompute", "optimizer"),
    [
        (1000, 48, False, "muon"),
        (200, 16, False, "muon"),  # 10 + 20 + 160
        (40, 1, False, "muon"),
        (39, 8, True, "muon"),
        (31, 1, True, "muon"),
        (30, 1, False, "adamw8bit"),
        (17, 2, True, "adamw8bit"),
    ],
)
def test_the_cheapest_settings_that_fit(
    monkeypatch: pytest.MonkeyPatch, budget: int, rows: int, recompute: bool, optimizer: str
) -> None:
    fake_estimate(monkeypatch)
    asked = TrainConfig(batch_size=6, accumulation=8, recompute=True, optimizer="muon")
    plan = plan_training(SMALL, asked, torch.float32, budget)
    assert plan.fits
    found = (plan.train.batch_size, plan.train.recompute, plan.train.optimizer)
    assert found == (rows, recompute, optimizer)
    assert plan.train.tokens_per_step == asked.tokens_per_step


def test_what_does_not_fit_is_the_least_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_estimate(monkeypatch)
    plan = plan_training(SMALL, TrainConfig(batch_size=8), torch.float32, 15)
    assert not plan.fits and plan.estimate.total == 16
    assert plan.train.batch_size == 1 and plan.train.recompute
    assert plan.needed_vram > CONTEXT + 16


def test_few_estimates_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds. 64 sequences have 7 divisors."""
    asked = fake_estimate(monkeypatch)
    assert plan_batch(SMALL, TrainConfig(batch_size=64), torch.float32, 200).train.batch_size == 16
    assert len(asked) <= 4


def test_a_larger_micro_batch_never_takes_less() -> None:
    """What the search for the largest one takes for granted."""
    for dtype, recompute in product((torch.float32, torch.bfloat16), (False, True)):
        train = TrainConfig(seq_len=64, recompute=recompute, optimizer="muon")
        sizes = [
            estimate_memory(SMALL, replace(train, batch_size=rows), dtype, "cpu").total
            for rows in (1, 2, 4, 32)
        ]
        assert sizes == sorted(sizes)


def test_a_card_is_not_all_there_for_tensors() -> None:
    assert 3.2 * GIB < memory_budget(4 * GIB) < 3.4 * GIB
    assert memory_budget(GIB // 4) == 0


@pytest.mark.parametrize("chosen", [{}, {"auto_batch": False}, {"batch_size": 1}])
def test_a_run_on_a_card_takes_what_fits(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, int]
) -> None:
    usual = TrainConfig(batch_size=2, accumulation=32, seq_len=64)
    monkeypatch.setitem(TRAIN_PRESETS, "moe-tiny", usual)
    needed = estimate_memory(SMALL, replace(usual, batch_size=16), torch.float32, "cpu").total
    room = next(size for size in range(needed, 2 * needed, 4096) if usable(size) >= needed)
    monkeypatch.setattr(train_run, "free_memory", lambda device: room)
    console = Console(record=True, width=200, file=io.StringIO())
    config = RunConfig(model=SMALL, train=replace(usual, **chosen))
    fitted = train_run.fit_batch(config, torch.device("cpu"), torch.float32, console)
    said = console.export_text()
    if chosen:
        assert fitted is config and not said
        return
    assert (fitted.train.batch_size, fitted.train.accumulation) == (16, 4)
    assert "16 sequences at a time, 4 times a step: about" in said
    monkeypatch.setattr(train_run, "free_memory", lambda device: 1)
    fitted = train_run.fit_batch(config, torch.device("cpu"), torch.float32, console)
    assert fitted.train.batch_size == 1
    assert "see scripts/plan_memory.py" in console.export_text()


def test_nothing_is_chosen_on_a_cpu() -> None:
    config = RunConfig(train=TRAIN_PRESETS["moe-tiny"])
    console = Console(quiet=True)
    assert train_run.fit_batch(config, torch.device("cpu"), torch.float32, console) is config
