"""Rooms that are also functions: `burnish.densify(...)` works whether or not `burnish.densify` was imported before.

A package attribute cannot be both a subpackage and a function, because importing the subpackage replaces the
attribute; a subpackage that can be called is both.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A package whose call is the function of its own name: `densify(...)` is `densify.densify(...)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function of the package's own name."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(name: str) -> None:
    """Make the imported package `name` callable; a room calls it with its own `__name__`."""
    sys.modules[name].__class__ = CallableRoom
