"""The doctor looks at everything, breaks on nothing, and its arithmetic is right."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyllm import doctor
from pyllm.models import PRESETS, count_parameters

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["-m", "pyllm.doctor"], ["scripts/doctor.py"]])
def test_doctor_runs_and_shows_every_section(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
        | {"COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # nor do the libraries that it asks say anything
    assert "could not look" not in result.stdout
    for title in doctor.SECTIONS:
        assert title in result.stdout
    assert torch.__version__ in result.stdout
    (faces,) = [line for line in result.stdout.splitlines() if "faces of rms_norm" in line]
    assert "reference" in faces
    assert torch.cuda.is_available() or "triton" not in faces  # it serves no CPU


def test_the_files_it_names_are_there() -> None:
    named = {
        word.rstrip(":") for what in doctor._OPTIONAL_PACKAGES.values() for word in what.split()
    }
    files = {word for word in named if word.endswith(".py")}
    assert files and all((ROOT / name).is_file() for name in files), files


def test_what_fits_counts_sixteen_bytes_per_parameter() -> None:
    name = "moe-158m"
    needed = 16 * count_parameters(PRESETS[name]).total
    just_enough = {fit.preset: fit for fit in doctor.what_fits(needed)}
    assert just_enough.keys() == PRESETS.keys()
    assert just_enough[name].needed_bytes == needed
    assert just_enough[name].fits
    assert not {fit.preset: fit for fit in doctor.what_fits(needed - 1)}[name].fits


def test_what_fits_refuses_a_negative_memory() -> None:
    with pytest.raises(ValueError, match="memory_bytes must be 0 or more, got -1"):
        doctor.what_fits(-1)


def test_a_broken_section_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("the [disk] is gone")

    monkeypatch.setattr(
        doctor, "SECTIONS", {"first": broken, "second": lambda: [doctor.Finding("one", "fine")]}
    )
    doctor.main()
    printed = capsys.readouterr().out
    assert "the [disk] is gone" in printed
    assert "fine" in printed


def test_missing_kernels_come_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_extension", lambda: None)
    monkeypatch.setattr(doctor, "missing_reason", lambda: "it did not build")
    monkeypatch.setattr(doctor, "build_output", lambda: "c++: not found")
    first, second, *_ = doctor.kernels()
    assert "it did not build" in first.found
    assert "pip install -e ." in first.remedy
    assert second.found == "c++: not found"


def test_the_8_bit_optimizer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed is not usable: its native parts may be for another CUDA."""

    def stepping(change: float, error: Exception | None = None) -> doctor.Finding:
        def step(parameters: list[torch.nn.Parameter]) -> None:
            if error is not None:
                raise error
            with torch.no_grad():
                parameters[0].sub_(change)

        def make(parameters: list[torch.nn.Parameter], lr: float) -> SimpleNamespace:
            return SimpleNamespace(step=lambda: step(parameters))

        monkeypatch.setattr("pyllm.train.adamw8bit.make_adamw8bit", make)
        return doctor.eight_bit_optimizer()

    assert " is usable on " in stepping(1.0).found and not stepping(1.0).remedy
    assert "computes nothing" in stepping(0.0).found
    broken = stepping(1.0, RuntimeError("no kernel image\nand more"))
    assert broken.found.endswith(": no kernel image") and "not usable" in broken.found
    assert "pip install 'pyllm[gpu]'" in broken.remedy
