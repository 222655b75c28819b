"""``pytest -m gpu``: generation on the card is one CUDA graph a step, and writes what the host's
path does."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.generate import SamplingConfig, Session, generate_ids, session
from pyllm.generate.device_sampling import DeviceSettings, draw_tokens, way_of
from pyllm.generate.device_step import Ahead, DeviceStep, capture_graph
from pyllm.models import Transformer, preset, quantize_folder, quantize_model, save_model
from pyllm.tokenizers import byte_tokenizer

from .small import make_model
from .test_device_step import CONFIG, GREEDY, MODELS, RAGGED, WAYS, write
from .test_distribution import CASES
from .test_native import FAMILY, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*which is slower:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.set_float32_matmul_precision("highest")


def host_tokens(one: Session, prompts: Any, config: Any, monkeypatch: Any) -> list[list[int]]:
    """Step by step, drawn with the host's numbers."""
    with monkeypatch.context() as patch:
        patch.setattr(session, "ahead_of", lambda one, before: None)
        return write(one, prompts, config)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_captured_step_writes_the_same(name: str, way: str, monkeypatch: Any) -> None:
    """No warning, which would be an error here: every step was captured."""
    model = make_model(MODELS[name]).to("cuda")
    one = Session(model, 5)
    ahead = write(one, RAGGED, WAYS[way])
    assert isinstance(one._ahead, Ahead)
    assert all(call.__name__ == "replay" for call in one._ahead._captured.values())
    assert ahead == host_tokens(Session(model, 5), RAGGED, WAYS[way], monkeypatch)
    assert write(one, RAGGED, WAYS[way]) == ahead  # the same graph once more


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("kind", ["half", "int8"])
@pytest.mark.parametrize("name", ["mixture", "gpt", "dense", "sinks", "shared"])
def test_every_kind_of_model_is_captured(
    name: str, kind: str, cache: str, monkeypatch: Any
) -> None:
    model = make(FAMILY[name]).to("cuda")
    model = quantize_model(model) if kind == "int8" else model.half()
    one = Session(model, 2, kv_cache_dtype=cache)
    ahead = write(one, RAGGED[:2], GREEDY)
    assert all(call.__name__ == "replay" for call in one._ahead._captured.values())
    alone = Session(model, 2, kv_cache_dtype=cache)
    assert ahead == host_tokens(alone, RAGGED[:2], GREEDY, monkeypatch)


@pytest.mark.parametrize("name", [*MODELS])
@torch.inference_mode()
def test_nothing_in_a_step_waits(name: str) -> None:
    """PyTorch's own watch raises where an operation synchronises."""
    model = make_model(MODELS[name]).to("cuda")
    step = DeviceStep(model, model.new_cache(2), 67)
    step.begin(WAYS["all of it"], {3}, [torch.Generator() for _ in range(2)], step.seen_BV.clone())
    step.stand({0: 5, 1: 5})
    step.refill()
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_replay_gives_the_bits_of_the_step() -> None:
    found = []
    for captured in (False, True):
        model = make(FAMILY["mixture"]).to("cuda", torch.float16)
        step = DeviceStep(model, model.new_cache(2), 97)
        step.begin(WAYS["sorted"], (), [torch.Generator().manual_seed(1)] * 2, None)
        step.stand({0: 50, 1: 50})
        step.refill()
        run = capture_graph(step) if captured else step.run
        tokens = []
        for _ in range(20):
            run()
            tokens.append(step.out_B.tolist())
        found.append((tokens, step.at.cache.store.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_card_and_processor_draw_the_same_words(case: Any) -> None:
    rows = torch.tensor(case.logits).repeat(2000, 1)
    seen = torch.zeros_like(rows, dtype=torch.bool)
    seen[:, list(case.seen)] = True
    u_B = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        settings = DeviceSettings.on(torch.device(device))
        settings.set(case.config, rows.shape[1])
        given = (rows.to(device), way_of(case.config), settings, u_B.to(device), seen.to(device))
        found.append(draw_tokens(*given)[0].cpu())
    # A number that lies on a border may fall to either side of it.
    assert (found[0] != found[1]).sum() <= 2


def test_a_large_vocabulary_draws_the_same_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = (3 * torch.randn(4, 50_257, generator=generator)).to("cuda")
    settings = DeviceSettings.on(logits_BV.device)
    config = SamplingConfig(top_p=0.95)
    settings.set(config, 50_257)
    for number in range(50):
        u_B = torch.rand(4, generator=generator).to("cuda")
        drawn = [draw_tokens(logits_BV, "sorted", settings, u_B)[0] for _ in range(4)]
        assert all(torch.equal(drawn[0], other) for other in drawn), number


def test_a_session_on_a_side_stream() -> None:
    model = make_model(CONFIG).to("cuda")
    expected = write(Session(model, 2), RAGGED[:2], WAYS["sorted"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert write(Session(model, 2), RAGGED[:2], WAYS["sorted"]) == expected
    torch.cuda.synchronize()


def test_weights_that_change_in_place_are_seen() -> None:
    """A graph reads addresses: after training, or another load into the same model, it is right."""
    model = make_model(CONFIG).to("cuda")
    one = Session(model)
    before = write(one, [[3]], GREEDY)
    model.load_state_dict(make_model(CONFIG, seed=1).state_dict())
    after = write(Session(model), [[3]], GREEDY)
    assert write(one, [[3]], GREEDY) == after != before


def test_a_step_that_cannot_be_captured_runs_all_the_same(monkeypatch: Any) -> None:
    model = make_model(CONFIG).to("cuda")
    expected = write(Session(model), [[3]], GREEDY)
    project = type(model).project

    def waits(self: Transformer, x: torch.Tensor) -> torch.Tensor:
        x.sum().item()
        return project(self, x)

    monkeypatch.setattr(type(model), "project", waits)
    with pytest.warns(UserWarning, match="no CUDA graph, and so slower"):
        assert write(Session(model), [[3]], GREEDY) == expected


MEMORY = """
import json, sys, torch, pyllm
model = pyllm.load(sys.argv[1], device="cuda", dtype=sys.argv[2])
model.generate("Once upon a time", max_new_tokens=64, greedy=True)
print(json.dumps(torch.cuda.max_memory_allocated()))
"""


@pytest.mark.parametrize(("dtype", "most"), [("float16", 400e6), ("int8", 250e6)])
def test_the_large_mixture_writes_in_little_memory(dtype: str, most: float, tmp_path: Path) -> None:
    """A context as long as is needed, and PyTorch's peak, loading included."""
    torch.manual_seed(0)
    folder = tmp_path / "floats"
    save_model(folder, Transformer(preset("moe-158m")), byte_tokenizer())
    if dtype == "int8":
        quantize_folder(folder, tmp_path / "ints")
        folder = tmp_path / "ints"
    torch.cuda.empty_cache()
    command = [sys.executable, "-c", MEMORY, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) <= most


def test_a_context_as_large_as_the_models(monkeypatch: Any) -> None:
    model = make_model(replace(CONFIG, max_seq_len=1024)).to("cuda")
    config = replace(WAYS["sorted"], max_new_tokens=300)
    ahead = list(generate_ids(model, [3], config))
    assert ahead == host_tokens(Session(model, 1, 301), [[3]], config, monkeypatch)[0]
