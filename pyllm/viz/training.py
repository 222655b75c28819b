"""Pictures of a training run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyllm.viz.canvas import new_figure, save_figure

PANELS_IN_A_ROW = 7


def smoothed(
    values: Sequence[float] | np.ndarray[Any, Any], share: float = 0.02
) -> np.ndarray[Any, Any]:
    """Running mean over ``share`` of the run, so that the trend shows through the noise."""
    array = np.asarray(values, dtype=float)
    width = max(int(len(array) * share), 1)
    total = np.cumsum(np.insert(array, 0, 0.0))
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - width, 0)
    mean: np.ndarray[Any, Any] = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _finite(x: Sequence[int], y: Sequence[float]) -> tuple[list[int], list[float]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def plot_loss(
    path: Path,
    steps: Sequence[int],
    train_loss: Sequence[float],
    val_steps: Sequence[int],
    val_loss: Sequence[float],
) -> None:
    """Training loss (faint, and its running mean) and validation loss, in nats per token.

    Values that are not finite are left out: one skipped step must not cost the picture.
    """
    figure, axis = new_figure()
    steps, train_loss = _finite(steps, train_loss)
    val_steps, val_loss = _finite(val_steps, val_loss)
    axis.plot(steps, train_loss, color="C0", alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(train_loss), color="C0", label="train_loss (running mean)")
    axis.plot(val_steps, val_loss, color="C1", marker="o", markersize=4, label="val_loss")
    axis.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="Loss")
    # The first steps fall from ln(vocabulary): without this the rest of the curve is a flat line.
    if train_loss:
        low = min([*train_loss, *val_loss])
        axis.set_ylim(low * 0.95, float(np.percentile(train_loss, 97)) * 1.1)
    axis.legend()
    save_figure(figure, path)


def plot_expert_load(
    path: Path,
    steps: Sequence[int],
    load: Sequence[Sequence[Sequence[float]]],
    max_over_mean: Sequence[float],
) -> None:
    """Each expert's share of the tokens over training, one panel a MoE layer, and the imbalance.

    Args:
        path: of the PNG.
        steps: step numbers.
        load: (steps, MoE layers, experts): shares that sum to one over the experts. Layers are
            counted from 0, as `generate.py --expert-layer` counts them.
        max_over_mean: the busiest expert's load over the mean, averaged over layers.
    """
    load_SLE = np.asarray(load)
    n_layers, n_experts = load_SLE.shape[1:]
    columns = min(n_layers + 1, PANELS_IN_A_ROW)
    rows = math.ceil((n_layers + 1) / columns)
    figure, axes = new_figure(3 * columns, 3.4 * rows, columns, rows)
    layers, rest = np.ravel(axes)[:n_layers], np.ravel(axes)[n_layers:]
    for layer, axis in enumerate(layers):
        curves = [smoothed(load_SLE[:, layer, expert]) for expert in range(n_experts)]
        axis.stackplot(steps, curves, alpha=0.85)
        axis.set(title=f"MoE layer {layer}", xlabel="step", ylim=(0, 1))
        axis.set_ylabel("share of the tokens" if layer % columns == 0 else "")
    rest[0].plot(steps, smoothed(max_over_mean), color="black")
    rest[0].axhline(1.0, color="grey", linestyle=":", linewidth=1)
    rest[0].set(title="busiest expert / mean", xlabel="step")
    for axis in rest[1:]:
        axis.remove()
    save_figure(figure, path)


def plot_curves(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Several named curves, ``name -> (x, y)``, in one picture."""
    figure, axis = new_figure()
    for name, (x, y) in curves.items():
        axis.plot(x, smoothed(y), label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()
    save_figure(figure, path)
