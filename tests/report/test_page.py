"""The page of a run: what it says, what it refuses, how it is written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from burnish.cli.report import report
from burnish.errors import BurnishError, OutputError
from burnish.report import page, read_run, render, write_report
from burnish.report.comparable import quality_groups

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, elements and attributes of a page; refuses elements that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_headline_of_one_run(make_run: Callable[..., Path]) -> None:
    shown = Page(render(read_run(make_run())))
    assert "Qwen3-MoE → Qwen3ForCausalLM" in shown.words
    assert "kept 4 of 16 experts per layer (score do-acp, scaling uniform)" in shown.words
    assert "1.00 B → 773 M 1.29× fewer" in shown.words
    assert "8.70 → 24.3 2.79× higher" in shown.words
    assert "61.3 → 131 2.14× faster" in shown.words


def test_every_expert_has_a_cell_and_says_what_became_of_it(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    plan = json.loads((directory / "plan.json").read_text())
    shown = Page(render(read_run(directory)))
    for layer in plan["layers"]:
        order = sorted(range(16), key=lambda e: -layer["scores"][e])
        kept = [group[0] for group in layer["groups"]]
        for expert in range(16):
            fate = f"kept in group {kept.index(expert)}, scale 0.250" if expert in kept else "dropped"
            tip = f"layer {layer['layer']}, expert {expert} score {layer['scores'][expert]:#.3g}, rank "
            assert f"{tip}{order.index(expert) + 1} of 16 {fate}" in shown.words
    assert len(shown.having("rect", class_="mark")) == 16 + 1  # and one in the legend


def test_groups_show_their_weights(make_run: Callable[..., Path]) -> None:
    directory = make_run()

    def merge(plan: Any) -> None:
        plan["grouping"] = "pairs"
        plan["layers"][0] |= {"groups": [[3, 7], [9]], "weights": [[0.75, 0.25], [1.0]], "scales": [0.5, 0.125]}

    edit(directory / "plan.json", merge)
    shown = Page(render(read_run(directory))).words
    assert re.search(r"layer 0, expert 7 \S+ \S+ rank \d+ of 16 kept in group 0, weight 0.250, scale 0.500", shown)
    assert "3 + 7, 9 0.500, 0.125" in shown
    assert "(score do-acp, grouping pairs, scaling uniform)" in shown


def test_plan_written_by_hand_needs_no_reasons(make_run: Callable[..., Path]) -> None:
    directory = make_run()

    def bare(plan: Any) -> None:
        for key in ("score", "keep", "grouping", "scaling"):
            plan[key] = None
        plan["notes"] = ["edited by hand"]
        for layer in plan["layers"]:
            layer["shared_scale"] = 0.5

    edit(directory / "plan.json", bare)
    shown = Page(render(read_run(directory))).words
    assert "kept 4 of 16 experts per layer " in shown and "layer (" not in shown
    assert "edited by hand" in shown
    assert "shared experts’ scale" in shown


def test_score_kept_is_the_share_of_the_kept_experts(make_run: Callable[..., Path]) -> None:
    directory = make_run()

    def flat(plan: Any) -> None:
        plan["layers"][1]["scores"] = [1.0] * 16
        plan["layers"][2]["scores"] = [-1.0] + [1.0] * 15
        plan["layers"][3]["scores"] = None

    edit(directory / "plan.json", flat)
    shares = [layer.score_share for layer in read_run(directory).conversions[0].plan.layers]
    assert shares[1:] == [0.25, None, None]
    assert "score kept" in Page(render(read_run(directory))).words


def test_absent_block_errors_leave_no_empty_column(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    assert "relative block error" in render(read_run(directory))
    edit(directory / "plan.json", lambda plan: [layer.update(relative_block_error=None) for layer in plan["layers"]])
    assert "relative block error" not in render(read_run(directory)).lower()


def test_slower_students_are_marked_in_words(make_sweep: Callable[[], Path]) -> None:
    shown = Page(render(read_run(make_sweep()))).words
    assert shown.count("0.83× slower") == 2  # decode and prefill
    assert shown.count("slower") == 2
    assert "12.60 ± 0.10" in shown


def test_a_sweep_has_one_table_and_a_section_for_each_run(make_sweep: Callable[[], Path]) -> None:
    run = read_run(make_sweep())
    assert [conversion.name for conversion in run.conversions] == ["do-acp-k4", "do-acp-k8", "sf-k4", "sf-k16"]
    shown = Page(render(run))
    assert len(shown.having("details", class_="run")) == 4
    assert len(shown.having("table", class_="models")) == 1
    links = [attributes["href"] for attributes in shown.having("a")]
    assert links == [f"#run-{index}" for index in range(4)]
    assert [a["id"] for tag, a in shown.elements if (a.get("id") or "").startswith("run-")] == [
        link[1:] for link in links if link
    ]
    assert "kept 4 to 16 of 32 experts per layer, in 4 conversions" in shown.words


def test_students_are_known_by_the_name_of_their_directory(make_sweep: Callable[[], Path]) -> None:
    directory = make_sweep()
    edit(directory / "evaluation.json", lambda e: [row.update(model=f"/data/{row['model']}") for row in e["rows"]])
    run = read_run(directory)
    groups = quality_groups(run.evaluations)
    measured = [page.measured(run, groups, conversion)[1] for conversion in run.conversions]
    assert [row and row.model for row in measured] == [f"/data/{conversion.name}" for conversion in run.conversions]
    assert "/data" not in render(run)


def test_an_evaluation_of_another_model_is_not_taken_for_this_one(make_run: Callable[..., Path]) -> None:
    """The directory may have been renamed since, or the file copied along from another model, of another size."""
    directory = make_run()
    edit(directory / "evaluation.json", lambda evaluation: evaluation["rows"][1].update(model="/data/elsewhere"))
    assert "Perplexity 8.70 → 24.3" in Page(render(read_run(directory))).words
    edit(directory / "evaluation.json", lambda evaluation: evaluation["rows"][1].update(num_parameters=7))
    shown = Page(render(read_run(directory))).words
    assert "Perplexity" not in shown and "elsewhere" in shown


def test_paths_show_only_where_the_options_are_listed(make_run: Callable[..., Path]) -> None:
    directory = make_run(name="/home/someone/models/Teacher")
    edit(directory / "burnish.json", lambda record: record.update(command="burnish densify Teacher"))
    edit(directory / "evaluation.json", lambda evaluation: evaluation.update(dataset="/home/someone/text.txt"))
    shown = Page(render(read_run(directory))).words
    assert "burnish Teacher do-acp-k4" in shown
    assert "32,768 tokens of text.txt in 64 blocks" in shown
    assert shown.count("/home/someone") == 2  # the source in full, the data set in full


def test_an_unmeasured_run_says_how_to_measure_it(make_run: Callable[..., Path]) -> None:
    shown = Page(render(read_run(make_run(evaluated=False)))).words
    assert "burnish evaluate --before Qwen3-30B-A3B --after do-acp-k4 --out do-acp-k4/evaluation.json" in shown
    assert "1.29× fewer" in shown and "Perplexity" not in shown


def test_evaluation_without_speed_and_with_lost_numbers(make_run: Callable[..., Path]) -> None:
    directory = make_run()

    def strip(evaluation: Any) -> None:
        for row in evaluation["rows"]:
            row["speeds"] = []
        evaluation["rows"][1]["perplexity"] = {"value": None, "standard_error": None}
        evaluation["rows"][1]["comparison"]["forward_kl"]["standard_error"] = None

    edit(directory / "evaluation.json", strip)
    shown = Page(render(read_run(directory))).words
    assert "tokens/s" not in shown
    assert "not finite" in shown
    edit(directory / "evaluation.json", lambda evaluation: evaluation["rows"].pop())
    assert "8.704 ± 0.070" in Page(render(read_run(directory))).words


def test_how_it_was_made_is_complete(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    record = json.loads((directory / "burnish.json").read_text())
    shown = Page(render(read_run(directory))).words
    for name, value in {**record["options"], **record["counts"], **record["environment"]["versions"]}.items():
        assert f"{name} {'none' if value is None else value}" in shown
    for expected in (record["command"], "observe 6 min 43 s", "peak memory 5.31 GB", "tokens observed 1,048,576"):
        assert expected in shown
    for name in record["files"]["copied"] + record["files"]["changed"] + record["notes"]:
        assert name in shown


def test_a_record_without_command_or_extras_still_makes_a_page(make_run: Callable[..., Path]) -> None:
    directory = make_run(evaluated=False)
    extras = ("command", "seconds", "peak_rss_bytes", "statistics", "counts", "files", "notes")
    edit(directory / "burnish.json", lambda record: [record.pop(key) for key in extras])
    html = render(read_run(directory))
    assert "<pre>" not in html and "None" not in Page(html).words


@pytest.mark.parametrize("kind", ["run", "recipe", "distillation", "pruning"])
def test_hostile_names_stay_text(request: pytest.FixtureRequest, kind: str) -> None:
    hostile = "<script>alert(1)</script>\"'&"
    directory = request.getfixturevalue(f"make_{kind}")()

    def poison(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, dict | list):
                poison(item)
            elif isinstance(item, str) and key not in ("format", "verb", "started", "finished", "layers"):
                value[key] = item if item == "language-modelling" else hostile

    for file in directory.rglob("*.json"):
        edit(file, poison)
    html = render(read_run(directory))
    assert "<script" not in html
    shown = Page(html)
    assert shown.having("script") == []
    assert shown.words.count("<script>alert(1)</script>") > 8
    assert all(not name.startswith("on") for _, attributes in shown.elements for name in attributes)


def test_nothing_is_loaded_from_elsewhere(make_sweep: Callable[[], Path]) -> None:
    html = render(read_run(make_sweep()))
    shown = Page(html)
    for _, attributes in shown.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,"
    assert not re.search(r"url\(|@import|//", html.split("<style>")[1].split("</style>")[0])
    assert [a["content"] for a in shown.having("meta") if "http-equiv" in a] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]


def test_drawings_and_scrolling_regions_have_names(make_sweep: Callable[[], Path]) -> None:
    shown = Page(render(read_run(make_sweep())))
    for svg in shown.having("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label"))
    scrolling = [a for _, a in shown.elements if "scroll" in (a.get("class") or "").split()]
    assert scrolling and all(a.get("aria-label") and a.get("tabindex") == "0" for a in scrolling)
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))


def schemes() -> Iterator[dict[str, str]]:
    style = (Path(page.__file__).parent / "base.html.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3  # light, dark, print
    for block in blocks:
        yield dict(re.findall(r"--(\w+): (#[0-9a-f]+);", block))


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible_in_each_scheme() -> None:
    for colours in schemes():
        for text in ("ink", "soft", "warn"):
            assert contrast(colours[text], colours["paper"]) >= 4.5
        assert contrast(colours["ink"], colours["well"]) >= 7
        assert contrast(colours["mark"], colours["paper"]) >= 3
        assert contrast(colours["fill"], colours["well"]) >= 2.5


def test_palette_orders_by_lightness_alone() -> None:
    """So it reads in every kind of colour vision and in grey, from the paper's end away."""
    for colours in schemes():
        steps = [luminance(colours[f"q{step}"]) for step in range(9)]
        paper = luminance(colours["paper"])
        distances = [abs(step - paper) for step in steps]
        assert distances == sorted(distances)
        pairs = [contrast(colours[f"q{step}"], colours[f"q{step + 1}"]) for step in range(8)]
        assert min(pairs) > 1.09


