"""The benchmarks run at toy size, so that they work on the day there is a card (or time)."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.testing import OPERATIONS
from pyllm.train import TRAIN_PRESETS, DataConfig, Trainer
from pyllm.train import run as train_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Path]]]:
    """Run a benchmark with these flags; its exit code, and the JSON files it wrote."""

    def run(name: str, *flags: object) -> tuple[int, list[Path]]:
        results = tmp_path / "results"
        places = ["--results", str(results), "--out", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags), *places])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return stop.value.code, sorted(results.glob("*.json"))

    return run


def read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["commit"]
    return content


def test_gpu_benchmark_at_toy_size(start: Callable[..., tuple[int, list[Path]]]) -> None:
    code, [file] = start("gpu.py", "--device", "cpu", "--toy", "--minutes", 0.01)
    assert code == 0 and file.name.startswith("gpu-cpu-toy-")
    content = read(file)
    training = content["training"]
    assert training["steps"] >= 20 and training["tokens_per_second"] > 0
    assert training["train_loss"]["last"] < training["train_loss"]["values"][0]
    assert training["settings"]["recompute"] and training["model"]["norm"] == "layer"
    assert training["memory_cap"] is None and training["training_tokens"] > 1000
    assert 0 < training["val_bpb"] < 8
    assert [row["dtype"] for row in content["decode"]] == ["float32", "bfloat16"]
    for row in content["decode"]:
        assert row["fastest"] <= row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
    assert not [row for row in content["operations"] if "error" in row]
    timed = {
        (case["op"], row["face"], row["stage"])
        for case in content["operations"]
        for row in case["rows"]
        if "median" in row
    }
    for op, operation in OPERATIONS.items():
        assert {(op, "reference", stage) for stage in operation.stages} <= timed
    check_parts(content)


def check_parts(content: dict[str, Any]) -> None:
    """Ours and the peers are beside each other, and nothing failed."""
    assert content["bandwidth"]["bytes_per_second"] > 0
    assert not [name for name in content if name.endswith("_error")], content
    assert content["skipped_parts"] == {} and min(content["seconds"].values()) > 0
    [mixture] = content["experts"]
    times = {row["name"]: row["median"] for row in mixture["rows"]}
    assert times.keys() == {"pyllm", "grouped_mm"}
    [peer] = [row for row in mixture["rows"] if row["name"] == "grouped_mm"]
    assert peer["times_as_slow_as_ours"] == times["grouped_mm"] / times["pyllm"]
    told = [(row["window"], row["stage"], len(row["rows"])) for row in content["attention"]]
    stages = ("forward", "forward and backward")
    assert told == [(window, stage, 3) for window in (None, 8) for stage in stages]
    # The same is computed, but for bfloat16.
    assert mixture["difference"] < 0.01
    assert all(row["difference"] < 0.01 for row in content["attention"])
    assert not [row for case in content["attention"] for row in case["rows"] if "skipped" in row]
    rows = content["int8_linear"]["rows"]
    assert [row["name"] for row in rows] == ["W8A8", "W8A16"] * 2
    assert all(row["share_of_bandwidth"] > 0 for row in rows)
    decode = content["decode_beside_floor"]
    assert decode["seconds_a_token"]["median"] > 0 and decode["times_the_floor"] > 0
    assert [row["dtype"] for row in content["memory"]] == ["bfloat16", "int8"]
    assert all(row["process_growth"] > 0 for row in content["memory"])
    targets = content["targets"]
    assert [row["at least"] for row in targets[:5]] == [1.2, 1.0, 1.0, 1.5, 1.5]
    assert [row["at least"] for row in targets[5:9]] == [0.85] * 4
    assert [row["at most"] for row in targets[9:]] == [1e-3, 400e6, 250e6, 3.4 * 2**30]
    assert targets[0]["measured"] == peer["times_as_slow_as_ours"]
    assert all(row["measured"] is not None for row in targets[:10])
    assert all(row["met"] is None for row in targets)  # promised of a card, and of other sizes
    sys.path.insert(0, str(BENCHMARKS))
    import _gpu_targets

    of_a_card = _gpu_targets.beside_targets(content, True)
    assert all(row["met"] in (True, False) for row in of_a_card[:10])
    assert all(row["met"] is None for row in of_a_card[10:])  # not measured here


def test_less_memory_means_smaller_micro_batches(
    start: Callable[..., tuple[int, list[Path]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accumulate = Trainer._accumulate

    def limited(self: Trainer, number: int) -> Any:
        if self.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(self, number)

    monkeypatch.setattr(Trainer, "_accumulate", limited)
    _, [file] = start("gpu.py", "--device", "cpu", "--toy", "--minutes", 0)
    training = read(file)["training"]
    assert training["settings"]["batch_size"] == 8 and training["micro_batch"] == 2
    # The peak itself is that of the whole process here, and says nothing of the step.
    assert training["estimated_memory"]["total"] > training["estimated_memory"]["weights"] > 0
    said = capsys.readouterr().out
    assert "step 1: out of memory with 8 sequences at a time; from here on 2 at a time, 8 t" in said


def test_what_was_measured_before_a_failure_is_kept(
    start: Callable[..., tuple[int, list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, number: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_accumulate", full)
    code, [file] = start("gpu.py", "--device", "cpu", "--toy", "--minutes", 0)
    content = read(file)
    assert code == 0
    assert content["training"]["error"].startswith("out of memory on cpu with one sequence of 32 t")
    assert content["operations"]


def test_a_part_that_fails_costs_no_other(
    start: Callable[..., tuple[int, list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the error is none that anybody expects, as one of Triton's compiler."""

    class CompilationError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise CompilationError("at 3:4")

    monkeypatch.setattr(Trainer, "_accumulate", fail)
    monkeypatch.setattr("pyllm.ops.moe_ffn", fail)
    monkeypatch.delitem(sys.modules, "_gpu_parts", raising=False)  # it has the sound one
    flags = ["--device", "cpu", "--toy", "--part"]
    for part in ("training", "experts"):
        code, files = start("gpu.py", *flags, part)
        assert code == 0 and len(files) == 1
        content = read(files[0])
        if part == "training":
            assert content["training"] is None
            assert content["training_error"] == "CompilationError: at 3:4"
        else:
            rows = {row["name"]: row for row in content["experts"][0]["rows"]}
            assert rows["pyllm"] == {"name": "pyllm", "skipped": "CompilationError: at 3:4"}
            assert rows["grouped_mm"]["median"] > 0
            assert content["targets"][0]["measured"] is None
        files[0].unlink()


