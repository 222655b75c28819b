"""Pictures of plain arrays; knows nothing of the rest of the house."""

from pyllm.viz.comparison import plot_bands, plot_power_law
from pyllm.viz.training import plot_curves, plot_expert_load, plot_loss

__all__ = ["plot_bands", "plot_curves", "plot_expert_load", "plot_loss", "plot_power_law"]
