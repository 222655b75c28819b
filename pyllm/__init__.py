"""pyllm: language models from first principles, trained for real on small machines.

Importing the package costs milliseconds: what is named here is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pyllm._native import warn_if_missing

if TYPE_CHECKING:
    import torch

    from pyllm.generate import LanguageModel

__all__ = ["__version__", "doctor", "load"]

_LAZY_MODULES = {"doctor": "pyllm.doctor"}

warn_if_missing()


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    kv_cache_dtype: str = "auto",
) -> LanguageModel:
    """Load a model that writes: ``pyllm.load("runs/NAME").generate("Once upon a time")``.

    How it draws, unless told otherwise, is what the folder's ``generation_config.json`` says.

    Args:
        path: a run folder (its best checkpoint is taken) or a model folder.
        device: ``auto`` (cuda, then mps, then cpu), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: of the weights: ``float32``, ``bfloat16``, ``float16``, ``int8`` (a quarter of the
            memory, and several times as fast on a CPU); ``auto``: float32, or float64 or int8 where
            they were saved so.
        kv_cache_dtype: of the keys and values that are kept while it writes: ``auto``, as the
            activations are; ``int8``, in about half the memory of bfloat16 ones.

    Raises:
        ValueError: no model there, a damaged one, an unknown device or dtype.
    """
    from pyllm.generate import LanguageModel

    return LanguageModel.load(path, device, dtype, kv_cache_dtype)


def __getattr__(name: str) -> str | ModuleType:
    if name == "__version__":
        from importlib.metadata import version

        return version("pyllm")
    if name in _LAZY_MODULES:
        return importlib.import_module(_LAZY_MODULES[name])
    raise AttributeError(f"module 'pyllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
