"""The verbs that a recipe may chain: where each function is, what it leaves, and which options it takes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

RUNNERS = frozenset({"out", "run_dir", "overwrite", "resume", "progress", "dry_run"})
"""Parameters that the run sets itself."""

KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    Path: ((str,), "text"),
    os.PathLike: ((str,), "text"),
    Sequence: ((list,), "a list"),
    list: ((list,), "a list"),
    tuple: ((list,), "a list"),
    Mapping: ((dict,), "a mapping"),
    dict: ((dict,), "a mapping"),
    types.NoneType: ((types.NoneType,), "null"),
}
"""Parameter types that YAML can say: the values that serve, and the type in words."""


@dataclass(frozen=True)
class Verb:
    """One row: the function, as "module:name", and what its step leaves in the run directory.

    Attributes:
        function: it is imported on first use.
        leaves: file name; None for a directory of its own.
    """

    function: str
    leaves: str | None = None

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def output(self, number: int, name: str, *, renamed: bool) -> str:
        """Name of what step `number` leaves: `02-distill`, `evaluation.json`, or `evaluation-NAME.json`."""
        if self.leaves is None:
            return f"{number:02d}-{name}"
        file = Path(self.leaves)
        return f"{file.stem}-{name}{file.suffix}" if renamed else file.name


VERBS = {
    "densify": Verb("burnish.densify:densify"),
    "prune": Verb("burnish.prune:prune"),
    "distill": Verb("burnish.distill:distill"),
    "tune": Verb("burnish.tune:tune"),
    "align": Verb("burnish.align:align"),
    "evaluate": Verb("burnish.evaluate:evaluate", leaves="evaluation.json"),
    "report": Verb("burnish.report:write_report", leaves="report.html"),
}


@dataclass(frozen=True)
class Option:
    """A parameter of a verb: its annotation, and whether it must be given."""

    annotation: Any
    required: bool


@cache
def parameters_of(verb: str) -> Mapping[str, Option]:
    """Every parameter of the verb's function, read from its signature."""
    function = VERBS[verb].load()
    annotations = typing.get_type_hints(function)
    return {
        name: Option(annotations[name], parameter.default is inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def options_of(verb: str) -> dict[str, Option]:
    """What a step of this verb may say."""
    return {name: option for name, option in parameters_of(verb).items() if name not in RUNNERS}


def fitted(value: Any, annotation: Any) -> Any:
    """`value` as a parameter of this type takes it.

    YAML reads `1e-4` as text and `5000000` as a number, whatever is meant: where only the other fits, it is taken.

    Raises:
        ValueError: it does not fit; says what was expected.
    """
    members = _members(annotation)
    if any(_fits(value, member) for member in members):
        return value
    if isinstance(value, str) and float in members:
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, int | float) and not isinstance(value, bool) and str in members:
        return str(value)
    raise ValueError(f"{value!r} is not {expected(annotation)}")


def expected(annotation: Any) -> str:
    """What a parameter of this type takes, in words."""
    words: list[str] = []
    for member in _members(annotation):
        kind = typing.get_origin(member) or member
        if kind is Literal:
            words += map(str, typing.get_args(member))
        elif kind in KINDS:
            words.append(KINDS[kind][1])
    return " or ".join(dict.fromkeys(words))


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, as the end of an error message; all of them where none is like it."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"nearest is {close[0]!r}" if close else f"choose one of {', '.join(names)}"


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def _fits(value: Any, member: Any) -> bool:
    kind, arguments = typing.get_origin(member) or member, typing.get_args(member)
    if kind is Literal:
        return value in arguments
    if kind not in KINDS or not isinstance(value, KINDS[kind][0]) or (isinstance(value, bool) and kind is not bool):
        return False
    items = value if isinstance(value, list) and arguments else []
    return all(any(_fits(item, part) for part in _members(arguments[0])) for item in items)
