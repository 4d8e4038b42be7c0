"""What the claims about MeZO-BCD measure with; the published loop of the benchmark; the GPU claims at a tiny shape."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from burnish.optim.blocks import derived_seed
from burnish.optim.perturbation import Direction, Gaussian, row
from claims import mezo_bcd
from claims.mezo_bcd import Course

step = mezo_bcd.neighbour("mezo_step", "benchmarks")


def course(*losses: float, every: int = 10, seconds: float = 1.0) -> Course:
    steps = [every * number for number in range(len(losses))]
    return Course(steps, [seconds * at for at in steps], list(losses), [0.5] * len(losses))


def test_time_and_steps_to_a_loss_are_those_of_the_first_look_at_it() -> None:
    found = course(4, 2, 3, 1, seconds=0.5)
    assert (found.steps_to(3), found.time_to(3), found.steps_to(1.5)) == (10, 5, 30)
    assert found.steps_to(0.5) == math.inf == found.time_to(0.5)


def tunings(*ours: Course) -> dict[str, tuple[float, dict[float, float], list[Course]]]:
    """MeZO ends at 2 and is there at step 20, after 40 seconds."""
    return {
        "MeZO": (1e-5, {1e-5: 2.0}, [course(9, 5, 2, 3, 1, seconds=2.0)] * 3),
        "MeZO-BCD": (1e-3, {1e-3: 2.0}, list(ours)),
    }


@pytest.mark.parametrize(
    ("ours", "speed", "steps"),
    [
        ([course(9, 5, 2)] * 3, "reproduced", "reproduced"),
        ([course(9, 5, 4, 2, 1)] * 3, "partly", "reproduced"),
        ([course(9, 5, 4, 4, 4, 4, 2)] * 3, "not reproduced", "partly"),
        ([course(9, 5, 2), course(9, 5, 2), course(9, 8)], "partly", "not reproduced"),
    ],
)
def test_the_verdicts_follow_from_the_courses(ours: list[Course], speed: str, steps: str, tmp_path: Path) -> None:
    with mock.patch.object(mezo_bcd, "tunings", lambda scratch: tunings(*ours)):
        assert mezo_bcd.wall_clock(tmp_path).verdict == speed
        assert mezo_bcd.iteration_complexity(tmp_path).verdict == steps


def test_the_best_learning_rate_lies_between_two_others() -> None:
    for best in (1e-5, 0.27, 3e-3):
        found, tried = mezo_bcd.best_rate(lambda lr, best=best: abs(math.log(lr / best)), 3e-3)
        assert found == pytest.approx(best, rel=0.8) and min(tried) < found < max(tried)


def test_passages_are_balanced_and_end_with_the_question() -> None:
    texts = (torch.arange(100, 200), torch.arange(500, 600))
    drawn = mezo_bcd.Passages(texts, torch.tensor([7, 8]), torch.tensor([1, 2]))
    ids, authors = drawn.draw(40, torch.Generator().manual_seed(0))
    assert (
        ids.shape == (40, mezo_bcd.LENGTH) and authors.sum() == 20 and bool((ids[:, -2:] == torch.tensor([7, 8])).all())
    )
    assert torch.equal(ids[:, 0] >= 500, authors == 1)
    assert bool((ids[:, 1:-2] - ids[:, :-3] == 1).all())


def test_float32_weights_move_by_the_sum_of_the_steps() -> None:
    """The reference of the precision claim, from its definition."""
    lr, seed, steps, size = 1e-3, 3, 20, 8
    found = mezo_bcd.moved(torch.float32, lr, seed, one_block=False, size=size, steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(mezo_bcd.LAYERS):
        torch.randn(size, generator=draw)
    gradients = (5 * torch.randn(steps, generator=draw)).tolist()
    expected = torch.zeros(mezo_bcd.LAYERS, size, dtype=torch.float64)
    for number, gradient in enumerate(gradients):
        rows = [row(index, [torch.zeros(size)] * 2, {}, split=True) for index in range(mezo_bcd.LAYERS)]
        direction = Direction(Gaussian(), derived_seed(seed, number))
        expected -= lr * gradient * torch.stack(list(direction.walk(rows))).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_in_place_bfloat16_is_noise_and_a_block_copy_is_not() -> None:
    wanted, lost = (
        mezo_bcd.moved(d, 1e-6, 0, one_block=False, size=512, steps=300) for d in (torch.float32, torch.bfloat16)
    )
    assert abs(float(torch.cosine_similarity(wanted.flatten(), lost.flatten(), dim=0))) < 0.2
    assert lost.norm() > 5 * wanted.norm()
    wanted, kept = (
        mezo_bcd.moved(d, 1e-6, 0, one_block=True, size=512, steps=300) for d in (torch.float32, torch.bfloat16)
    )
    assert float(torch.cosine_similarity(wanted.flatten(), kept.flatten(), dim=0)) > 0.6


def test_the_published_step_has_the_worked_numbers() -> None:
    """theta (.5, .5), L = theta . (1, -2), z (.6, -.8), lr .1: g 2.2, theta (.368, .676)."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    published = step.Published(model, lr=0.1, eps=1e-3)
    gradient = torch.tensor([[1.0, -2.0]])
    with (
        torch.random.fork_rng(),
        mock.patch.object(step.Published, "noise", lambda self, tensor: torch.tensor([[0.6, -0.8]])),
    ):
        published.step(lambda: float((model.weight.detach().double() * gradient).sum()), seed=0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.368, 0.676]]), rtol=1e-4, atol=0)


