"""Loads the implementation of an op at its first call and keeps it: one choice per process, one indirection per call.

Knows names and import paths only; it must not know any op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

CHOICES = ("auto", "reference")

_choice = "auto"
_ops: list[Op] = []


class Op:
    """One function of an op's folder, bound to an implementation when first called.

    implementations  name -> "module:function", in order of preference; must hold "reference"
    function         the function's name where it is not the one written there (a folder with several functions lists
                     its main one); an implementation whose module lacks it leaves it to the next
    """

    __slots__ = ("_bound", "_function", "_implementations")

    def __init__(self, implementations: Mapping[str, str], function: str | None = None) -> None:
        self._implementations = implementations
        self._function = function
        self._bound: Callable[..., Any] = self._bind
        _ops.append(self)

    def __call__(self, *args: Any) -> Any:
        return self._bound(*args)

    def _bind(self, *args: Any) -> Any:
        self._bound = self._choose()
        return self._bound(*args)

    def _choose(self) -> Callable[..., Any]:
        names = ("reference",) if _choice == "reference" else available(self._implementations)
        for name in names:
            found = find(self._implementations, name, self._function)
            if found is not None:
                return found
        raise ImportError(f"no implementation of {self._function or self._implementations['reference']} can be loaded")

    def forget(self) -> None:
        """Makes the next call choose again."""
        self._bound = self._bind


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


def use(choice: str) -> None:
    """Sets which implementations this process runs, for every op, from the next call on.

    choice   "reference": the definitions; "auto": of each op the first one listed that this machine can load
    Raises:  ValueError if the choice is none of these.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels: {choice!r} is none of {', '.join(CHOICES)}")
    _choice = choice
    for op in _ops:
        op.forget()
