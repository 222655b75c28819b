"""One planted fault for each term and index of an operation's textbook, taken from its own source.

Hand-written faults (``faults.py``) are as good as their author's imagination. These are not chosen:
every operator, constant, comparison, call and assignment of ``reference/<op>.py`` is spoilt once,
and a test that does not notice has a hole (mutation analysis: DeMillo, Lipton & Sayward 1978,
"Hints on Test Data Selection"). A change that cannot be seen from outside, such as another chunk
size, is declared with its reason in ``Operation.equivalents``.
"""

import ast
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_OTHER_OPERATOR: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


@dataclass(frozen=True)
class SourceMutant:
    """A module with one place spoilt."""

    name: str
    """Function, expression before and after: ``rms_norm_forward: a + eps -> a - eps``."""
    tree: ast.Module

    def module(self, sound: ModuleType) -> ModuleType:
        """The spoilt module, compiled; ``sound`` lends its name."""
        result = ModuleType(sound.__name__)
        result.__file__ = sound.__file__
        exec(compile(self.tree, f"<{self.name}>", "exec"), vars(result))
        return result


def source_mutants(module: ModuleType) -> list[SourceMutant]:
    """Every spoilt variant of the functions and constants of ``module``; names are unique."""
    tree = ast.parse(inspect.getsource(module))
    mutants: dict[str, SourceMutant] = {}
    for owner, path in _places(tree):
        node = _at(tree, path)
        for replacement in _spoilt(node):
            spoilt = copy.deepcopy(tree)
            _put(spoilt, path, replacement)
            ast.fix_missing_locations(spoilt)
            name = f"{owner}: {_text(node)} -> {_text(replacement)}"
            number = 2
            while name in mutants:  # the same expression twice in one function
                name = f"{owner}: {_text(node)} -> {_text(replacement)} ({number})"
                number += 1
            mutants[name] = SourceMutant(name, spoilt)
    return list(mutants.values())


_Path = tuple[tuple[str, int | None], ...]


def _places(tree: ast.Module) -> Iterator[tuple[str, _Path]]:
    """(name of the function or constant, path to the node) of all code that computes."""
    for index, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef):
            for number, inner in enumerate(statement.body):
                if not _is_docstring(inner):
                    path = (("body", index), ("body", number))
                    yield from _below(statement.name, inner, path)
        elif isinstance(statement, ast.Assign):
            yield from _below(_text(statement.targets[0]), statement, (("body", index),))


def _below(owner: str, node: ast.AST, path: _Path) -> Iterator[tuple[str, _Path]]:
    yield owner, path
    if _is_negative(node):  # -1 is one constant
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "ctx"):
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if isinstance(child, ast.AST):
                step = (name, index if isinstance(value, list) else None)
                yield from _below(owner, child, (*path, step))


def _at(tree: ast.AST, path: _Path) -> ast.AST:
    node: Any = tree
    for name, index in path:
        node = getattr(node, name)
        if index is not None:
            node = node[index]
    return node


def _put(tree: ast.AST, path: _Path, new: ast.AST) -> None:
    parent = _at(tree, path[:-1])
    name, index = path[-1]
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_negative(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def _spoilt(node: ast.AST) -> Iterator[ast.AST]:
    """Every way to spoil this one node, its children untouched."""
    if isinstance(node, ast.BinOp):
        other = _OTHER_OPERATOR.get(type(node.op))
        if other is not None:
            yield ast.BinOp(node.left, other(), node.right)
        yield node.left  # the right term or factor is missing
        yield node.right
    elif _is_negative(node):
        yield ast.Constant(ast.literal_eval(node) - 1)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare):
        other = _OTHER_OPERATOR.get(type(node.ops[0]))
        if other is not None:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Call):
        yield from _missing_call(node)
    elif isinstance(node, ast.Slice):
        if node.lower is not None:
            yield ast.Slice(None, node.upper, node.step)
        if node.upper is not None:
            yield ast.Slice(node.lower, None, node.step)
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        yield ast.Tuple([node.elts[1], node.elts[0], *node.elts[2:]], ast.Load())
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        first, second, *rest = node.targets[0].elts
        yield ast.Assign([ast.Tuple([second, first, *rest], ast.Store())], node.value)
    elif isinstance(node, ast.AugAssign):
        other = _OTHER_OPERATOR.get(type(node.op))
        if other is not None:
            yield ast.AugAssign(node.target, other(), node.value)
        yield ast.Pass()
    elif isinstance(node, ast.Expr):
        yield ast.Pass()
    elif isinstance(node, (ast.If, ast.IfExp)):
        negated = copy.copy(node)
        negated.test = ast.UnaryOp(ast.Not(), node.test)
        yield negated


def _other_constants(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        if value > 1:
            yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value + 1.0)
    elif isinstance(value, str):
        yield ast.Constant(value + "?")


def _missing_call(node: ast.Call) -> Iterator[ast.AST]:
    """``x.f(...)`` and ``module.f(x, ...)`` without f; two arguments of one kind swapped."""
    if isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "F", "math")
    ):
        yield node.func.value
    elif len(node.args) == 1:
        yield node.args[0]
    same = isinstance(node.func, ast.Name) and node.func.id == "max"
    same |= isinstance(node.func, ast.Attribute) and node.func.attr == "transpose"
    if len(node.args) > 1 and not same:
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