def test_ours_in_place_takes_the_published_step_up_to_rounding() -> None:
    assert step.check_equal() < 1e-4


def test_sides_leave_what_they_do_not_tune() -> None:
    model = step.build("tiny", torch.device("cpu"), torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    layer = step.layer_of(model, 0.6)
    for side in ("bcd", "bcd-redrawn", "bcd-prefix"):
        step.SIDES[side](model, layer)(step.loss_of(model, 2, 8))
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.2.")}


def test_the_prefix_is_run_once_and_the_step_is_the_same() -> None:
    ends = []
    for side in ("bcd", "bcd-prefix"):
        model = step.build("tiny", torch.device("cpu"), torch.float32)
        runs: list[int] = []
        model.model.layers[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        take = step.SIDES[side](model, step.layer_of(model, 0.9))
        for _ in range(3):
            take(step.loss_of(model, 2, 8))
        ends.append(torch.cat([tensor.detach().flatten() for tensor in model.parameters()]))
    assert torch.equal(*ends)


def test_the_gpu_claims_run_at_a_tiny_shape(tmp_path: Path) -> None:
    timed = mezo_bcd.time_of_a_step(tmp_path, shape="tiny", rows=2, tokens=8, rounds=2)
    assert set(timed.details["ratios"]) == {
        f"{slow} / {fast}" for slow in ("published", "mezo") for fast in ("bcd", "bcd-prefix")
    }
    assert all(0 < share < 1 for share in timed.details["outside"].values())


@pytest.mark.slow
def test_the_memory_claim_runs_at_a_tiny_shape(tmp_path: Path) -> None:
    sized = mezo_bcd.memory(tmp_path, shape="tiny", rows=2, tokens=8, repeats=1)
    assert set(sized.details["ratios"]) == {"two-forwards", "published", "mezo", "bcd", "bcd-in-place"}


def test_a_wrong_learning_rate_breaks_the_predicted_convergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mezo_bcd, "KINDS", {"full": mezo_bcd.KINDS["full"]})
    monkeypatch.setattr(mezo_bcd, "SIDE", 4)
    monkeypatch.setattr(mezo_bcd, "SEEDS", (0,))
    assert mezo_bcd.alignment_and_convergence(tmp_path, steps=2000).verdict == "reproduced"
    right = mezo_bcd.Alignment.best_step.fget
    monkeypatch.setattr(mezo_bcd.Alignment, "best_step", property(lambda self: 1.7 * right(self)))
    assert mezo_bcd.alignment_and_convergence(tmp_path, steps=2000).verdict == "not reproduced"
