"""What the claims about exact laboratories measure with: choices, slopes, whole measurements in the small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.align.bandit import Tables, forward_kl, optimum
from claims import alignment, coverage


def test_the_best_beta_is_chosen_by_the_mean_over_problems() -> None:
    draw = torch.Generator().manual_seed(0)
    tables = Tables.draw(draw, 6, contexts=2, actions=4)
    rewards = 0.5 * tables.log_target
    found = alignment.best_beta(tables, rewards, 0.0)
    every = [tables.kl(optimum(rewards, tables.log_reference, gamma=0.0, beta=beta)).mean() for beta in alignment.BETAS]
    assert float(found.mean()) == float(min(every)) < float(every[0])
    assert float(alignment.best_beta(tables, rewards, 0.5).mean()) < 1e-6  # with the entropy the target is reached


def test_slopes_are_of_logarithms() -> None:
    assert alignment.slope((1, 10, 100), [7.0, 0.7, 0.07]) == pytest.approx(-1)
    assert alignment.slope((4, 16), [3.0, 1.5]) == pytest.approx(-0.5)


def test_spreads() -> None:
    assert alignment.spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert coverage.shown(torch.arange(101.0)) == "50 (5-95)"


def test_the_limit_of_dpo_is_the_product() -> None:
    target, reference, _ = alignment.language_models()
    wrong = (reference + target).log_softmax(-1)
    torch.testing.assert_close(wrong, optimum(0.5 * target, reference, gamma=0.0, beta=0.5))
    assert 0.1 < float(forward_kl(target, wrong).mean()) < float(forward_kl(target, reference).mean())


def test_a_claim_in_the_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(coverage, "RUNS", 20)
    coverage.course.cache_clear()
    assert coverage.two_rounds(tmp_path).verdict == "reproduced"
    assert coverage.distillation(tmp_path).verdict == "reproduced"
    # a policy alone must not pass for a design
    monkeypatch.setattr(coverage, "floor", lambda bandit, count: 1e-6)
    assert coverage.two_rounds(tmp_path).verdict == "not reproduced"
    coverage.course.cache_clear()


@pytest.mark.parametrize("claims", [coverage.CLAIMS, alignment.LABORATORY], ids=["coverage", "alignment"])
def test_every_claim_says_before_what_counts(claims: list[alignment.Claim]) -> None:
    assert len({claim.name for claim in claims}) == len(claims) >= 4
    for claim in claims:
        assert claim.budget == "cpu-minutes" and "artly if" in claim.reproduced_if
