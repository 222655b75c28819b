"""Training: settings, optimisers, the loop, checkpoints, whole runs.

Imported lazily, so that ``--help`` can be printed without torch.
"""

from typing import TYPE_CHECKING

from pyllm._lazy import lazy_names

if TYPE_CHECKING:
    from pyllm.train.config import TRAIN_PRESETS, DataConfig, RunConfig, TrainConfig
    from pyllm.train.muon import Muon
    from pyllm.train.run import RunResult, run_training
    from pyllm.train.trainer import Trainer, TrainingError

_HOMES = {
    "TRAIN_PRESETS": "config",
    "DataConfig": "config",
    "RunConfig": "config",
    "TrainConfig": "config",
    "Muon": "muon",
    "RunResult": "run",
    "run_training": "run",
    "Trainer": "trainer",
    "TrainingError": "trainer",
}

__all__ = [
    "TRAIN_PRESETS",
    "DataConfig",
    "Muon",
    "RunConfig",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "run_training",
]

__getattr__ = lazy_names(__name__, _HOMES)
