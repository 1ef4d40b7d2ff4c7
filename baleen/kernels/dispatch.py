"""Loads the implementation of an op at its first call and keeps it: one choice per process and device, one indirection
per call.

A CPU always runs the reference, which is written for it; a GPU the first one listed that can be loaded. An
implementation takes every input of the contract: what its library cannot do it hands to the reference. Knows names and
import paths only; it must not know any op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

CHOICES = ("auto", "reference")

_choice = "auto"
_pinned: Mapping[str, str] = {}
_ops: list[Op] = []


class Op:
    """One function of an op's folder, bound to an implementation when first called with a tensor on a device.

    implementations  name -> "module:function", in order of preference; must hold "reference"
    function         the function's name where it is not the one written there (a folder with several functions lists
                     its main one); an implementation whose module lacks it leaves it to the next
    """

    __slots__ = ("_bound", "_function", "_implementations")

    def __init__(self, implementations: Mapping[str, str], function: str | None = None) -> None:
        self._implementations = implementations
        self._function = function
        self._bound: dict[str, Callable[..., Any]] = {}  # by device type
        _ops.append(self)

    def __call__(self, *args: Any) -> Any:
        device = args[0].device.type
        bound = self._bound.get(device)
        if bound is None:
            bound = self._bound[device] = self._choose(device)
        return bound(*args)

    def _choose(self, device: str) -> Callable[..., Any]:
        folder = self._implementations["reference"].split(":")[0].split(".")[-2:][0]
        if _choice == "reference" or device == "cpu":
            names = ["reference"]
        elif folder in _pinned:
            names = [_pinned[folder], "reference"]
        else:
            names = available(self._implementations)
        for name in names:
            found = find(self._implementations, name, self._function)
            if found is not None:
                return found
        raise ImportError(f"no implementation of {self._function or self._implementations['reference']} can be loaded")

    def forget(self) -> None:
        """Makes the next call choose again."""
        self._bound = {}


def find(implementations: Mapping[str, str], name: str, function: str | None = None) -> Callable[..., Any] | None:
    """The function of the implementation called `name`; None if its module does not define that function."""
    module, main = implementations[name].split(":")
    return getattr(import_module(module), function or main, None)


def available(implementations: Mapping[str, str]) -> list[str]:
    """The implementations whose module can be imported here: one that needs a missing library is left out."""
    names = []
    for name, target in implementations.items():
        try:
            import_module(target.split(":")[0])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("baleen"):
                raise
            continue
        names.append(name)
    return names


def use(choice: str, pinned: Mapping[str, str] | None = None) -> None:
    """Sets which implementations this process runs, for every op, from the next call on.

    choice   "reference": the definitions; "auto": on a GPU, of each op the first one listed that can be loaded
    pinned   op's folder -> the implementation that "auto" takes for it
    Raises:  ValueError if the choice is none of these.
    """
    global _choice, _pinned
    if choice not in CHOICES:
        raise ValueError(f"kernels: {choice!r} is none of {', '.join(CHOICES)}")
    _choice, _pinned = choice, pinned or {}
    for op in _ops:
        op.forget()
