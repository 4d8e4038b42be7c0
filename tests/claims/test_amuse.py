"""What the claims about AMUSE measure with: closed forms, and models side by side that must not know of each other."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from burnish.optim import AMUSE, Muon
from claims import amuse
from claims.amuse import Length, Runs, Task, Way


def test_learning_rate_warms_up_linearly_and_falls_as_half_a_cosine() -> None:
    length = Length(steps=110, warmup=10, every=1)
    factor = partial(amuse.learning_rate_factor, length=length)
    assert [factor(step, cosine=True) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert factor(35, cosine=True) == pytest.approx((2 + math.sqrt(2)) / 4)
    assert factor(60, cosine=True) == pytest.approx(0.5) and factor(110, cosine=True) == pytest.approx(0, abs=1e-15)
    assert {factor(step, cosine=False) for step in (10, 60, 110)} == {1.0}


def quadratic(start: float) -> tuple[nn.Parameter, Task]:
    """One number that is pulled to zero; its held-out loss is the number."""
    value = nn.Parameter(torch.tensor([[start]], dtype=torch.float64))
    group = {"params": [value], "use_muon": False}
    return value, Task([group], lambda step: value.square().sum() / 2, lambda: [float(value.detach())])


def test_every_run_is_looked_at_where_it_is_compared() -> None:
    for length in (amuse.TOY, amuse.MINIATURE.length, amuse.H100.length, amuse.VIT):
        assert length.steps % 4 == 0 and length.steps // 4 % length.every == 0


def test_a_run_follows_its_schedule_step_by_step() -> None:
    length, expected = Length(steps=8, warmup=2, every=2), {}
    value = 1.0
    for step in range(1, 9):
        value *= 1 - 0.1 * amuse.learning_rate_factor(step, length, cosine=True)
        expected[step] = value
    _, task = quadratic(1.0)
    course = amuse.train(task, Way(torch.optim.SGD, cosine=True, options={"momentum": 0.0}), 0.1, length)
    assert {step: loss for step, (loss,) in course.items()} == pytest.approx({s: expected[s] for s in (2, 4, 6, 8)})


def test_an_averaged_way_is_observed_at_its_average_and_trained_on_at_y() -> None:
    value, task = quadratic(1.0)
    seen = {}

    def observe(optimizer: torch.optim.Optimizer, task: Task) -> float:
        y, z = float(value.detach()), float(optimizer.state[value]["z"])
        (x,) = amuse.loss_to_ship(optimizer, task)
        beta = optimizer.param_groups[0]["beta"]
        assert y == float(value.detach()) and y == pytest.approx((1 - beta) * z + beta * x, rel=1e-12)
        seen[len(seen)] = amuse.losses_of_sequences(optimizer, task)
        assert seen[len(seen) - 1] == {"x": [pytest.approx(x)], "y": [y], "z": [z]} and y == float(value.detach())
        return x

    way = Way(AMUSE, options={"beta1": 0.5, "rho": 0.5, "auxiliary": "sgd"})
    course = amuse.train(task, way, 0.1, Length(steps=6, warmup=2, every=1), observe)
    assert len(course) == 6 and course[6] > seen[5]["z"][0]  # the average lags behind on a slope


def test_a_gradient_is_clipped_over_all_tensors() -> None:
    values = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))]
    groups = [{"params": [value]} for value in values]
    task = Task(groups, lambda step: sum(value.square().sum() for value in values) / 2, lambda: [0.0])
    amuse.train(task, Way(torch.optim.SGD), 1.0, Length(steps=1, warmup=1, every=1, clip=1.0))
    assert [float(value.detach()) for value in values] == pytest.approx([3 - 0.6, 4 - 0.8], rel=1e-5)


@pytest.mark.parametrize("optimizer", [partial(AMUSE, warmup_steps=2), Muon])
def test_perceptrons_side_by_side_train_as_each_would_alone(optimizer: type) -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    together = amuse.Perceptrons(draws, (6, 5, 5, 3), torch.float64)
    inputs = torch.randn(2, 7, 6, generator=draws[0], dtype=torch.float64)
    targets = torch.randint(3, (2, 7), generator=draws[0])
    alone = []
    for model in range(2):
        layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        for layer, weight, bias in zip(layers[::2], together.weights, together.biases, strict=True):
            layer.load_state_dict({"weight": weight[model].detach(), "bias": bias[model].detach()})
        alone.append(layers)
    groups = [
        [
            {"params": [layers[0].weight, layers[2].weight], "use_muon": True},
            {"params": [layers[4].weight, *(layer.bias for layer in layers[::2])], "use_muon": False},
        ]
        for layers in alone
    ]
    steppers = [optimizer(together.groups(), lr=0.05), *(optimizer(group, lr=0.05) for group in groups)]
    for _ in range(4):
        for stepper in steppers:
            stepper.zero_grad()
        (nn.functional.cross_entropy(together(inputs).flatten(0, 1), targets.flatten()) * 2).backward()
        for layers, rows, classes in zip(alone, inputs, targets, strict=True):
            nn.functional.cross_entropy(layers(rows), classes).backward()
        for stepper in steppers:
            stepper.step()
    for model, layers in enumerate(alone):
        torch.testing.assert_close(together(inputs)[model], layers(inputs[model]), rtol=1e-10, atol=1e-12)


def test_held_out_loss_is_the_expected_cross_entropy_of_drawn_classes() -> None:
    draws = [torch.Generator().manual_seed(7)]
    teachers = amuse.Teachers(draws, 8, 3, torch.float64)
    inputs, log_probabilities = teachers.sample(20_000)
    assert float(log_probabilities.exp().sum(-1).sub(1).abs().max()) < 1e-12
    logits = log_probabilities / 2  # a student who knows something, but is less sure
    drawn = nn.functional.cross_entropy(logits[0], teachers.classes(log_probabilities)[0], reduction="none")
    (expected,) = amuse.expected_cross_entropy(logits, log_probabilities)
    assert abs(float(drawn.mean() - expected)) < 4 * float(drawn.std()) / math.sqrt(20_000)  # four standard errors
    again = amuse.Teachers([torch.Generator().manual_seed(7)], 8, 3, torch.float64).sample(20_000)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], log_probabilities)


def test_window_has_the_values_of_the_closed_form() -> None:
    """Oracle 2 of the method: warmup 20, beta_1 0.4."""
    found = [amuse.window(steps, 20, beta1=0.4, rho=rho) for rho in (0.0, 0.5) for steps in (20, 200, 2000)]
    assert found == pytest.approx([4.705, 112.705, 1192.705, 4.705, 21.343722, 67.447476], abs=1e-6)
    assert {round(amuse.window(steps, 20, beta1=0.4, rho=1.0), 9) for steps in (20, 200, 2000)} == {4.705}


def test_the_window_of_a_run_is_the_closed_form_and_another_start_of_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amuse.window_identity(tmp_path, steps=20, warmup=10).verdict == "reproduced"
    right = amuse.window
    monkeypatch.setattr(amuse, "window", lambda steps, warmup, **options: right(steps + 1, warmup, **options))
    assert amuse.window_identity(tmp_path, steps=20, warmup=10).verdict == "not reproduced"


@pytest.mark.parametrize(("best", "tried"), [(0.00125, 5), (0.02, 4), (0.005, 3)])
def test_the_best_learning_rate_lies_between_two_others(best: float, tried: int) -> None:
    found, losses = amuse.best_rate(lambda lr: abs(math.log(lr / best)))
    assert found == pytest.approx(best) and len(losses) == tried
    assert any(lr == pytest.approx(best / 2) for lr in losses) and any(lr == pytest.approx(2 * best) for lr in losses)


def course(*losses: float) -> dict[int, float]:
    return {10 * (number + 1): loss for number, loss in enumerate(losses)}


def runs(**courses: list[dict[int, float]]) -> dict[str, Runs]:
    names = {"amuse": "AMUSE", "muon": "cosine Muon", "adamw": "cosine AdamW"}
    return {names[name]: Runs(0.1, {0.1: 1.0}, found) for name, found in courses.items()}


def test_speed_up_is_the_steps_of_muon_over_the_first_step_at_its_final_loss(tmp_path: Path) -> None:
    assert amuse.steps_to(course(4, 3, 2, 1), 2.5) == 30 and amuse.steps_to(course(4, 3), 1) == math.inf
    found = runs(
        amuse=[course(5, 2, 1, 1), course(5, 4, 3, 2), course(5, 4, 2, 2)],
        muon=[course(9, 8, 4, 2)] * 3,
        adamw=[course(9, 9, 9, 9)] * 3,
    )
    measured = amuse.speed_up(tmp_path, lambda scratch: found, ("AMUSE",), least=1.2)
    assert measured.details["ratios"] == {"AMUSE": [2.0, 1.0, 4 / 3], "cosine AdamW": [0.0, 0.0, 0.0]}
    assert measured.verdict == "partly" and "cosine AdamW never, never, never" in measured.number
    assert amuse.speed_up(tmp_path, lambda scratch: found, ("AMUSE",), least=1.0).verdict == "reproduced"


@pytest.mark.parametrize(
    ("adamw", "verdict"),
    [
        ([course(9, 9, 9, 9)] * 3, "reproduced"),
        ([course(4.5, 9, 9, 9), course(9, 9, 9, 9), course(9, 9, 9, 9)], "partly"),
        ([course(4.9, 9, 9, 9), course(4.9, 9, 9, 9), course(4.9, 9, 9, 9)], "not reproduced"),
    ],
)
def test_a_frontier_is_below_every_other_way_at_every_checkpoint(
    adamw: list[dict[int, float]], verdict: str, tmp_path: Path
) -> None:
    found = runs(amuse=[course(5, 4, 3, 2)] * 3, muon=[course(9, 8, 7, 6)] * 3, adamw=adamw)
    measured = amuse.frontier(tmp_path, lambda scratch: found, ("AMUSE",))
    assert measured.verdict == verdict
    assert measured.details["leads"]["AMUSE before cosine Muon at 40"] == [4.0, 4.0, 4.0]
    assert "AMUSE 5.000/4.000/2.000" in measured.number


def test_largest_rise_is_above_the_lowest_point_before() -> None:
    assert amuse.largest_rise([3.0, 1.0, 2.0, 0.5, 1.0]) == 1.0 and amuse.largest_rise([3.0, 2.0, 1.0]) == 0.0


TINY = replace(
    amuse.MINIATURE, name="tiny", hidden=32, layers=1, heads=2, rows=8, tokens=16, held_out_rows=32,
    length=Length(60, 8, 15, 1.0),
)  # fmt: skip


def test_a_language_model_learns_what_can_be_known_of_the_next_token_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = tmp_path / "digits.txt"
    drawn = torch.randint(10, (12_000,), generator=torch.Generator().manual_seed(0))
    digits.write_text("".join(map(str, drawn.tolist())))
    monkeypatch.setattr(amuse, "bundled_text", lambda name: digits)
    monkeypatch.setattr(amuse, "neighbour", lambda name: SimpleNamespace(_training_text=lambda scratch: digits))
    monkeypatch.setattr(amuse, "WAYS", {"AMUSE": amuse.WAYS["AMUSE"]})
    monkeypatch.setattr(amuse, "SEEDS", (3, 5))
    monkeypatch.setattr(amuse, "best_rate", lambda loss: (0.04, {lr: loss(lr) for lr in (0.005, 0.04)}))
    starts = [amuse.language_task(tmp_path, TINY, seed, steps=1).held_out()[0] for seed in (3, 5)]
    assert starts[0] != starts[1] and starts == pytest.approx([math.log(2048)] * 2, abs=0.1)
    state = torch.get_rng_state()
    run = amuse.language_runs(tmp_path / "a", TINY)["AMUSE"]
    assert torch.equal(torch.get_rng_state(), state)
    assert run.lr == 0.04 and run.tried[0.04] < run.tried[0.005] < math.log(2048)
    # Digits at random: nothing but their share can be known of the next one, everything of the one that is read.
    assert run.finals() == pytest.approx([math.log(10)] * 2, abs=0.1)
    assert amuse.language_runs(tmp_path / "b", TINY)["AMUSE"] == run
    monkeypatch.setattr(amuse, "train", lambda *_: pytest.fail("trained again"))
    assert amuse.language_runs(tmp_path / "a", TINY)["AMUSE"] == run


def test_a_vision_transformer_learns_which_half_is_bright(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 200), ("t10k", 500)):
        labels = torch.randint(2, (count,), generator=draw, dtype=torch.uint8)
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        for number, label in enumerate(labels.tolist()):
            images[number, 14 * label : 14 * label + 14] = 255
        for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(folder / f"{part}-{name}-ubyte.gz", "wb") as stream:
                stream.write(b"\0" * header + values.numpy().tobytes())
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    task = amuse.vision_task(tmp_path, 0, shape, rows=16, device="cpu")
    assert task.held_out()[0] == pytest.approx(math.log(10), abs=0.5)
    course = amuse.train(task, amuse.WAYS["AMUSE"], 0.02, Length(40, 5, 40, 1.0))
    assert course[40][0] < 0.2
