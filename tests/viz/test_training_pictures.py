"""Pictures are read back: they are PNG files, and the curves are on them."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pyllm.viz import plot_curves, plot_expert_load, plot_loss, training
from pyllm.viz.training import smoothed

STEPS = list(range(1, 51))
LOSS = [5 * math.exp(-step / 20) + 1 for step in STEPS]
BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)


def pixels(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = np.round(imread(path)[..., :3] * 255).astype(int)
    assert image.shape[0] > 200 and image.shape[1] > 400
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10, "blank"
    return image


def columns_of(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """In how many columns of the picture the colour stands: how far a curve reaches."""
    near = (np.abs(image - np.array(colour)) < 12).all(-1)
    return int(near.any(0).sum())


def test_both_loss_curves_are_drawn(tmp_path: Path) -> None:
    plot_loss(tmp_path / "loss.png", STEPS, LOSS, [10, 30, 50], [4.0, 2.5, 1.6])
    image = pixels(tmp_path / "loss.png")
    assert columns_of(image, BLUE) > image.shape[1] // 2
    assert columns_of(image, ORANGE) > image.shape[1] // 2
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ([math.nan, *LOSS[1:]], [4.0, math.inf]),
        ([*LOSS[:-1], math.inf], []),
        ([math.nan] * 50, [1.0]),
        ([2.0] * 50, [2.0]),
    ],
    ids=["nan", "inf", "only nan", "flat"],
)
def test_odd_losses(tmp_path: Path, train: list[float], val: list[float]) -> None:
    plot_loss(tmp_path / "loss.png", STEPS, train, STEPS[: len(val)], val)
    pixels(tmp_path / "loss.png")


def test_a_run_of_one_step(tmp_path: Path) -> None:
    plot_loss(tmp_path / "loss.png", [1], [5.0], [1], [5.1])
    plot_expert_load(tmp_path / "load.png", [1], [[[0.5, 0.5]]], [1.0])
    for name in ("loss.png", "load.png"):
        pixels(tmp_path / name)


@pytest.mark.parametrize("n_layers", [1, 4, 9])
def test_expert_load_has_an_area_for_each_expert(tmp_path: Path, n_layers: int) -> None:
    load = np.random.default_rng(0).dirichlet([5.0] * 3, size=(50, n_layers))
    busiest = (load.max(-1) * 3).mean(-1)
    plot_expert_load(tmp_path / "load.png", STEPS, load.tolist(), busiest.tolist())
    image = pixels(tmp_path / "load.png").reshape(-1, 3)
    colours, counts = np.unique(image, axis=0, return_counts=True)
    areas = [c for c in colours[counts > image.shape[0] // 100] if np.ptp(c) > 40]
    assert len(areas) >= 3


@pytest.mark.parametrize("n_layers", [1, 6, 12])
def test_no_layer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_layers: int
) -> None:
    drawn = []
    monkeypatch.setattr(training, "save_figure", lambda figure, path: drawn.append(figure))
    load = np.full((50, n_layers, 4), 0.25)
    plot_expert_load(tmp_path / "load.png", STEPS, load.tolist(), [1.0] * 50)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == [*(f"MoE layer {layer}" for layer in range(n_layers)), "busiest expert / mean"]


def test_named_curves(tmp_path: Path) -> None:
    plot_curves(
        tmp_path / "curves.png",
        {"up": (STEPS, STEPS), "down": (STEPS, STEPS[::-1])},
        xlabel="step",
        ylabel="value",
        title="Two",
    )
    image = pixels(tmp_path / "curves.png")
    assert min(columns_of(image, BLUE), columns_of(image, ORANGE)) > image.shape[1] // 2


def test_smoothing_is_the_mean_of_what_came_before() -> None:
    values = np.arange(1.0, 201.0)
    result = smoothed(values, share=0.02)  # a window of 4
    assert result[0] == 1 and result[1] == 1.5
    assert result[100] == pytest.approx(values[97:101].mean())
    assert smoothed([3.0], share=0.02) == pytest.approx([3.0])
