"""Finds the compiled extension ``pyllm._cpu``, and says once per process when it is missing."""

import importlib
import importlib.util
import os
import warnings
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

_FAILURE_FILE = Path(__file__).parent / "_build_failure.txt"
_REMEDY = (
    "Everything runs on the slower reference face. For the kernels, install a C++ compiler (Debian "
    "and Ubuntu: `sudo apt install g++`; macOS: `xcode-select --install`), then run `pip install "
    "-e .` again in the checkout. `python -m pyllm.doctor` shows the details."
)
# A file to load as pyllm._cpu in place of the installed one. scripts/sanitize.py sets it.
_OTHER_BUILD = os.environ.get("PYLLM_EXTENSION")


@cache
def missing_reason() -> str | None:
    """Why ``pyllm._cpu`` cannot be imported, in a few words; None where its file is present.

    Looks for the file only, so that ``import pyllm`` stays cheap.
    """
    if _OTHER_BUILD or importlib.util.find_spec("pyllm._cpu") is not None:
        return None
    if _FAILURE_FILE.exists():
        return "it did not build when pyllm was installed"
    return "it was never built here"


def build_output() -> str | None:
    """What the failed build printed, its first lines; None where no build failed."""
    if not _FAILURE_FILE.exists():
        return None
    return _FAILURE_FILE.read_text(encoding="utf-8", errors="replace").strip()


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"pyllm runs without its C++ kernels: {reason}. {_REMEDY}", UserWarning, stacklevel=4
    )


def warn_if_missing() -> None:
    """Warn, once per process, when the extension is not there. Called by ``import pyllm``."""
    reason = missing_reason()
    if reason is not None:
        _warn_once(reason)


@cache
def cpu_extension() -> ModuleType | None:
    """The module ``pyllm._cpu``, or None (with one warning) where it does not exist.

    ``PYLLM_ISA`` (``baseline``, ``avx2``, ``avx512`` or ``amx``) forces an instruction set; it is
    read here, once.

    Raises:
        ValueError: ``PYLLM_ISA`` names an instruction set that is unknown, or not built or not
            supported on this machine; or the file that ``PYLLM_EXTENSION`` names does not load.
    """
    if missing_reason() is not None:
        warn_if_missing()
        return None
    # The kernels run their loops on the OpenMP runtime that torch brings, so it has to come first.
    import torch  # noqa: F401

    try:
        module = _load()
    except ImportError as error:
        if _OTHER_BUILD:
            raise ValueError(
                f"PYLLM_EXTENSION={_OTHER_BUILD!r} does not load as pyllm._cpu ({error}); build it "
                "again, or unset PYLLM_EXTENSION for the installed one"
            ) from None
        _warn_once(f"its extension does not load ({error})")
        return None
    module.set_isa(os.environ.get("PYLLM_ISA", ""))
    return module


def _load() -> ModuleType:
    if not _OTHER_BUILD:
        return importlib.import_module("pyllm._cpu")
    # A loader of its own: from a path, importlib picks one by how the name ends.
    loader = ExtensionFileLoader("pyllm._cpu", _OTHER_BUILD)
    spec = importlib.util.spec_from_file_location("pyllm._cpu", _OTHER_BUILD, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
