"""What is in a state at one moment, but for the bytes of its tensors.

Everything that is no tensor is pickled at once, so that later changes do not reach it. Of the tensors it is noted how each lies in its
storage; the storages are told to the caller, who copies them. From the copies the state is built anew, to be saved.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import compress
from operator import attrgetter, not_
from typing import Any

import torch

from .errors import ChangedWhileSaving, NotSerializable
from .plaintensor import are_plain, have_attributes
from .snapshot import may_be_part, refuse_parts
from .unpicklable import refusal

__all__ = ["Capture"]

_PROTOCOL = torch.serialization.DEFAULT_PROTOCOL
"""That of torch.save: objects may pickle themselves differently with another."""


class Capture:
    """The structure of `obj`, which `snapshot.to_state` has made, as it is now.

    Args:
        steady: ids of storages, over which no tensor changes, nor how it lies there, before `complete` has returned.

    Raises:
        NotSerializable: `torch.save` could not write it, or it has only a part of a sharded tensor; see `snapshot.refuse_parts`.
        Exception: whatever a ``__reduce__`` or ``__getstate__`` inside `obj` raised.
    """

    def __init__(self, obj: Any, steady: AbstractSet[int] = frozenset()) -> None:
        # The training waits, perhaps with thousands of tensors. So what must be known of each is asked for all of them in one go,
        # without Python between one and the next, and only if one is not plain is each looked at before it is taken for a leaf.
        # Of those that are steady it is asked later, by the thread that saves.
        tensors: list[torch.Tensor] = []
        bare: list[tuple[torch.UntypedStorage, torch.dtype | None]] = []
        self._structure = _pickled(obj, tensors, bare, careful=False)
        plain = _storages_of(tensors, steady)
        if plain is None:
            tensors, bare = [], []
            self._structure = _pickled(obj, tensors, bare, careful=True)
            storages = list(map(torch.Tensor.untyped_storage, tensors))
            keys, devices, waits = list(map(id, storages)), set(map(_device, storages)), [False] * len(storages)
        else:
            storages, keys, devices, waits = plain
        for storage, _ in bare:
            storages.append(storage)
            keys.append(id(storage))
            devices.add(storage.device)
        # torch returns the same object for the same storage while one is alive, and here it is.
        self._keys = keys
        unique = dict(zip(keys, storages, strict=True))
        self.storages = list(unique.values())
        """Each once. They are the live ones."""
        self.numbers = dict(zip(unique, range(len(unique)), strict=True))
        """The place of each in `storages`, by its id."""
        self.devices = devices
        """Where they are."""
        self._waits = waits
        """Of each tensor, whether it is steady."""
        self._tensors = list(compress(tensors, waits))
        """Those that are."""
        # How one lies that is not steady may change as soon as this returns, without another storage: by t_(), for one.
        self._layouts = _layouts_of(_others(tensors, waits))
        self._later = _layouts_of([])
        self._whole: dict[int, tuple[Capture, list[int]]] = {}
        """Tensors that are told by more than how they lie, by their place, each with the numbers of its storages."""
        self._behind: list[int] = []  # of those of the tensors, then of those that stand for themselves
        self._bare = [dtype for _, dtype in bare]

    def complete(self) -> None:
        """Take what is steady, and let go of all that is live. Call it while nobody has let go of the storages, and none has changed.

        Raises:
            ChangedWhileSaving: a tensor has another storage now.
            NotSerializable: a tensor that is steady has memory of its own behind that.
        """
        if self._behind or not self._keys:
            return
        tensors, self._tensors = self._tensors, []
        if tensors:
            places = [place for place, waits in enumerate(self._waits) if waits]
            if list(map(id, map(torch.Tensor.untyped_storage, tensors))) != [self._keys[place] for place in places]:
                raise ChangedWhileSaving(
                    "a tensor was given other memory (.data = …) after save_async and before the next step, so nothing was published; "
                    "do that before save_async or after the step, or save without optimizer="
                )
            if not are_plain(tensors):
                self._take_whole(tensors, places)
            self._later = _layouts_of(tensors)
        self._behind = list(map(self.numbers.__getitem__, self._keys))
        self.forget_live()

    def _take_whole(self, tensors: list[torch.Tensor], places: Sequence[int]) -> None:
        for nth, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
            if not are_plain([tensor]):
                whole = Capture(tensor)
                numbers = [self.numbers[key] for key in map(id, whole.storages) if key in self.numbers]
                if len(numbers) < len(whole.storages):
                    raise NotSerializable(
                        "a parameter, or a state of an optimizer, has several storages; save without optimizer="
                    )
                whole.complete()
                self._whole[place] = whole, numbers
                tensors[nth] = torch.empty(0, device="cpu")  # nobody asks how it lies

    def forget_live(self) -> None:
        """Let go of the live storages: they have been copied, or somebody else holds them."""
        self.storages = []

    def rebuild(self, copies: Sequence[torch.UntypedStorage]) -> Any:
        """Return an object that `torch.save` writes as it would have written the state, over `copies` of the storages.

        Raises:
            NotSerializable: something in it can be pickled, but not unpickled, or the memory of a tensor had been freed.
        """
        empty = [copy for copy in copies if not copy.nbytes()]
        bare = ((copies[number], dtype) for number, dtype in zip(self._behind[-len(self._bare) :], self._bare, strict=True))
        try:
            state = _Unpickler(io.BytesIO(self._structure), self._rebuilt(copies), bare if self._bare else iter(())).load()
        except Exception as exc:
            raise NotSerializable(f"something in the state can be pickled, but not loaded again: {exc}") from exc
        if any(copy.nbytes() for copy in empty):  # torch has given a tensor the memory that it was told of
            raise NotSerializable("a tensor reaches beyond its storage, which is empty; save it while its memory is there")
        return state

    def _rebuilt(self, copies: Sequence[torch.UntypedStorage]) -> Iterator[torch.Tensor]:
        now, later = zip(*self._layouts, strict=True), zip(*self._later, strict=True)
        for place, (number, waits) in enumerate(zip(self._behind, self._waits)):  # noqa: B905  # bare ones follow
            dtype, offset, shape, stride = next(later if waits else now)
            if place in self._whole:
                whole, numbers = self._whole[place]
                yield whole.rebuild([copies[n] for n in numbers])
            else:
                yield torch.empty(0, dtype=dtype, device="cpu").set_(copies[number], offset, shape, stride)


def _storages_of(
    tensors: Sequence[torch.Tensor], steady: AbstractSet[int]
) -> tuple[list[torch.UntypedStorage], list[int], set[torch.device], list[bool]] | None:
    """Return the storage of each, the ids of these, their devices, and which are steady; None if one tensor is not plain.

    Those over steady storages are only asked for what may change all the same.
    """
    try:
        storages = list(map(torch.Tensor.untyped_storage, tensors))
    except RuntimeError:  # some have none
        return None
    keys, devices = list(map(id, storages)), set(map(_device, storages))
    waits = list(map(steady.__contains__, keys))
    plain = are_plain(_others(tensors, waits)) and not have_attributes(tensors)
    if not plain or any(d.type not in ("cpu", "cuda") for d in devices):
        return None
    return storages, keys, devices, waits


def _others(tensors: Sequence[torch.Tensor], waits: Sequence[bool]) -> list[torch.Tensor]:
    return list(compress(tensors, map(not_, waits)))


_device = attrgetter("device")
_LAYOUT: tuple[Callable[[torch.Tensor], Any], ...] = (
    attrgetter("dtype"),
    torch.Tensor.storage_offset,
    attrgetter("shape"),
    torch.Tensor.stride,
)


def _layouts_of(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    return [list(map(ask, tensors)) for ask in _LAYOUT]


def _pickled(obj: Any, tensors: list[torch.Tensor], bare: list[tuple[Any, Any]], *, careful: bool) -> bytes:
    """Return `obj` pickled, with a leaf for each tensor and each storage, which are added to the lists in the order of the leaves.

    Args:
        careful: look first whether a tensor is plain.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, _PROTOCOL)
    found, plain = tensors.append, torch.Tensor
    looked = False

    def reduced(part: Any) -> Any:
        nonlocal looked
        if type(part) is plain and not (careful and not are_plain([part])):
            found(part)
            return _TENSOR
        if isinstance(part, torch.UntypedStorage):
            bare.append((part, None))
            return _STORAGE
        if isinstance(part, torch.TypedStorage):
            bare.append((part._untyped_storage, part.dtype))  # the public `untyped` warns that it will change
            return _STORAGE
        if may_be_part(type(part)) and not looked:
            refuse_parts(obj)  # all there are, in one go
            looked = True
        return NotImplemented

    pickler.reducer_override = reduced
    try:
        pickler.dump(obj)
    except NotSerializable:
        raise
    except Exception as exc:
        problem = refusal(exc, obj)
        if problem is None:
            raise
        raise NotSerializable(problem) from exc
    finally:
        del pickler.reducer_override  # which holds what is live
    return file.getvalue()


