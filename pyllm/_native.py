"""Finds the compiled extensions: ``pyllm._cpu``, and says once per process when it is missing;
``pyllm._cuda``, which most machines have no use for.
"""

import importlib
import importlib.util
import os
import warnings
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

_FAILURE_FILE = Path(__file__).parent / "_build_failure.txt"
_CUDA_FAILURE_FILE = Path(__file__).parent / "_cuda_build_failure.txt"
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
        module = _load("pyllm._cpu", _OTHER_BUILD)
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


@cache
def cuda_extension() -> ModuleType | None:
    """The module ``pyllm._cuda``, or None where it was not built or does not load.

    ``PYLLM_CUDA_EXTENSION`` names another file to load in its place; it is read here, once, and
    ``pyllm/testing/cuda_on_cpu.py`` builds one. A module whose ``ON_CPU`` is
    true has the kernels compiled for the CPU, for tests: they run on CPU tensors only.

    Raises:
        ValueError: the file that ``PYLLM_CUDA_EXTENSION`` names does not load.
    """
    other_build = os.environ.get("PYLLM_CUDA_EXTENSION")
    try:
        return _load("pyllm._cuda", other_build)
    except ImportError as error:
        if other_build:
            raise ValueError(
                f"PYLLM_CUDA_EXTENSION={other_build!r} does not load as pyllm._cuda "
                f"({error}); build it again, or unset PYLLM_CUDA_EXTENSION for the installed one"
            ) from None
        return None


def cuda_on_cpu() -> bool:
    """Are the CUDA kernels here those that run on the CPU?"""
    module = cuda_extension()
    return module is not None and bool(module.ON_CPU)


def cuda_missing_reason() -> str | None:
    """Why there is no ``pyllm._cuda``, in a few words; None where there is one."""
    if cuda_extension() is not None:
        return None
    if importlib.util.find_spec("pyllm._cuda") is not None:
        return "its extension does not load"
    if _CUDA_FAILURE_FILE.exists():
        return "it did not build when pyllm was installed"
    return "it was never built here"


def cuda_build_output() -> str | None:
    """What the failed build of ``pyllm._cuda`` printed; None where no build failed."""
    if not _CUDA_FAILURE_FILE.exists():
        return None
    return _CUDA_FAILURE_FILE.read_text(encoding="utf-8", errors="replace").strip()


def _load(name: str, other_build: str | None) -> ModuleType:
    if not other_build:
        return importlib.import_module(name)
    # A loader of its own: from a path, importlib picks one by how the name ends.
    loader = ExtensionFileLoader(name, other_build)
    spec = importlib.util.spec_from_file_location(name, other_build, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
