"""Recipes as text: what is refused and where, what `--set` changes, and what a resolved recipe is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from burnish.data import bundled_model, bundled_text
from burnish.densify.convert import densify
from burnish.errors import BurnishError
from burnish.evaluate.compare import evaluate
from burnish.recipes import Recipe, shipped
from burnish.recipes.recipe import bundled, filled
from burnish.recipes.verbs import expected, fitted, options_of
from burnish.report import write_report

GOOD = """\
name: two ways
let:
  teacher: $bundled_model
  size: 64
seed: 7
steps:
  - densify: {model: $teacher, max_length: $size, seed: 3}
  - densify:
      model: $teacher
      score: reap
      statistics: $densify/statistics/routing.safetensors
    as: reap
  - evaluate: {before: $teacher, after: [$densify, $reap], max_length: $size}
  - report
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *settings: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return Recipe.load(tmp_path / "r.yaml", settings)

    return load


def with_step(step: str) -> str:
    """A recipe whose third line is a step and whose fourth is another."""
    return f"let: {{t: $bundled_model}}\nsteps:\n  - {step}\n  - report\n"


def test_a_recipe_is_its_steps_with_values_in_place(load) -> None:
    recipe = load(GOOD)
    assert (recipe.name, recipe.seed) == ("two ways", 7)
    assert [(step.name, step.verb, step.output) for step in recipe.steps] == [
        ("densify", "densify", "01-densify"),
        ("reap", "densify", "02-reap"),
        ("evaluate", "evaluate", "evaluation.json"),
        ("report", "report", "report.html"),
    ]
    first, second, third, last = (step.options for step in recipe.steps)
    assert first == {"model": "$bundled_model", "max_length": 64, "seed": 3}  # its own seed stays
    assert second["seed"] == third["seed"] == 7 and last == {}
    assert third["after"] == ["$densify", "$reap"] and third["max_length"] == 64


def test_the_resolved_recipe_reads_back_as_itself(load) -> None:
    recipe = load(GOOD.replace("two ways", "'a $$ and ümläute: #1'").replace("score: reap", "revision: a$$b"))
    again = load(recipe.to_yaml())
    assert again == recipe
    assert "let" not in yaml.safe_load(recipe.to_yaml())
    assert again.steps[1].options["revision"] == "a$$b"


def test_references_are_filled_and_dollars_escaped() -> None:
    names = {"$": "$", "n": 4, "a": "run/01-a"}
    assert filled("$n", names) == 4 and filled("x$n", names) == "x4"
    assert filled({"k": ["$a/f", "$$a", "$$$a", 3, None]}, names) == {"k": ["run/01-a/f", "$a", "$run/01-a", 3, None]}
    assert bundled()["bundled_model"] == str(bundled_model())
    assert bundled()["bundled_heldout"] == str(bundled_text("heldout"))


def test_u9_1_options_are_the_parameters_of_the_function() -> None:
    """One source of truth: what the function takes, less what the run sets."""
    for verb, function, runners in (
        ("densify", densify, {"out", "dry_run", "overwrite", "resume", "progress"}),
        ("evaluate", evaluate, {"progress"}),
        ("report", write_report, {"run_dir", "out", "overwrite"}),
    ):
        parameters = inspect.signature(function).parameters
        assert set(options_of(verb)) == set(parameters) - runners
    assert [name for name, option in options_of("densify").items() if option.required] == ["model"]


