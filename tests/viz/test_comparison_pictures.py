"""Pictures that compare runs are read back: every curve, band and point is on them."""

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from pyllm.viz import plot_bands, plot_power_law

BLUE, ORANGE, GREY = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x80, 0x80, 0x80)


def pixels_of(path: Path, colour: tuple[int, int, int]) -> int:
    image = np.round(imread(path)[..., :3] * 255).astype(int)
    return int((np.abs(image - np.array(colour)) < 12).all(-1).sum())


def test_bands_show_each_mean_and_how_far_the_runs_lie_apart(tmp_path: Path) -> None:
    x = [1.0, 2.0, 3.0]
    near = {"a": (x, [[9, 3, 2], [9, 3.1, 2.1]]), "b": (x, [[9, 4, 3], [9, 4.1, 3.1]])}
    far = {"a": (x, [[9, 3, 2], [9, 4, 3]]), "b": near["b"]}
    for name, bands in (("near", near), ("far", far)):
        plot_bands(tmp_path / f"{name}.png", {"tokens": ("million", bands)}, "loss")
        assert pixels_of(tmp_path / f"{name}.png", BLUE) > 100
        assert pixels_of(tmp_path / f"{name}.png", ORANGE) > 100
    pale = tuple(round(255 - 0.2 * (255 - part)) for part in BLUE)
    wide, narrow = (pixels_of(tmp_path / f"{name}.png", pale) for name in ("far", "near"))
    assert wide > 3 * narrow


def test_several_panels_and_a_single_point(tmp_path: Path) -> None:
    bands = {"a": ([1.0], [[2.0]])}
    plot_bands(tmp_path / "a.svg", {"one": ("x", bands), "two": ("y", bands)}, "loss")
    text = (tmp_path / "a.svg").read_text()
    assert ">one<" in text and ">two<" in text


def test_a_law_and_its_points(tmp_path: Path) -> None:
    compute = [1e12, 1e13, 1e14]
    plot_power_law(tmp_path / "law.png", compute, [3.0, 2.0, 1.5], lambda c: 3 * (c / 1e12) ** -0.2)
    for colour in (BLUE, ORANGE, GREY):
        assert pixels_of(tmp_path / "law.png", colour) > 20