class _Pickler(pickle.Pickler):
    reducer_override: Any


def _tensor() -> Any:
    """Stand for the next tensor in the pickle, which only `_Unpickler` reads."""
    raise NotImplementedError


def _storage() -> Any:
    """Stand for the next storage."""
    raise NotImplementedError


_TENSOR, _STORAGE = (_tensor, ()), (_storage, ())


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Iterator[torch.Tensor], bare: Iterator[tuple[Any, ...]]) -> None:
        super().__init__(file)

        # Not methods: the unpickler remembers what it has looked up, and so would keep itself, and the copies with it.
        def tensor() -> Any:
            return next(tensors)

        def storage() -> Any:
            copy, dtype = next(bare)
            if dtype is None:
                return copy
            return torch.TypedStorage(wrap_storage=copy, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

        self._leaves = {_tensor.__name__: tensor, _storage.__name__: storage}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_over_untyped
        return self._leaves[name] if module == __name__ else super().find_class(module, name)


def _rebuild_over_untyped(storage: torch.UntypedStorage, *layout: Any) -> torch.Tensor:
    """Do as torch for a dtype without a storage class of its own: it writes the untyped storage, but wants a typed one back."""
    typed = torch.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)  # type: ignore[no-untyped-call]
    return torch._utils._rebuild_tensor_v3(typed, *layout)  # type: ignore[no-untyped-call, no-any-return]
