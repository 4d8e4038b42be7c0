"""Pages of distilled and pruned models, of recipes, and of tasks and speeds."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError
from burnish.report import read_run, render
from burnish.report.figures import bars, number
from burnish.report.page import courses, worse
from burnish.report.records import Estimate
from tests.report.conftest import sample_metrics, sample_speed, write
from tests.report.test_figures import parse
from tests.report.test_page import Page, edit


def test_the_course_of_a_distillation_has_its_points_in_place(make_distillation: Callable[..., Path]) -> None:
    """KL 8, 2 and 4 at 0, 50 and 100 of 100 tokens on an axis from 0 to 8.36: 1000 units each way, down from the top.

    The likelihood has two evaluations and no line of training; the loss is the divergence and stands for itself."""
    lines = [
        {"step": 1, "tokens": 0, "loss": 8.0000004, "kl": 8.0},
        {"step": 2, "tokens": 50, "loss": 2.0, "kl": 2.0},
        {"step": 2, "tokens": 50, "eval_kl": 3.0, "eval_nll": 5.0},
        {"step": 3, "tokens": 100, "loss": 4.0, "kl": 4.0},
        {"step": 3, "tokens": 100, "eval_kl": 2.0, "eval_nll": 4.0},
    ]
    (conversion,) = read_run(make_distillation(lines)).conversions
    divergence, likelihood = courses(conversion.metrics)
    assert (divergence.trained, divergence.evaluated, divergence.logarithmic) == (True, True, False)
    assert (likelihood.trained, likelihood.evaluated) == (False, True)
    lines_by_class = {line.get("class"): line.get("points", "") for line in parse(divergence.drawing).iter("polyline")}
    found = [float(part) for point in lines_by_class["train"].split() for part in point.split(",")]
    assert found == pytest.approx([0, 1000 - 8000 / 8.36, 500, 1000 - 2000 / 8.36, 1000, 1000 - 4000 / 8.36], abs=0.2)
    dots = [path.get("d", "") for path in parse(divergence.drawing).iter("path") if path.get("class") == "point"]
    places = [float(part) for dot in dots for part in dot[1:-2].split(",")]
    assert places == pytest.approx([500, 1000 - 3000 / 8.36, 1000, 1000 - 2000 / 8.36], abs=0.2)
    assert "on held-out text from 3.00 to 2.00" in divergence.drawing


def test_a_course_over_more_than_a_decade_is_logarithmic(make_distillation: Callable[..., Path]) -> None:
    lines = [{"step": step, "tokens": step, "eval_kl": kl} for step, kl in ((0, 100.0), (1, 10.0), (2, 1.0))]
    (conversion,) = read_run(make_distillation(lines)).conversions
    (course,) = courses(conversion.metrics)
    assert course.logarithmic
    (line,) = parse(course.drawing).iter("polyline")
    heights = [float(point.split(",")[1]) for point in (line.get("points") or "").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert "logarithmic scale" in Page(render(read_run(make_distillation(lines)))).words


def test_a_lost_loss_breaks_the_line_and_not_the_page(make_distillation: Callable[..., Path]) -> None:
    losses = [3.0, 2.0, math.nan, 2.0, 1.0, math.inf]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    (conversion,) = read_run(make_distillation(lines)).conversions
    (course,) = courses(conversion.metrics)
    assert course.name == "Training loss"
    pieces = [len((line.get("points") or "").split()) for line in parse(course.drawing).iter("polyline")]
    assert pieces == [2, 2]
    assert "nan" not in Page(render(read_run(make_distillation(lines)))).words.split()
    assert "over 5 steps of training" in course.drawing
    assert courses(read_run(make_distillation([{"step": 1, "loss": math.nan}])).conversions[0].metrics) == ()


def test_a_loss_that_is_more_than_the_divergence_has_its_own_drawing(make_distillation: Callable[..., Path]) -> None:
    lines = [{"step": step, "tokens": step, "loss": 2.0 + step, "divergence": 1.0 + step} for step in range(3)]
    found = courses(read_run(make_distillation(lines)).conversions[0].metrics)
    assert [course.name for course in found] == ["Divergence from the teacher, nats per token", "Training loss"]


def test_a_long_course_is_thinned(make_distillation: Callable[..., Path]) -> None:
    html = render(read_run(make_distillation(sample_metrics(20_000))))
    assert len(html) < 100_000
    assert "training" in Page(html).words


def test_a_distillation_shows_its_teacher_its_last_values_and_its_options(
    make_distillation: Callable[..., Path],
) -> None:
    shown = Page(render(read_run(make_distillation()))).words
    last = sample_metrics()[-1]
    for expected in (
        "Qwen3-30B-A3B → Qwen3ForCausalLM",
        "distilled from Qwen3-30B-A3B over 4.00 B tokens",
        "Parameters 30.5 B → 773 M 39× fewer",
        f"→ {last['eval_kl']:#.3g} 21× lower",
        "Tokens of training 4.00 B 41.2 K tokens/s",
        "lr 0.0001",
        "optimizer adamw",
        "tokens 4,000,000,000",
        "teacher’s parameters 30.5 B",
        "burnish evaluate --before Qwen3-30B-A3B --after distilled",
    ):
        assert expected in shown
    assert "tail mass" not in shown and "None" not in shown


def test_a_distillation_that_ended_worse_says_so(make_distillation: Callable[..., Path]) -> None:
    lines = [{"step": step, "tokens": step, "eval_kl": kl} for step, kl in ((0, 1.0), (1, 2.0))]
    shown = Page(render(read_run(make_distillation(lines))))
    assert "1.00 → 2.00 2.00× higher" in shown.words
    assert len(shown.having("dd", class_="worse")) == 1


def test_a_distillation_from_stored_logits_has_no_teacher_size(make_distillation: Callable[..., Path]) -> None:
    directory = make_distillation([])
    edit(directory / "burnish.json", lambda record: record["teacher"].update(parameters=0, bytes=0))
    shown = Page(render(read_run(directory))).words
    assert "Parameters 773 M → 773 M unchanged" in shown
    assert "No course of the training was kept." in shown
    (directory / "metrics.jsonl").unlink()
    assert "No course of the training was kept." in Page(render(read_run(directory))).words


def test_a_pruning_shows_shapes_layers_and_influence(make_pruning: Callable[..., Path]) -> None:
    run = read_run(make_pruning())
    shown = Page(render(run))
    for expected in (
        "pruned: layers 12 → 9, hidden size 2048 → 1536, feed-forward width 6144 → 4096",
        "layers 12 9 0.75×",
        "feed-forward width 6,144 4,096 0.67×",
        "key-value heads 8 8",
        "Layers kept: 0–3, 6–9, 11.",
        "layer 0: block influence 0.320, kept",
    ):
        assert expected in shown.words
    bars = [bar for bar in shown.having("rect") if "%" in (bar.get("x") or "")]
    assert [place for place, bar in enumerate(bars) if bar["class"] == "removed"] == [4, 5, 10]


def test_bars_stand_on_zero(make_pruning: Callable[..., Path]) -> None:
    """Values 4, 1 and -1 on an axis from -1 to 4: heights 80, 20 and 20 percent, zero at 80 percent from the top."""
    found = list(parse(bars([4.0, 1.0, -1.0], {0}, title="t", what="v")).iter("rect"))
    assert [(bar.get("y"), bar.get("height")) for bar in found] == [("0%", "80%"), ("60%", "20%"), ("80%", "20%")]
    assert [bar.get("class") for bar in found] == ["kept", "removed", "removed"]
    lefts = [float((bar.get("x") or "").rstrip("%")) for bar in found]
    assert lefts == pytest.approx([100 / 30, 1100 / 30, 2100 / 30], abs=0.01)


@pytest.mark.parametrize(
    "layers", ["0-3,6-9,11", [0, 1, 2, 3, 6, 7, 8, 9, 11], [{"layer": i} for i in (*range(4), *range(6, 10), 11)]]
)
def test_kept_layers_are_read_however_they_were_written(make_pruning: Callable[..., Path], layers: Any) -> None:
    (conversion,) = read_run(make_pruning(layers=layers, block_influence=None)).conversions
    assert conversion.plan is not None and conversion.plan.layers == (0, 1, 2, 3, 6, 7, 8, 9, 11)
    assert "influence by layer" not in render(read_run(make_pruning(layers=layers, block_influence=None)))


def test_shapes_are_read_in_the_words_of_the_options(make_pruning: Callable[..., Path]) -> None:
    sizes = {"layers": 12, "hidden_size": 64, "intermediate_size": 96, "heads": 4, "kv_heads": 2}
    directory = make_pruning(source=sizes, target=sizes | {"layers": 9, "heads": 2})
    edit(directory / "plan.json", lambda plan: [plan.pop(key) for key in ("source_shape", "target_shape")])
    assert "pruned: layers 12 → 9, attention heads 4 → 2" in Page(render(read_run(directory))).words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "0-8,12"}, "layer 12 is kept, but the source has 12 layers"),
        ({"layers": "0-4"}, "5 layers are kept, but the target has 9"),
        ({"layers": "0..4"}, r"layers: '0\.\.4': expected ranges such as 0-5,9"),
        ({"block_influence": [0.1]}, "1 block influences for 12 layers"),
        ({"format": "burnish.graft.plan/1"}, r"format: 'burnish\.graft\.plan/1', expected one of burnish\.densify"),
    ],
)
def test_malformed_plans_are_named(make_pruning: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BurnishError, match=rf"plan\.json: {message}") as caught:
        read_run(make_pruning(**changes))
    assert "\n" not in str(caught.value)


def test_malformed_metrics_are_named_with_their_row(make_distillation: Callable[..., Path]) -> None:
    directory = make_distillation([{"step": 1}, {"tokens": 2}])
    with pytest.raises(BurnishError, match=r"metrics\.jsonl row 2: step: Field required"):
        read_run(directory)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": ')
    with pytest.raises(BurnishError, match=r"metrics\.jsonl row 3: Invalid JSON"):
        read_run(directory)


def test_a_recipe_shows_its_steps_in_order_on_one_page(make_recipe: Callable[[], Path]) -> None:
    directory = make_recipe()
    (directory / ".02-distill.old").mkdir()
    write(directory / ".02-distill.old" / "burnish.json", {"format": "broken"})
    run = read_run(directory)
    assert run.steps
    assert [conversion.name for conversion in run.conversions] == ["01-densify", "02-distill"]
    shown = Page(render(run))
    assert "Qwen3-MoE → Qwen3ForCausalLM" in shown.words
    assert "(score do-acp, scaling uniform); distilled from Qwen3-30B-A3B over 4.00 B tokens" in shown.words
    assert "Parameters 1.00 B → 773 M 1.29× fewer" in shown.words  # from the first source to the last output
    assert "Perplexity 8.70 → 10.9" in shown.words  # of the last step, not of the first
    assert [a.get("open", "no") for a in shown.having("details", class_="run")] == [None, None]
    order = [shown.words.index(part) for part in ("Quality and speed", "Experts kept", "Training Divergence")]
    assert order == sorted(order)
    assert [a["href"] for a in shown.having("a")] == ["#run-0", "#run-1"]


def test_steps_need_no_record_of_the_recipe(make_recipe: Callable[[], Path]) -> None:
    directory = make_recipe()
    whole = render(read_run(directory))
    (directory / "burnish.json").unlink()  # the report is one of its steps, and written before it
    assert render(read_run(directory)) == whole


def test_tasks_show_scores_and_paired_differences(make_recipe: Callable[[], Path]) -> None:
    shown = Page(render(read_run(make_recipe()))).words
    assert "hellaswag acc_norm 5-shot, version 1.0 1,000 0.612 ± 0.015" in shown
    assert "0.577 ± 0.015 −0.0350 ± 0.0098 worse" in shown
    assert "mmlu acc 5-shot, first 100, version 1.0" in shown
    assert "11.200 ± 0.015 +2.1000 ± 0.0098 worse" in shown  # a perplexity: more is worse
    assert "/runs" not in shown


def test_only_what_is_clear_is_called_worse(make_recipe: Callable[[], Path]) -> None:
    accuracy, _, perplexity = read_run(make_recipe()).evaluations["evaluation.json"].tasks
    for value, clear in ((-0.21, True), (-0.19, False), (0.21, False)):
        assert worse(accuracy, Estimate(value=value, standard_error=0.1)) is clear
        assert worse(perplexity, Estimate(value=-value, standard_error=0.1)) is clear
    assert not worse(accuracy, Estimate(value=-1.0, standard_error=None))


def test_speeds_by_batch_size(make_recipe: Callable[[], Path]) -> None:
    directory = make_recipe()
    shown = Page(render(read_run(directory))).words
    assert "Speed by batch size" in shown
    assert "batch 16" in shown and "batch 1 " in shown
    speed = sample_speed(16, 1, 2.14 * 4)
    prefill, decode = number(speed["prefill_ms"]), number(speed["decode_ms_per_token"])
    row = f"{prefill} {speed['prefill_tokens_per_second']:.0f} 2.14× {decode}"
    assert row in shown
    assert "Speed: greedy, batch 1," in shown
    edit(directory / "evaluation.json", lambda e: [row.update(speeds=row["speeds"][:1]) for row in e["rows"]])
    assert "Speed by batch size" not in Page(render(read_run(directory))).words


def test_an_evaluation_of_the_first_release_is_read(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    new = render(read_run(directory))

    def old(evaluation: Any) -> None:
        del evaluation["tasks"]
        for row in evaluation["rows"]:
            (row["speed"],) = row.pop("speeds")
            for key in ("prefill_ms", "decode_ms_per_token"):
                del row["speed"][key]

    edit(directory / "evaluation.json", old)
    assert render(read_run(directory)) == new


def test_a_task_with_a_value_too_few_is_named(make_recipe: Callable[[], Path]) -> None:
    directory = make_recipe()
    edit(directory / "evaluation.json", lambda evaluation: evaluation["tasks"][1]["values"].pop())
    with pytest.raises(BurnishError, match=r"evaluation\.json: task mmlu has 2 values for 3 models"):
        read_run(directory)


def test_the_report_reads_what_evaluate_writes(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    from tests.evaluate.test_card import result

    directory = make_run()
    measured = result(directory)
    (directory / "evaluation.json").write_text(
        json.dumps(measured.to_dict() | {"environment": {"versions": {}, "platform": "x"}})
    )
    shown = Page(render(read_run(directory))).words
    assert "quiz acc 5-shot, first 100, chat template, version 1" in shown
    assert "0.400 ± 0.040 −0.100 ± 0.020 worse" in shown
    assert "0.62× slower" in shown


def test_a_recipe_that_forks_has_no_headline_numbers_of_its_last_branch(make_recipe: Callable[[], Path]) -> None:
    directory = make_recipe()
    shutil.copytree(directory / "02-distill", directory / "03-again")
    run = read_run(directory)
    assert not run.steps
    shown = Page(render(run))
    assert "3 conversions: densify, distill" in shown.words and "1.29× fewer" not in shown.words
