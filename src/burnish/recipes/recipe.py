"""A recipe: verbs with their options, run in order. Read from YAML and checked whole before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from burnish.data import bundled_model, bundled_text
from burnish.data.text import READERS
from burnish.errors import BurnishError
from burnish.recipes.verbs import RUNNERS, VERBS, expected, fitted, nearest, options_of

KEYS = ("name", "let", "seed", "steps")
REFERENCE = re.compile(r"\$(\$|\w*)")
NAME = re.compile(r"[A-Za-z_]\w*")
BUNDLED: dict[str, Callable[[], Path]] = {
    "bundled_model": bundled_model,
    "bundled_heldout": lambda: bundled_text("heldout"),
    "bundled_calibration": lambda: bundled_text("calibration"),
}
"""Names that every recipe knows: what ships with burnish."""


@dataclass(frozen=True)
class Step:
    """One verb of a recipe.

    Attributes:
        name: the verb, or what `as` says.
        verb: a key of `burnish.recipes.verbs.VERBS`.
        options: as the function takes them; `$name` in a text is the output of the step of that name, or one of the
            bundled files, and `$$` is a dollar.
        output: what it leaves in the run directory.
    """

    name: str
    verb: str
    options: dict[str, Any]
    output: str


@dataclass(frozen=True)
class Recipe:
    """Verbs to run in order, with every value of `let` put in place.

    Attributes:
        name: for people.
        seed: of every step that draws and has none of its own.
        steps: in order.
    """

    name: str
    seed: int
    steps: tuple[Step, ...]

    @classmethod
    def load(cls, source: str | Path, settings: Sequence[str] = ()) -> Recipe:
        """The recipe in a file, or the one of that name that ships with burnish.

        Args:
            source: a YAML file, or a name that `shipped` knows.
            settings: values to set before anything is resolved: `let.NAME=VALUE` or `NAME=VALUE`,
                `steps.STEP.OPTION=VALUE` or `STEP.OPTION=VALUE`, `seed=VALUE`, `name=VALUE`; values are YAML.

        Raises:
            BurnishError: there is no such file, or an option names a file that is not there.
            ValueError: an unknown key, verb, option or name, or a value of the wrong type; says where it is written,
                and the nearest known word.
        """
        file = Path(source)
        if not file.exists() and str(source) == file.stem:
            file = _shipped_file(file.stem)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BurnishError(f"{file}: the recipe cannot be read ({getattr(error, 'strerror', error)})") from error
        draft = _read(text, str(source))
        for setting in settings:
            draft.set(setting)
        return _resolve(draft)

    def to_yaml(self) -> str:
        """The resolved recipe: loading it gives an equal recipe."""
        steps: list[Any] = []
        for step in self.steps:
            entry: dict[str, Any] = {step.verb: step.options}
            if step.name != step.verb:
                entry["as"] = step.name
            steps.append(entry if step.options or len(entry) > 1 else step.verb)
        content = {"name": self.name, "seed": self.seed, "steps": steps}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def shipped() -> dict[str, str]:
    """The recipes that ship with burnish: what to call each, and what it is."""
    files = sorted(_library().glob("*.yaml"))
    return {file.stem: str(yaml.safe_load(file.read_text(encoding="utf-8"))["name"]) for file in files}


def bundled() -> dict[str, str]:
    """What a reference stands for where no step made it: the bundled files, and the dollar itself."""
    return {"$": "$", **{name: str(make()) for name, make in BUNDLED.items()}}


def filled(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with each reference `$name` replaced by `names[name]`, which keeps its type where it stands alone.

    `$$` is the reference whose name is `$`.
    """
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    return names[whole[1]] if whole else REFERENCE.sub(lambda match: str(names[match[1]]), value)


@dataclass(frozen=True)
class _Written:
    """A value as it was written, and where."""

    value: Any
    place: str


@dataclass(frozen=True)
class _StepDraft:
    name: str
    verb: str
    place: str
    options: dict[str, _Written]


