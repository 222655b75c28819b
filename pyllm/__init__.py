"""pyllm: language models from first principles, trained for real on small machines.

Importing the package costs milliseconds: what is named here is loaded when it is first used.
"""

import importlib
from types import ModuleType

from pyllm._native import warn_if_missing

__all__ = ["__version__", "doctor"]

_LAZY_MODULES = {"doctor": "pyllm.doctor"}

warn_if_missing()


def __getattr__(name: str) -> str | ModuleType:
    if name == "__version__":
        from importlib.metadata import version

        return version("pyllm")
    if name in _LAZY_MODULES:
        return importlib.import_module(_LAZY_MODULES[name])
    raise AttributeError(f"module 'pyllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