MISTAKES = {
    "unknown top key": ("stpes: []\nsteps: [report]\n", "line 1: unknown key 'stpes': nearest is 'steps'"),
    "no steps": ("name: x\n", "expected `steps`, a list of verbs"),
    "empty steps": ("steps: []\n", "expected `steps`"),
    "a list": ("- report\n", "expected a mapping with the keys name, let, seed, steps"),
    "not YAML": ("steps:\n  - densify: [1\nname: x\n", "line 3: not valid YAML"),
    "unknown verb": (with_step("denisfy: {model: $t}"), "line 3: unknown verb 'denisfy': nearest is 'densify'"),
    "two verbs": (with_step("{densify: {model: $t}, report: }"), "line 3: expected one verb a step"),
    "unknown option": (with_step("densify: {model: $t, scoer: sf}"), "line 3: densify has no option 'scoer': "
                       "nearest is 'score'"),
    "the line of the option": (with_step("densify:\n      model: $t\n      kepe: 4"), "line 5: densify has no option "
                               "'kepe': nearest is 'keep'"),
    "the run's option": (with_step("densify: {model: $t, out: x}"), "line 3: 'out' of densify is set by the run"),
    "report has none": ("name: x\nsteps:\n  - report: {run_dir: x}\n", "line 3: 'run_dir' of report is set by the run"),
    "missing option": (with_step("densify: {score: sf}"), "line 3: densify needs 'model'"),
    "twice": (with_step("densify: {model: $t, model: $t}"), "line 3: 'model' is there twice"),
    "bool for int": (with_step("densify: {model: $t, keep: yes}"), "line 3: densify.keep is True, expected a whole "
                     "number or null"),
    "fraction for int": (with_step("densify: {model: $t, keep: 4.5}"), "line 3: densify.keep is 4.5, expected a whole"),
    "text for int": (with_step("densify: {model: $t, num_samples: many}"), "line 3: densify.num_samples is 'many'"),
    "list for text": (with_step("densify: {model: [$t]}"), "line 3: densify.model is ["),
    "not a choice": (with_step("densify: {model: $t, probability: sum}"), "expected softmax or gate"),
    "number in a list": (with_step("evaluate: {before: $t, after: [1]}"), "line 3: evaluate.after is [1], expected text"
                         " or a list or null"),
    "a path for a number": (with_step("densify: {model: $t, keep: $bundled_model}"), "line 3: densify.keep is '/"),
    "unknown name": (with_step("densify: {model: $teecher}").replace("{t:", "{teacher:"), "line 3: unknown name "
                     "$teecher: nearest is 'teacher'"),
    "a later step": ("steps:\n  - evaluate: {model: $densify}\n  - densify: {model: x}\n", "line 2: $densify is made "
                     "later"),
    "itself": ("steps:\n  - densify: {model: $densify}\n", "line 2: $densify is made later"),
    "a lone dollar": (with_step("densify: {model: a$/b}"), "line 3: a $ without a name in 'a$/b': write $$"),
    "a later value": ("let:\n  a: $b\n  b: 1\nsteps: [report]\n", "line 2: unknown name $b"),
    "one name twice": (with_step("report"), "line 4: the name 'report' is taken by"),
    "the name of a value": ("let: {report: 1}\nsteps: [report]\n", "line 2: the name 'report' is taken by"),
    "a bundled name": ("let: {bundled_model: 1}\nsteps: [report]\n", "line 1: the name 'bundled_model' is taken"),
    "not a name": ("steps:\n  - report:\n    as: 'a b'\n", "line 2: 'a b' is not a name"),
    "the seed": ("seed: one\nsteps: [report]\n", "line 1: seed is 'one', expected a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_u9_1_mistakes_are_refused_with_file_line_and_cure(mistake: str, load) -> None:
    text, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load(text)
    assert "r.yaml" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("value", ["nothing.jsonl", "/nowhere/model", "./nothing", "~/no such"])
def test_u9_2_a_file_that_is_not_there_is_a_failure_before_the_start(value: str, load) -> None:
    with pytest.raises(BurnishError, match=re.escape(f"line 3: densify.dataset: {value}: no such file")):
        load(with_step(f"densify: {{model: $t, dataset: {value}}}"))
    load(with_step("densify: {model: $t, dataset: org/name:config}"))


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(BurnishError, match=r"gone\.yaml: the recipe cannot be read \(No such file"):
        Recipe.load(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="no recipe file 'minature', and none of that name ships: nearest is"):
        Recipe.load("minature")


def test_a_dollar_in_a_file_name_reaches_the_verb_as_it_is(load, tmp_path: Path) -> None:
    (tmp_path / "te$t.txt").write_text("x")
    recipe = load(with_step(f"densify: {{model: $t, dataset: {tmp_path}/te$$t.txt}}"))
    for read in (recipe, load(recipe.to_yaml())):
        assert filled(read.steps[0].options, bundled())["dataset"] == f"{tmp_path}/te$t.txt"


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (["size=32"], ("size: 64", "size: 32")),
        (["let.size=32"], ("size: 64", "size: 32")),
        (["seed=1", "name=other"], ("two ways", "other", "seed: 7", "seed: 1")),
        (["steps.reap.score=ean"], ("score: reap", "score: ean")),
        (["reap.score=ean"], ("score: reap", "score: ean")),
        (["evaluate.after=[$densify]"], ("[$densify, $reap]", "[$densify]")),
        (["densify.keep=null", "densify.seed=4"], ("seed: 3", "seed: 4, keep: null")),
        (["size=16", "size=32"], ("size: 64", "size: 32")),
    ],
)
def test_set_equals_writing_it(settings: list[str], by_hand: tuple[str, ...], load) -> None:
    text = GOOD
    for old, new in zip(by_hand[::2], by_hand[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    assert load(GOOD, *settings) == load(text) != load(GOOD)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tehcer=x", "--set tehcer=x: the recipe has no 'tehcer': nearest is 'teacher'"),
        ("let.sise=1", "--set let.sise=1: let has no 'sise': nearest is 'size'"),
        ("densfy.keep=1", "the recipe has no 'densfy.keep'"),
        ("densify.kepe=1", "--set densify.kepe=1: densify has no option 'kepe': nearest is 'keep'"),
        ("densify.keep=four", "--set densify.keep=four: densify.keep is 'four', expected a whole number"),
        ("densify.out=x", "'out' of densify is set by the run"),
        ("size", "--set size: expected NAME=VALUE"),
        ("size=[1", "--set size=[1: the value is not valid YAML"),
        ("teacher=$nobody", "--set teacher=$nobody: unknown name $nobody"),
    ],
)
def test_u9_1_a_wrong_setting_is_refused(setting: str, message: str, load) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(GOOD, setting)


