"""Parameters of the operations' tests from their declarations."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.testing.suite import parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operation = getattr(metafunc.cls, "operation", None)
    if operation is None:
        return
    for name in metafunc.fixturenames:
        if name in ("smoke_case", "face", "face_case", "dtype", "mutant", "layout"):
            found = parameters(operation, available_faces(operation.name), name)
            assert found is not None
            metafunc.parametrize(name, found[0], ids=found[1])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Thousands of small calls: waking a second thread costs more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def triton_prepares_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces its whole language anew at each call from kernel to function,
    which is most of the time of a small launch; what the launch has replaced is still in place."""
    interpreter = _interpreter()
    if interpreter is None:
        yield
        return
    replace: Callable[[Any], Any] = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    launch: Any = None
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        """``function`` sees the language as one of two modules, or as both."""
        nonlocal launch
        seen = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        modules = {module.__name__ for module in seen if module in languages}
        running = launch is not None and launch._changes  # emptied where a launch ends
        if running and modules <= replaced:
            return interpreter._LangPatchScope()
        scope = replace(function)
        if not running:
            launch = scope
            replaced.clear()
        replaced.update(modules)
        return scope

    interpreter._patch_lang = replace_once
    yield
    interpreter._patch_lang = replace


def _interpreter() -> Any:
    """Triton's, where it is used, and has the private parts that are meant; else None."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return None
    scope = getattr(interpreter, "_LangPatchScope", None)
    known = all(hasattr(interpreter, name) for name in ("_patch_lang", "tl"))
    known = known and hasattr(scope, "restore")
    return interpreter if known and not torch.cuda.is_available() else None
