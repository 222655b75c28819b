"""Pictures that compare runs with each other."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pyllm.viz.canvas import new_figure, save_figure

Band = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Places on the x axis, and the values there of each run."""


def plot_bands(
    path: Path, panels: Mapping[str, tuple[str, Mapping[str, Band]]], ylabel: str
) -> None:
    """Named curves with several runs each: their mean, and a band from the least to the most.

    Args:
        path: of the picture.
        panels: title -> (label of the x axis, name -> band).
        ylabel: of all panels.
    """
    figure, axes = new_figure(5.5 * len(panels), 4.2, len(panels))
    for axis, (title, (xlabel, bands)) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        lowest, later = np.inf, []
        for name, (x, runs) in bands.items():
            values = np.asarray(runs, dtype=float)
            mean = values.mean(0)
            (line,) = axis.plot(x, mean, marker="o", markersize=3, label=name)
            axis.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
            lowest = min(lowest, float(values.min()))
            later.append(float(mean[min(1, len(mean) - 1)]))
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
        # The first point is far above the rest, which would be a flat line beside it.
        axis.set_ylim(lowest * 0.97, max(max(later), lowest * 1.05) * 1.02)
        axis.legend()
    save_figure(figure, path)


def plot_power_law(
    path: Path,
    compute: Sequence[float],
    loss: Sequence[float],
    law: Callable[[float], float],
) -> None:
    """Measured losses over compute, and a law fitted to all but the last of them."""
    figure, axis = new_figure()
    span = np.geomspace(min(compute), max(compute), 100)
    axis.plot(span, [law(c) for c in span], color="grey", label="fitted to all but the largest")
    axis.plot(compute[:-1], loss[:-1], "o", label="measured")
    axis.plot(compute[-1:], loss[-1:], "s", label="measured, predicted by the fit")
    axis.set(
        xscale="log",
        xlabel="floating-point operations of the training",
        ylabel="val_loss (nats per token)",
        title="Loss over compute",
    )
    axis.legend()
    save_figure(figure, path)