@pytest.mark.slow
def test_parts_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a card. One that is ended keeps what it had found until then."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    machine, facts = gpu["look_apart"]("cpu")
    assert machine["torch"] == torch.__version__ and facts == {"name": "cpu"}
    config = gpu["Config"](device="cpu", toy=True, minutes=0, results=tmp_path / "nowhere")
    found = gpu["run_apart"]("int8_linear", config, 300.0, tmp_path / "out")
    assert list(found) == ["int8_linear", "bandwidth"] and len(found["int8_linear"]["rows"]) == 4
    found = gpu["run_apart"]("training", config, 0.5, tmp_path / "out")
    assert found["training"] is None and found["training_error"].endswith("ended after 0 s")
    assert not (tmp_path / "nowhere").exists()


def test_gpu_benchmark_without_a_card(
    start: Callable[..., tuple[int, list[Path]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start("gpu.py") == (2, [])
    said = capsys.readouterr().err
    assert "device 'cuda' is not available on this machine; here: cpu" in said
    assert "--device cpu --toy runs everything" in said


def test_balance_benchmark(
    start: Callable[..., tuple[int, list[Path]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("pyllm.train.prepare.VALID_STORIES", 2)
    monkeypatch.setattr(train_run, "STORY_TOKENS", 5)
    steps = ["--steps", 2, "--every", 1, "--n-stories", 60, "--threads", 1]
    code, [file] = start("balance.py", *steps)
    assert code == 0
    runs = read(file)["runs"]
    assert list(runs) == ["balance_coef 0.01", "balance_coef 0"]
    with_loss, without = runs.values()
    assert with_loss["steps"] == without["steps"] == [1, 2]
    # The first step is the same forward pass; the update that follows it is not.
    loads = [run["expert_load_max_over_mean"] for run in (with_loss, without)]
    assert loads[0][0] == loads[1][0] >= 1
    assert with_loss["val_loss"] != without["val_loss"]
    assert "<svg" in (file.parent / "balance.svg").read_text(encoding="utf-8")


def test_stories_benchmark(
    start: Callable[..., tuple[int, list[Path]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pyllm.train.prepare.VALID_STORIES", 2)
    monkeypatch.setattr(train_run, "STORY_TOKENS", 5)
    few = DataConfig(n_stories=60)
    monkeypatch.setattr("pyllm.train.DataConfig", lambda: few)
    small = replace(TRAIN_PRESETS["moe-tiny"], batch_size=1, seq_len=32, threads=1, sample_every=0)
    monkeypatch.setitem(TRAIN_PRESETS, "moe-tiny", small)
    code, [file] = start("stories.py", "--max-steps", 2, "--tinystories", tmp_path / "none")
    assert code == 0
    assert "no TinyStories there" in capsys.readouterr().out
    [(name, run)] = read(file)["runs"].items()
    assert name == "embedded stories"
    assert 1 < run["val_bpb"] < 8 and run["train_tokens"] == 64 and run["story"]
    assert "<svg" in (file.parent / "stories.svg").read_text(encoding="utf-8")


def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.train.prepare.VALID_STORIES", 2)
    monkeypatch.setattr(train_run, "STORY_TOKENS", 5)
    few = DataConfig(n_stories=60)
    monkeypatch.setattr("pyllm.train.DataConfig", lambda **more: replace(few, **more))
    small = replace(TRAIN_PRESETS["moe-tiny"], batch_size=1, seq_len=32, threads=1, sample_every=0)
    monkeypatch.setitem(TRAIN_PRESETS, "moe-tiny", small)


def test_moe_vs_dense_benchmark(
    start: Callable[..., tuple[int, list[Path]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _toy(monkeypatch)
    code, [file] = start(
        "moe_vs_dense.py", "--steps", 3, "--seeds", 2, "--tinystories", tmp_path / "none"
    )
    assert code == 0
    content = read(file)
    assert content["text"] == "embedded stories"
    # Equal active compute, but for the routers: 4 layers of 8 experts and 256 channels.
    assert content["mixture"]["active"] - content["dense"]["active"] == 4 * 8 * 256
    runs, steps = content["runs"], content["steps"]
    assert list(runs) == ["mixture", "dense, equal tokens", "dense, equal time"]
    for kind, each in runs.items():
        assert len(each) == 2 and each[0]["val_losses"] != each[1]["val_losses"], kind
        assert each[0]["tokens"][-1] == steps[kind] * 32
        assert each[0]["seconds"] == sorted(each[0]["seconds"])
    ratio = runs["mixture"][0]["median_step"] / runs["dense, equal tokens"][0]["median_step"]
    assert steps["dense, equal time"] == max(round(3 * ratio), 1)
    for kind, found in content["summary"].items():
        last = [run["val_losses"][-1] for run in runs[kind]]
        assert found["val_loss"] == pytest.approx(sum(last) / 2)
    assert "<svg" in (file.parent / "moe-vs-dense.svg").read_text(encoding="utf-8")


def test_scaling_benchmark(
    start: Callable[..., tuple[int, list[Path]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _toy(monkeypatch)
    flags = ["--widths", 32, 64, 96, 128, "--tokens-per-parameter", 0.001, "--seq-len", 32]
    code, [file] = start("scaling.py", *flags, "--tinystories", tmp_path / "none")
    assert code == 0
    content = read(file)
    assert [run["width"] for run in content["runs"]] == [32, 64, 96, 128]
    compute = [run["compute"] for run in content["runs"]]
    assert compute == sorted(compute)
    assert content["measured"] == content["runs"][-1]["val_loss"]
    losses = [run["val_loss"] for run in content["runs"]]
    fit = runpy.run_path(str(BENCHMARKS / "scaling.py"))["fit_power_law"]
    assert content["predicted"] == pytest.approx(fit(compute[:-1], losses[:-1])(compute[-1]))
    assert content["predicted"] != pytest.approx(fit(compute, losses)(compute[-1]), rel=1e-6)
    assert "<svg" in (file.parent / "scaling.svg").read_text(encoding="utf-8")


def test_a_power_law_is_found_again() -> None:
    fit = runpy.run_path(str(BENCHMARKS / "scaling.py"))["fit_power_law"]
    compute = [1e12, 3e12, 1e13, 5e13]
    law = fit(compute, [1.2 + 2.0 * (c / 1e12) ** -0.3 for c in compute])
    assert law.floor == pytest.approx(1.2, abs=0.02)
    assert law.slope == pytest.approx(0.3, abs=0.02)
    assert law(1e15) == pytest.approx(1.2 + 2.0 * 1000**-0.3, abs=0.02)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("scaling.py", ["--widths", "32", "64", "96"], "at least four different multiples of 32"),
        ("scaling.py", ["--widths", "32", "64", "96", "100"], "multiples of 32, got"),
        ("scaling.py", ["--tokens-per-parameter", "0"], "above 0 and at most 1000, got 0"),
        ("moe_vs_dense.py", ["--seeds", "0"], "--seeds must be a whole number from 1"),
    ],
)
def test_impossible_comparisons_are_refused(
    start: Callable[..., tuple[int, list[Path]]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: list[str],
    message: str,
) -> None:
    assert start(name, *flags) == (2, [])
    assert message in capsys.readouterr().err
