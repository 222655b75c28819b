"""The sheet every picture is drawn on, and how it reaches the disk."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(
    width: float = 8, height: float = 4.5, panels: int = 1, rows: int = 1
) -> tuple[Figure, Any]:
    """An empty figure of so many inches, with panels side by side, in rows below each other."""
    # Figure rather than pyplot: no global state and no window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, panels)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG, by the suffix; it appears whole or not at all."""
    kind = path.suffix.removeprefix(".") or "png"
    # Text stays text and nothing is dated, so that the same curves give the same file.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "pyllm"} if kind == "svg" else {}
    temporary = path.with_name(path.name + ".tmp")
    with matplotlib.rc_context(settings):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(temporary, format=kind, dpi=120, metadata=metadata)
    temporary.replace(path)
