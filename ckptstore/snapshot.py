"""From live objects to what is saved, and back into them in place."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .errors import NotSerializable, StateMismatch

__all__ = ["Plan", "may_be_part", "refuse_parts", "restore", "to_state"]


def to_state(obj: Any) -> Any:
    """Return `obj` with each value that has a ``state_dict()`` replaced by it, at the top and inside nested containers.

    Containers are exactly dict, OrderedDict, list, tuple and named tuples; other objects are left alone, and so is whatever a
    ``state_dict()`` returned. What holds nothing to replace is returned itself, not copied; an object that occurs twice is asked
    once; cycles are kept. Exceptions of a ``state_dict()`` propagate.
    """
    return _Replacer(obj).replace(obj)


class _Replacer:
    def __init__(self, obj: Any) -> None:
        self._changing = _holders(obj)
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []  # keeps ids from being reused while they are keys above

    def replace(self, obj: Any) -> Any:
        key = id(obj)
        if key in self._done:
            return self._done[key]
        if _has(obj, "state_dict"):
            return self._remember(obj, obj.state_dict())
        if key not in self._changing:
            return obj
        if isinstance(obj, dict):
            copy = self._remember(obj, type(obj)())
            copy.update((k, self.replace(v)) for k, v in obj.items())
            return copy
        if isinstance(obj, list):
            items = self._remember(obj, [])
            items.extend(self.replace(v) for v in obj)
            return items
        parts = [self.replace(v) for v in obj]
        if key in self._done:  # a cycle through this tuple made it already
            return self._done[key]
        return self._remember(obj, type(obj)._make(parts) if hasattr(type(obj), "_make") else tuple(parts))

    def _remember(self, obj: Any, result: Any) -> Any:
        self._alive.append(obj)
        self._done[id(obj)] = result
        return result


def _holders(obj: Any) -> set[int]:
    """Return the ids of the containers below `obj` from which something with a ``state_dict()`` can be reached."""
    parents: dict[int, list[int]] = {}
    found: list[int] = []
    queue = [obj] if _is_container(obj) else []
    seen: set[int] = set()
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for part in node.values() if isinstance(node, dict) else node:
            if type(part) in _ATOMS:  # most of what there is, but for tensors
                continue
            if _has(part, "state_dict"):
                found.append(id(part))
            elif _is_container(part):
                queue.append(part)
            else:
                continue
            parents.setdefault(id(part), []).append(id(node))
    holders: set[int] = set()
    while found:
        for parent in parents.get(found.pop(), ()):
            if parent not in holders:
                holders.add(parent)
                found.append(parent)
    return holders


_ATOMS = frozenset({bool, int, float, str, bytes, type(None)})


def refuse_parts(state: Any) -> None:
    """Refuse a state of which this process has only its own part: what is loaded elsewhere would be wrong, and nobody would notice.

    Raises:
        NotSerializable: says where.
    """
    if not _SHARDED & sys.modules.keys() or not any(map(may_be_part, _kinds(state))):
        return
    queue = [("obj", state)]
    seen: set[int] = set()
    while queue:
        path, node = queue.pop()
        if isinstance(node, dict):
            parts: Iterable[tuple[Any, Any]] = node.items()
        elif isinstance(node, (list, tuple)):
            parts = enumerate(node)
        elif _is_part(node):
            kind, mine = ("DTensor", "to_local()") if hasattr(node, _DTENSOR) else ("ShardedTensor", "local_shards()")
            raise NotSerializable(
                f"{path} is a {kind} of which each rank has a part, and this would save one rank's; save with "
                "dcp.save(state, storage_writer=store.dcp_writer(…)), or a full state dict (StateDictOptions(full_state_dict=True)), "
                f"or {mine} of it on every rank, under names of their own"
            )
        else:
            continue
        if id(node) not in seen:
            seen.add(id(node))
            queue += [(f"{path}[{key!r}]", part) for key, part in parts]


_SHARDED = {"torch.distributed.tensor", "torch.distributed._shard.sharded_tensor"}
_DTENSOR, _OLDER = "full_tensor", "local_shards"
"""What `DTensor` has, and what `ShardedTensor` has, which came before it."""


def may_be_part(kind: type) -> bool:
    """Whether a value of this class may be one of which each rank has a part."""
    return hasattr(kind, _DTENSOR) or hasattr(kind, _OLDER)


def _is_part(value: Any) -> bool:
    if hasattr(type(value), _DTENSOR):
        return value.device_mesh.size() > 1 and not all(p.is_replicate() for p in value.placements)
    return hasattr(type(value), _OLDER) and len(value.local_shards()) < len(value.metadata().shards_metadata)


def _kinds(obj: Any) -> set[type]:
    """Return the classes of what is in nested containers."""
    kinds = {type(obj)}
    queue = [obj] if isinstance(obj, (dict, list, tuple)) else []
    seen: set[int] = set()
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        parts = list(node.values()) if isinstance(node, dict) else node
        kinds.update(map(type, parts))
        queue += [part for part in parts if isinstance(part, (dict, list, tuple))]
    return kinds


def _has(obj: Any, method: str) -> bool:
    return not isinstance(obj, type) and callable(getattr(obj, method, None))


def _is_container(obj: Any) -> bool:
    return type(obj) in (dict, OrderedDict, list, tuple) or (isinstance(obj, tuple) and hasattr(type(obj), "_make"))


def restore(target: Any, state: Any) -> None:
    """Put `state`, as `to_state` made it, back into the objects of `target`, in place.

    Values with a ``load_state_dict`` are given theirs; tensors are copied into (under no_grad); other values inside a dict or
    list are replaced by the saved ones. The keys of `target` say what is wanted: more keys in `state` are ignored, except in a
    nested dict or list of plain values, which then holds exactly what was saved.

    Raises:
        StateMismatch: something is missing or of another kind, shape or dtype: all of it is listed by path, and nothing was
            changed. Or a ``load_state_dict`` or a copy failed: the path is named, and what came before it has been restored.
    """
    Plan(target, state).carry_out()


class Plan:
    """How `restore` is to put `state` into `target`, of which nothing has been changed. No tensor has been looked into.

    Raises:
        StateMismatch: they are nested too deeply.
    """

    def __init__(self, target: Any, state: Any) -> None:
        self.state = state
        self.given: list[tuple[Any, Any]] = []
        """Each target, None if it is a plain value, and the part of the state that it is to get, and may hold on to from then on. What is
        copied into a tensor is not here."""
        self._actions: list[tuple[str, Callable[[], object]]] = []
        self._problems: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._plain = _Plainness()
        try:
            self._visit(target, state, "")
        except RecursionError as exc:
            raise StateMismatch(
                "the objects are nested too deeply to be restored in place; load() returns what was saved"
            ) from exc

    def check(self) -> None:
        """Raise `StateMismatch` if something does not fit."""
        if self._problems:
            raise StateMismatch("the saved state does not fit: " + "; ".join(self._problems))

    def carry_out(self) -> None:
        """Do it. Raises `StateMismatch` as `restore`."""
        self.check()
        for path, act in self._actions:
            try:
                act()
            except Exception as exc:
                reason = " ".join(str(exc).split())  # torch's reasons have many lines
                raise StateMismatch(f"{path or 'the object'} could not take its saved state: {reason}") from exc

    def _visit(self, target: Any, state: Any, path: str) -> None:
        """Plan to restore `target`, which is not plain, or the top, from `state`."""
        if (id(target), id(state)) in self._seen:
            return
        self._seen.add((id(target), id(state)))
        if _has(target, "load_state_dict"):
            self.given.append((target, state))
            self._actions.append((path, lambda: target.load_state_dict(state)))
        elif _is_tensor(target):
            self._tensor(target, state, path)
        elif isinstance(target, dict):
            if self._kind(isinstance(state, Mapping), "dict", state, path):
                self._dict(target, state, path)
        elif isinstance(target, (list, tuple)):
            if self._kind(isinstance(state, (list, tuple)), type(target).__name__, state, path):
                self._sequence(target, state, path)
        else:
            self._problems.append(f"{path or 'the object'} ({type(target).__name__}) cannot be restored in place")

    def _kind(self, right: bool, wanted: str, state: Any, path: str) -> bool:
        if not right:
            self._problems.append(f"{path or 'the object'} is a {wanted}, but a {type(state).__name__} was saved")
        return right

    def _tensor(self, target: Any, state: Any, path: str) -> None:
        import torch

        if not self._kind(_is_tensor(state), "tensor", state, path):
            return
        if torch.nn.parameter.is_lazy(target) or torch.nn.parameter.is_lazy(state):
            self._problems.append(f"{path or 'the tensor'} has no shape yet, here or where it was saved; run the model once")
            return
        nested = target.is_nested and state.is_nested  # whose own shape, if they have one, never equals another's
        for what in ("dtype", "layout") if nested else ("is_nested", "shape", "dtype", "layout"):
            wanted, saved = getattr(target, what), getattr(state, what)
            if wanted != saved:
                self._problems.append(f"{path or 'the tensor'} has {what} {_text(wanted)}, but {_text(saved)} was saved")
                return
        if target.is_meta:
            self._problems.append(f"{path or 'the tensor'} is on the meta device and has no memory to restore into")
            return
        if nested:
            self._sequence(target.detach().unbind(), state.detach().unbind(), path)
            return
        self._actions.append((path, torch.no_grad()(lambda: target.copy_(state))))

    def _dict(self, target: dict[Any, Any], state: Mapping[Any, Any], path: str) -> None:
        for key, value in target.items():
            here = f"{path}[{key!r}]"
            if key not in state:
                self._problems.append(f"{here} is missing from the saved state")
            elif self._plain(value):
                self._replace(target, key, value, state[key], here)
            else:
                self._visit(value, state[key], here)

    def _sequence(self, target: list[Any] | tuple[Any, ...], state: Any, path: str) -> None:
        if len(target) != len(state):
            self._problems.append(f"{path or 'the object'} has {len(target)} items, but {len(state)} were saved")
            return
        for index, (value, saved) in enumerate(zip(target, state, strict=True)):
            here = f"{path}[{index}]"
            if not self._plain(value):
                self._visit(value, saved, here)
            elif isinstance(target, list):
                self._replace(target, index, value, saved, here)
            elif value is not saved and not (type(value) is type(saved) and isinstance(value, _SCALARS) and value == saved):
                self._problems.append(f"{here} differs from what was saved, and a tuple cannot be changed in place")

    def _replace(self, target: Any, key: Any, value: Any, saved: Any, path: str) -> None:
        """Plan to put the plain value `saved` in the place of `value`; into the same dict or list, if it is one."""
        self.given.append((None, saved))
        if isinstance(value, dict) and isinstance(saved, dict):
            missing = [f"{path}[{k!r}]" for k in value if k not in saved]
            self._problems += [f"{p} is missing from the saved state" for p in missing]
            self._actions += [(path, value.clear), (path, lambda: value.update(saved))]
        elif isinstance(value, list) and isinstance(saved, list):
            self._actions.append((path, lambda: value.__setitem__(slice(None), saved)))
        else:
            self._actions.append((path, lambda: target.__setitem__(key, saved)))


_SCALARS = (type(None), bool, int, float, complex, str, bytes)


class _Plainness:
    """Tells whether nothing in a value has to be restored by itself. Remembers answers; cycles count as plain."""

    def __init__(self) -> None:
        self._known: dict[int, bool] = {}

    def __call__(self, value: Any) -> bool:
        if id(value) not in self._known:
            self._known[id(value)] = True
            plain = not (_has(value, "load_state_dict") or _is_tensor(value))
            self._known[id(value)] = plain and all(self(part) for part in _parts(value))
        return self._known[id(value)]


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