@dataclass(frozen=True)
class _Draft:
    """A recipe as it was written: known keys and verbs, but nothing resolved."""

    top: dict[str, _Written]
    let: dict[str, _Written]
    steps: list[_StepDraft]

    def set(self, setting: str) -> None:
        """Replace one value; `setting` is `PATH=VALUE`."""
        path, equals, text = setting.partition("=")
        place = f"--set {setting}"
        if not equals:
            raise ValueError(f"{place}: expected NAME=VALUE")
        try:
            written = _Written(yaml.safe_load(text), place)
        except yaml.YAMLError as error:
            raise ValueError(f"{place}: the value is not valid YAML ({error})") from error
        head, _, rest = path.removeprefix("steps.").rpartition(".")
        steps = {step.name: step.options for step in self.steps}
        if head in steps:
            steps[head][rest] = written
        elif head == "let" or (not head and rest in self.let):
            if rest not in self.let:
                raise ValueError(f"{place}: let has no {rest!r}: {nearest(rest, self.let)}")
            self.let[rest] = written
        elif not head and rest in ("name", "seed"):
            self.top[rest] = written
        else:
            known = ["name", "seed", *self.let, *(f"{name}.OPTION" for name in steps)]
            raise ValueError(f"{place}: the recipe has no {path!r}: {nearest(path, known)}")


def _library() -> Path:
    return Path(str(resources.files("burnish.recipes"))) / "library"


def _shipped_file(name: str) -> Path:
    file = _library() / f"{name}.yaml"
    if not file.exists():
        raise ValueError(f"no recipe file {name!r}, and none of that name ships: {nearest(name, shipped())}")
    return file


