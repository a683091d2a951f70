"""Mistakes on purpose in the protocol's code: a step left out, two steps swapped, a check dropped, one at a time. See `mutant_runs`."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ckptstore

__all__ = ["MODULES", "PACKAGE", "Mutant", "mutants_of"]

PACKAGE = Path(ckptstore.__file__).parent
_PROTOCOL = (
    "test_log.py",
    "test_store.py",
    "test_together.py",
    "test_fencing.py",
    "test_retention.py",
    "test_retry.py",
    "test_lost_answers.py",
)
_FOLDER = ("test_local.py", "test_local_flushes.py", "test_conformance.py", "test_hostile.py", "test_damage.py")
_FORMAT = ("test_envelope.py", "test_store.py", "test_hmac.py", "test_forged.py", "test_damage.py", "test_fuzz.py", "test_log.py")
_SHARED = (
    "test_shared.py",
    "test_shared_answers.py",
    "test_shared_faults.py",
    "test_shared_refusals.py",
    "test_shared_tries.py",
    "test_shared_writers.py",
    "test_local_flushes.py",
)

MODULES: dict[str, tuple[str, ...]] = {
    "log.py": (*_PROTOCOL, "test_bases.py", "test_damage.py", "test_hmac.py", "test_protocol_model.py", "test_forged.py"),
    "epoch.py": (*_PROTOCOL, "test_damage.py", "test_protocol_model.py"),
    "bases.py": ("test_bases.py", "test_log.py", "test_store.py"),
    "gc.py": (
        "test_store.py",
        "test_bases.py",
        "test_damage.py",
        "test_retention.py",
        "test_lost_answers.py",
        "test_protocol_model.py",
    ),
    "transaction.py": ("test_transaction.py", *_PROTOCOL, "test_interrupted.py", "test_crash_states.py"),
    "engine.py": ("test_engine.py", *_PROTOCOL, "test_damage.py", "test_hmac.py", "test_forged.py", "test_loading.py"),
    "retention.py": ("test_retention.py", "test_store.py"),
    "backends/local.py": (*_FOLDER, "test_crash_states.py", "test_every_call.py", "test_store.py"),
    "folder.py": (*_FOLDER, "test_crash_states.py", "test_every_call.py", "test_store.py", "test_fuzz.py"),
    "posix.py": (*_FOLDER, *_SHARED, "test_atomic.py", "test_crash_states.py", "test_every_call.py"),
    "backends/_shared_names.py": (
        "test_shared_answers.py",
        "test_shared_faults.py",
        "test_shared_tries.py",
        "test_shared_writers.py",
    ),
    "backends/shared.py": (*_SHARED, "test_conformance.py", "test_store.py"),
    "transfer.py": ("test_parts.py", "test_store.py", "test_interrupted.py", "test_damage.py", "test_hmac.py"),
    "reading.py": ("test_reading.py", "test_store.py", "test_damage.py", "test_hmac.py", "test_hostile.py"),
    "verifiedfile.py": ("test_reading.py", "test_store.py", "test_checkedfile.py"),
    "workers.py": ("test_workers.py", "test_parts.py", "test_together.py", "test_interrupted.py", "test_store.py"),
    "manifest.py": _FORMAT,
    "record.py": (*_FORMAT, "test_retention.py"),
    "envelope.py": _FORMAT,
}
"""The protocol's modules, each with the test files that are to notice a mistake in it, those that mostly do first."""

_DECIDING = ("log.py", "epoch.py", "gc.py", "transaction.py", "engine.py", "retention.py")
"""What decides over whole checkpoints: here, each condition counts, not only those that raise."""


