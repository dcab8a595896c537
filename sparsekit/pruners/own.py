"""What tells a criterion of one's own from another of the same name: its class, its code and what it holds."""

from __future__ import annotations

import dis
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import resolve_name
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..criteria import CRITERIA, Criterion

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device)
_TOLD = (*_PLAIN, Tensor, list, tuple, set, frozenset, dict, FunctionType, type, partial)
_PARTS = {
    MethodType: ("__func__", "__self__"),
    partial: ("func", "args", "keywords"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
}
_OF_A_CLASS = {"__module__", "__qualname__"}  # its name, which is told already


def identity(method: str | Criterion) -> dict[str, str | None]:
    """What must be the same for two runs to be by the same criterion, by the name to say it by; None for a method of sparsekit's.

    The code is that of its class, and of what that calls of the same top-level package, by what the interpreter made of it: neither
    where it stands nor its comments matter. A criterion that has an attribute ``version`` is told by that in its place."""
    if isinstance(method, str) or CRITERIA.get(method.name) is method:
        return {"class of the criterion": None, "code of the criterion": None, "state of the criterion": None}
    kind, version = type(method), getattr(method, "version", None)
    code = (
        f"{_Told().hash(kind)} of Python {sys.version_info[0]}.{sys.version_info[1]}" if version is None else f"version {version}"
    )
    state = ", ".join(f"{name} = {_short(value)}" for name, value in _held(method).items())
    return {"class of the criterion": _named(kind), "code of the criterion": code, "state of the criterion": state}


def _short(value: Any) -> str:
    """As a reader knows it, or a hash."""
    text = repr(value) if isinstance(value, _PLAIN) else ""
    return text if 0 < len(text) <= 40 else f"{type(value).__name__} {_Told().hash(value)}"


class _Told:
    """Values, functions and classes as text that is the same in another process, addresses left out."""

    def __init__(self):
        self._root: str | None = None  # the top-level package whose code is followed: that of the function or class met first
        self._met: set[Any] = set()  # functions and classes that are told already
        self._within: list[Any] = []  # what is being told

    def hash(self, value: Any) -> str:
        return hashlib.sha256(self._tell(value).encode()).hexdigest()[:12]

    def _tell(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, FunctionType | type):
            return self._followed(value)
        if isinstance(value, ModuleType | BuiltinFunctionType):
            return value.__name__
        if any(value is one for one in self._within):
            return "itself"
        self._within.append(value)
        text = f"{_named(type(value))}({self._parts(value)})"
        self._within.pop()
        return text

    def _parts(self, value: Any) -> str:
        each = partial(map, self._tell)
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            return self._tell([str(value.dtype), tuple(value.shape), raw])
        if isinstance(value, np.ndarray | np.generic):
            return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
        if isinstance(value, list | tuple):
            return ",".join(each(value))
        if isinstance(value, set | frozenset):
            return ",".join(sorted(each(value)))
        if isinstance(value, Mapping):
            return ",".join(sorted(each(value.items())))
        if isinstance(value, CodeType):
            return self._tell([value.co_code, value.co_consts, value.co_names, value.co_varnames, value.co_freevars])
        parts = next((parts for kind, parts in _PARTS.items() if isinstance(value, kind)), None)
        return self._tell([getattr(value, part) for part in parts] if parts else _held(value))

    def _followed(self, thing: FunctionType | type) -> str:
        """Its name; and of the package whose code is followed, once, what it is made of."""
        root = str(thing.__module__).partition(".")[0]
        if self._root not in (None, root) or thing in self._met:
            return _named(thing)
        self._met.add(thing)
        before, self._root = self._root, root
        text = f"{_named(thing)}{self._tell(_of_class(thing) if isinstance(thing, type) else _of_function(thing, root))}"
        self._root = before
        return text


def _of_function(function: FunctionType, root: str) -> list[Any]:
    """Its code, and the values of what that looks up by name, in modules of the package ``root`` too, but for objects, which may be
    anything."""
    names, spaces = sorted(_names(function.__code__)), {"": function.__globals__}
    used = {}
    for held in _imported(function, root):
        spaces[held.__name__], used[f"{held.__name__}."] = vars(held), None
    while spaces:
        where, known = spaces.popitem()
        for name in (name for name in names if name in known):
            held = known[name]
            if isinstance(held, ModuleType) and held.__name__.partition(".")[0] == root and f"{held.__name__}." not in used:
                spaces[held.__name__], used[f"{held.__name__}."] = vars(held), None
            used[f"{where}.{name}"] = held if isinstance(held, _TOLD) else _named(type(held))
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, cells, used]


def _of_class(kind: type) -> list[Any]:
    own = {name: held for name, held in vars(kind).items() if name not in _OF_A_CLASS and (name[:2] != "__" or callable(held))}
    return [own, kind.__bases__]


def _held(value: Any) -> dict[str, Any]:
    """What an object has of its own."""
    each = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    slots = [slot for slots in each for slot in ((slots,) if isinstance(slots, str) else slots)]
    return {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)} | getattr(value, "__dict__", {})


def _names(code: CodeType) -> set[str]:
    """The names that the code and what stands within it looks up."""
    return {*code.co_names}.union(*(_names(held) for held in code.co_consts if isinstance(held, CodeType)))


def _imported(function: FunctionType, root: str) -> Iterator[ModuleType]:
    """The modules of the package ``root`` that an import within the function's body names: brought here, as when it runs, so that
    before its first run it is told as after it."""
    package = function.__globals__.get("__package__") or ""
    for level, name, wanted in _imports(function.__code__):
        try:
            whole = resolve_name(f"{'.' * level}{name}", package)
        except ImportError:  # relative, in what is in no package: it fails as it runs
            continue
        if whole.partition(".")[0] != root:
            continue
        for each in (whole, *(f"{whole}.{part}" for part in wanted or ())):
            with suppress(ImportError):  # what it names may be no module, or one that is not there
                yield import_module(each)


def _imports(code: CodeType) -> Iterator[tuple[int, str, tuple[str, ...] | None]]:
    """Of each import in the code, and in what stands within it: the dots before the module, its name, what is taken of it."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]  # as long code has before the others
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":  # behind the two constants that it takes
            yield steps[i - 2].argval, step.argval, steps[i - 1].argval
    for held in code.co_consts:
        if isinstance(held, CodeType):
            yield from _imports(held)


def _named(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