def _read(text: str, file: str) -> _Draft:
    """The text of a recipe as a draft; every key and verb is known, and each value knows its line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file} line {mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{place}: not valid YAML: {problem}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}: expected a mapping with the keys {', '.join(KEYS)}")
    entries = _entries(root, file)
    for key, (node, _) in entries.items():
        if key not in KEYS:
            raise ValueError(f"{_place(file, node)}: unknown key {key!r}: {nearest(key, KEYS)}")
    let = _values(entries["let"][1], file) if "let" in entries else {}
    top = {key: _written(file, *pair) for key, pair in entries.items() if key in ("name", "seed")}
    list_node = entries["steps"][1] if "steps" in entries else None
    if not isinstance(list_node, yaml.SequenceNode) or not list_node.value:
        raise ValueError(f"{file}: expected `steps`, a list of verbs: {', '.join(VERBS)}")
    steps = [_read_step(node, file) for node in list_node.value]
    taken = dict.fromkeys(BUNDLED, "burnish itself")
    for name, place in [*((name, let[name].place) for name in let), *((step.name, step.place) for step in steps)]:
        if not NAME.fullmatch(name):
            raise ValueError(f"{place}: {name!r} is not a name: use letters, digits and _")
        if name in taken:
            raise ValueError(
                f"{place}: the name {name!r} is taken by {taken[name]}: choose another, for a step by `as`"
            )
        taken[name] = place
    return _Draft(top, let, steps)


def _read_step(node: yaml.Node, file: str) -> _StepDraft:
    place = _place(file, node)
    if isinstance(node, yaml.ScalarNode):
        entries, verbs = {}, [str(node.value)]
    else:
        entries = _entries(node, file)
        verbs = [key for key in entries if key != "as"]
    if len(verbs) != 1:
        raise ValueError(f"{place}: expected one verb a step, and perhaps `as`; found {', '.join(verbs) or 'none'}")
    verb = verbs[0]
    if verb not in VERBS:
        raise ValueError(f"{place}: unknown verb {verb!r}: {nearest(verb, VERBS)}")
    name = str(_written(file, *entries["as"]).value) if "as" in entries else verb
    options = _values(entries[verb][1], file) if verb in entries else {}
    return _StepDraft(name, verb, place, options)


def _values(node: yaml.Node, file: str) -> dict[str, _Written]:
    """The values of a mapping; none where nothing is written."""
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return {}
    return {key: _written(file, *pair) for key, pair in _entries(node, file).items()}


def _entries(node: yaml.Node, file: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key -> (key node, value node) of a mapping, each key once."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{_place(file, node)}: expected a mapping, KEY: VALUE")
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_place(file, key)}: expected a word as key")
        if key.value in entries:
            raise ValueError(f"{_place(file, key)}: {key.value!r} is there twice")
        entries[key.value] = (key, value)
    return entries


def _written(file: str, key: yaml.Node, value: yaml.Node) -> _Written:
    try:
        return _Written(yaml.constructor.SafeConstructor().construct_document(value), _place(file, key))
    except yaml.YAMLError as error:
        raise ValueError(f"{_place(file, key)}: {getattr(error, 'problem', None) or error}") from error


def _place(file: str, node: yaml.Node) -> str:
    return f"{file} line {node.start_mark.line + 1}"


def _resolve(draft: _Draft) -> Recipe:
    """Check every option of every step, and put the values of `let` in their places."""
    outputs = bundled()
    let: dict[str, Any] = {}
    for name, written in draft.let.items():
        let[name] = _with_let(written, let, outputs)
    title, seed = draft.top.get("name", _Written("recipe", "")), draft.top.get("seed", _Written(0, ""))
    seed = replace(seed, value=_with_let(seed, let, outputs))
    seed = replace(seed, value=_checked("seed", seed, int, outputs))
    steps: list[Step] = []
    for number, draft_step in enumerate(draft.steps, start=1):
        later = {step.name: step.place for step in draft.steps[number - 1 :]}
        options = _resolve_options(draft_step, seed, let, outputs, later)
        renamed = draft_step.name != draft_step.verb
        output = VERBS[draft_step.verb].output(number, draft_step.name, renamed=renamed)
        steps.append(Step(draft_step.name, draft_step.verb, options, output))
        outputs[draft_step.name] = output
    return Recipe(str(title.value), seed.value, tuple(steps))


def _resolve_options(
    step: _StepDraft, seed: _Written, let: Mapping[str, Any], outputs: Mapping[str, str], later: Mapping[str, str]
) -> dict[str, Any]:
    takes = options_of(step.verb)
    given = dict(step.options)
    if "seed" in takes:
        given.setdefault("seed", seed)
    for key, written in given.items():
        if key in RUNNERS:
            raise ValueError(f"{written.place}: {key!r} of {step.verb} is set by the run: leave it out")
        if key not in takes:
            raise ValueError(f"{written.place}: {step.verb} has no option {key!r}: {nearest(key, takes)}")
    missing = [key for key, option in takes.items() if option.required and key not in given]
    if missing:
        raise ValueError(f"{step.place}: {step.verb} needs {' and '.join(map(repr, missing))}")
    options = {}
    for key, written in given.items():
        resolved = replace(written, value=_with_let(written, let, outputs, later))
        options[key] = _checked(f"{step.verb}.{key}", resolved, takes[key].annotation, outputs)
    return options


def _checked(key: str, written: _Written, annotation: Any, outputs: Mapping[str, str]) -> Any:
    """The value as its parameter takes it; references stay."""
    value = filled(written.value, outputs)
    try:
        taken = fitted(value, annotation)
    except ValueError:
        raise ValueError(f"{written.place}: {key} is {value!r}, expected {expected(annotation)}") from None
    for text in texts(written.value):
        if _names_missing_file(text):
            raise BurnishError(f"{written.place}: {key}: {text}: no such file or directory")
    return written.value if taken is value else taken


def texts(value: Any) -> list[str]:
    """Every text in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def _names_missing_file(text: str) -> bool:
    """Whether a text can only be the name of a local file, and there is none. A hub name has neither form."""
    local = text.startswith(("/", "./", "../", "~")) or Path(text).suffix in READERS
    return local and not REFERENCE.search(text) and not Path(text).expanduser().exists()


def _with_let(
    written: _Written, let: Mapping[str, Any], outputs: Iterable[str], later: Mapping[str, str] | None = None
) -> Any:
    """A value with what `let` names put in place; references to outputs and escaped dollars stay as they are."""
    for text in texts(written.value):
        for name in REFERENCE.findall(text):
            if name in let or name in outputs:
                continue
            if name == "":
                raise ValueError(f"{written.place}: a $ without a name in {text!r}: write $$ for a dollar")
            if later and name in later:
                raise ValueError(f"{written.place}: ${name} is made later ({later[name]}): move that step up")
            known = [known for known in (*let, *outputs) if known != "$"]
            raise ValueError(f"{written.place}: unknown name ${name}: {nearest(name, known)}")
    stay = {name: f"${name}" for name in outputs}
    return filled(written.value, {**stay, **let})