def test_same_run_same_bytes(make_sweep: Callable[[], Path]) -> None:
    directory = make_sweep()
    code = "import sys, pathlib, burnish.report as r; sys.stdout.write(r.render(r.read_run(pathlib.Path(sys.argv[1]))))"
    pages = {
        subprocess.run(
            [sys.executable, "-c", code, str(directory)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert pages == {render(read_run(directory)).encode()}


def test_a_large_model_makes_a_page_below_a_megabyte(make_run: Callable[..., Path]) -> None:
    assert len(render(read_run(make_run(48, 128, 8)))) < 1_000_000


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("burnish.json", lambda v: v.update(format="burnish.run/2"), "format: Input should be 'burnish.run/1'"),
        ("burnish.json", lambda v: v["source"].pop("parameters"), "source.parameters: Field required"),
        ("burnish.json", lambda v: v["output"].update(bytes="7"), "output.bytes: Input should be a valid integer"),
        ("plan.json", lambda v: v["layers"][2].pop("scales"), "layers.2.scales: Field required"),
        (
            "plan.json",
            lambda v: v["layers"][1]["scores"].__setitem__(3, float("nan")),
            "layers.1.scores.3: Input should",
        ),
        ("plan.json", lambda v: v["layers"][1]["scores"].pop(), "layer 1 has 15 scores for 16 experts"),
        ("plan.json", lambda v: v["layers"][1]["groups"].append([2]), "layers.1: 5 groups, 4 weights and 4 scales"),
        ("plan.json", lambda v: v["layers"][0]["groups"].__setitem__(0, [16]), "layer 0 keeps expert 16: choose 0..15"),
        ("plan.json", lambda v: v.update(layers=[]), "layers is empty"),
        ("evaluation.json", lambda v: v.update(rows=[]), "rows is empty"),
        ("evaluation.json", lambda v: v["rows"][1].pop("perplexity"), "rows.1.perplexity: Field required"),
    ],
)
def test_malformed_files_are_named_with_their_key(
    make_run: Callable[..., Path], file: str, change: Callable[[Any], None], message: str
) -> None:
    directory = make_run()
    edit(directory / file, change)
    with pytest.raises(BurnishError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / file}: {message}")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_run()
    (directory / "plan.json").unlink()
    with pytest.raises(BurnishError, match=r"plan\.json cannot be read: No such file"):
        read_run(directory)
    (directory / "plan.json").write_text('{"format": ')
    with pytest.raises(BurnishError, match=r"plan\.json: Invalid JSON"):
        read_run(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BurnishError, match=r"empty holds no burnish\.json"):
        read_run(tmp_path / "empty")
    with pytest.raises(BurnishError, match="nowhere is not a directory"):
        read_run(tmp_path / "nowhere")


def test_write_refuses_to_overwrite(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    written = write_report(directory)
    assert written == directory / "report.html"
    assert written.read_text() == render(read_run(directory))
    written.write_text("mine")
    with pytest.raises(OutputError, match=r"report\.html exists"):
        write_report(directory)
    assert written.read_text() == "mine"
    write_report(directory, overwrite=True)
    assert written.read_text() == render(read_run(directory))


def test_a_failed_write_leaves_the_old_page_and_nothing_else(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_run()
    (directory / "report.html").write_text("old")
    before = sorted(directory.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_report(directory, overwrite=True)
    assert sorted(directory.iterdir()) == before
    assert (directory / "report.html").read_text() == "old"


def test_write_into_a_missing_directory_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(make_run(), tmp_path / "missing" / "page.html")


def test_command(make_run: Callable[..., Path], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    directory, out = make_run(), tmp_path / "page.html"
    result = CliRunner().invoke(app, [str(directory), "--out", str(out)])
    assert (result.exit_code, result.stdout) == (0, f"wrote {out}\n")
    assert isinstance(CliRunner().invoke(app, [str(directory), "-o", str(out)]).exception, OutputError)
    result = CliRunner().invoke(app, [str(directory), "-o", str(out), "--overwrite", "--quiet"])
    assert (result.exit_code, result.stdout) == (0, "")