@dataclass(frozen=True)
class Mutant:
    """One module with one mistake."""

    module: str
    what: str
    """The function, and what is wrong in it; unique within the module."""
    lines: tuple[int, int]
    """First and last line of what was changed, as the module is."""
    make: Callable[[], ast.Module]

    @property
    def source(self) -> str:
        """The module with the mistake."""
        return ast.unparse(ast.fix_missing_locations(self.make()))

    @property
    def key(self) -> str:
        return f"{self.module}: {self.what}"


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yield a module's mutants, in the order of its lines."""
    text = (PACKAGE / module).read_text()
    seen: Counter[str] = Counter()
    for what, lines, make in _mistakes(text, thorough=module in _DECIDING):
        seen[what] += 1
        yield Mutant(module, what if seen[what] == 1 else f"{what} (number {seen[what]})", lines, make)


_Mistake = tuple[str, tuple[int, int], Callable[[], ast.Module]]


def _mistakes(text: str, *, thorough: bool) -> Iterator[_Mistake]:
    for number, (where, block) in enumerate(_blocks(ast.parse(text), "")):

        def mistake(
            what: str, one: slice, change: _Change, where: str = where, number: int = number, block: list[ast.stmt] = block
        ) -> _Mistake:
            lines = block[one][0].lineno, block[one][-1].end_lineno or 0
            return f"{where}: {what}", lines, partial(_changed, text, number, one, change)

        for i, statement in enumerate(block):
            if _is_step(statement):
                yield mistake(f"without {_text(statement)}", slice(i, i + 1), lambda _: [ast.Pass()])
            if isinstance(statement, ast.If) and _is_check(statement, thorough):
                what = f"without the check {_text(statement.test)}"
                yield mistake(what, slice(i, i + 1), lambda one: one[0].orelse or [ast.Pass()])
            if i and _can_swap(block[i - 1], statement):
                what = f"{_text(statement)} before {_text(block[i - 1])}"
                yield mistake(what, slice(i - 1, i + 1), lambda two: two[::-1])
    if thorough:
        yield from _conditions(text)


_Change = Callable[[list[Any]], list[Any]]


def _changed(text: str, number: int, where: slice, change: _Change) -> ast.Module:
    tree = ast.parse(text)
    block = list(_blocks(tree, ""))[number][1]
    block[where] = change(block[where])
    return tree


def _conditions(text: str) -> Iterator[_Mistake]:
    """Leave out one side of an ``and`` or an ``or``."""
    for number, (where, condition) in enumerate(_alternatives(ast.parse(text), "")):
        for i, side in enumerate(condition.values):
            lines = condition.lineno, condition.end_lineno or 0
            yield f"{where}: without {_text(side)} in {_text(condition)}", lines, partial(_without_side, text, number, i)


def _without_side(text: str, number: int, side: int) -> ast.Module:
    tree = ast.parse(text)
    del list(_alternatives(tree, ""))[number][1].values[side]
    return tree


def _alternatives(node: ast.AST, where: str) -> Iterator[tuple[str, ast.BoolOp]]:
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inside = f"{where}.{child.name}" if where else child.name
        if isinstance(child, ast.BoolOp):
            yield inside, child
        yield from _alternatives(child, inside)


def _blocks(node: ast.AST, where: str) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Yield all lists of statements that are in functions, with the functions' names."""
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inside = f"{where}.{child.name}" if where else child.name
        if not isinstance(child, ast.ClassDef) and inside:
            for field in ("body", "orelse", "finalbody"):
                block = getattr(child, field, None)
                if isinstance(block, list):
                    yield inside, block
        yield from _blocks(child, inside)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def _is_step(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _is_check(node: ast.If, thorough: bool) -> bool:
    """An ``if`` that raises, or leaves in another way."""
    return isinstance(node.body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break) if thorough else ast.Raise)


def _can_swap(first: ast.stmt, second: ast.stmt) -> bool:
    """Two simple statements that call something or change an attribute, of which the second does not need a variable of the first."""
    if not (_acts(first) and _acts(second) and (_is_step(first) or _is_step(second))):
        return False
    made = {n.id for n in ast.walk(first) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return not any(isinstance(n, ast.Name) and n.id in made for n in ast.walk(second))


def _acts(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(n, ast.Call) for n in ast.walk(node)) or any(
            isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets
        )
    return _is_step(node) or isinstance(node, ast.Delete)