def test_what_yaml_reads_otherwise_than_it_is_meant() -> None:
    assert fitted("1e-4", float) == 1e-4  # YAML 1.1 has no number without a point
    assert fitted("1e-4", float | None) == 1e-4 and fitted("1e-4", str) == "1e-4"
    assert fitted(4000000, str) == "4000000" and fitted(4000000, str | int) == 4000000
    assert fitted(3, float) == 3 and fitted([1, 2], tuple[int, ...]) == [1, 2]
    for value, annotation in ((True, int), (True, float), (True, str), (1, bool), ("x", float), ([1, "a"], list[int])):
        with pytest.raises(ValueError, match="is not"):
            fitted(value, annotation)
    assert expected(str | Path | list[str] | None) == "text or a list or null"


@pytest.mark.parametrize("name", ["miniature", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"])
def test_shipped_recipes_are_valid_and_name_their_source(name: str) -> None:
    recipe = Recipe.load(name)
    assert shipped()[name] == recipe.name
    assert [step.verb for step in recipe.steps] == ["densify", "distill", "evaluate", "report"]
    assert recipe.steps[1].options["student"] == "$densify"
    assert recipe.steps[1].options["teacher"] == recipe.steps[0].options["model"]
    assert recipe.steps[2].options["after"] == ["$densify", "$distill"]


def test_u16_1_the_docs_show_a_valid_recipe_and_name_every_shipped_one(load) -> None:
    docs = Path(__file__).parents[2] / "docs"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (docs / "recipes.md").read_text(), re.M | re.S)
    recipe = load(text, "blocks=32")
    assert [step.name for step in recipe.steps] == ["densify", "reap", "evaluate", "report"]
    assert recipe.steps[0].options["num_samples"] == 32
    assert re.findall(r"^\| `([a-z][\w-]*)` \|", (docs / "run.md").read_text(), re.M) == [
        "miniature", "pre-dpo", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "against-controls",
        "against-pruning",
    ]  # fmt: skip
    assert len(shipped()) == 7


@pytest.mark.parametrize("name", ["against-controls", "against-pruning"])
def test_comparisons_treat_all_students_alike(name: str) -> None:
    runs = [step.options for step in Recipe.load(name).steps if step.verb == "distill"]
    assert len(runs) >= 2
    for options in runs[1:]:
        assert {k: v for k, v in options.items() if k not in ("student", "teacher")} == {
            k: v for k, v in runs[0].items() if k not in ("student", "teacher")
        }


@pytest.mark.parametrize(
    ("name", "keep", "tokens"),
    [("qwen3-30b-a3b", 8, "4B"), ("deepseek-v2-lite", 6, "0.3B"), ("gpt-oss-20b", 4, "0.3B")],
)
def test_shipped_recipes_are_those_of_the_paper(name: str, keep: int, tokens: str) -> None:
    convert, recover = (step.options for step in Recipe.load(name).steps[:2])
    assert (convert["score"], convert["keep"], recover["tokens"]) == ("do-acp", keep, tokens)
    assert convert["num_samples"] * convert["max_length"] == 1_048_576
    assert (recover["loss"], recover["temperature"]) == ("forward-kl", 1.0)
