"""LCPO: the card's numbers, the Fisher identity, and reliabilities that find the share of wrong labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.align.objectives import cdpo, cpo, dpo, ipo, lcpo, pmle, simpo, updated_reliability
from burnish.align.objectives.lcpo import label_posterior, posterior
from tests.align.objectives.example import of, pair, random_pairs, slopes, swapped, value


def with_logit(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Answers whose preference under pmle with gamma = 1 has these logits."""
    return logits.double().requires_grad_(), torch.zeros_like(logits).double()


def test_the_worked_pair() -> None:
    assert value(lcpo(dpo), changes={"reliability": 0.9}) == pytest.approx(0.634050, abs=5e-7)
    assert slopes(lcpo(dpo), changes={"reliability": 0.9})[0] == pytest.approx(-0.3752835 * 0.1, abs=5e-9)
    assert of(label_posterior(dpo), pair(reliability=0.9)).item() == pytest.approx(0.912713, abs=5e-7)
    assert value(lcpo(dpo), changes={"reliability": 1.0}) == pytest.approx(value(dpo), rel=1e-14)
    assert slopes(lcpo(dpo), changes={"reliability": 1.0}) == pytest.approx(slopes(dpo), rel=1e-12)


def test_doubt_far_from_the_model_grows_and_the_slope_falls_again() -> None:
    chosen, rejected = with_logit(torch.tensor([-6.0, -3.0, -1.0, 0.0, 3.0]))
    reliability = torch.full_like(rejected, 0.9)
    right = label_posterior(pmle)(chosen, rejected, reliability, gamma=1.0)
    assert right.tolist() == pytest.approx([0.0218, 0.3094, 0.7680, 0.9, 0.9945], abs=5e-5)
    lcpo(pmle)(chosen, rejected, reliability, gamma=1.0).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.abs().tolist() == pytest.approx([0.0193, 0.2620, 0.4991, 0.4, 0.0419], abs=6e-5)


def test_an_annotator_who_guesses_teaches_nothing() -> None:
    chosen, rejected = with_logit(torch.linspace(-8, 8, 17))
    lcpo(pmle)(chosen, rejected, torch.full_like(rejected, 0.5), gamma=1.0).sum().backward()
    assert chosen.grad is not None and chosen.grad.abs().max() < 1e-15


@pytest.mark.parametrize("loss", [dpo, pmle, ipo, simpo, cpo])
def test_fisher_identity(loss: object) -> None:
    pairs = random_pairs(0)
    pairs["chosen_logps"].requires_grad_()
    expected = torch.autograd.grad(of(lcpo(loss), pairs).sum(), pairs["chosen_logps"])[0]  # type: ignore[arg-type]
    logit = of(loss, swapped(pairs)) - of(loss, pairs)  # type: ignore[arg-type]
    eta = pairs["reliability"]
    marginal = -torch.logaddexp(logsigmoid(logit) + eta.log(), logsigmoid(-logit) + (1 - eta).log())
    found = torch.autograd.grad(marginal.sum(), pairs["chosen_logps"])[0]
    assert torch.allclose(expected, found, rtol=1e-9, atol=1e-12)


def test_what_other_losses_imply_for_the_worked_pair() -> None:
    for loss, options, logit in (
        (ipo, {}, 30.0),
        (cpo, {}, 2.2),
        (simpo, {"beta": 2.0, "gamma": 1.0}, -1.885581),
    ):
        right = of(label_posterior(loss), pair(reliability=0.5), **options)  # type: ignore[arg-type]
        assert right.logit().item() == pytest.approx(logit, abs=2e-3 if loss is ipo else 5e-7)
    assert of(label_posterior(simpo), pair(reliability=0.5), gamma=1.0).item() == pytest.approx(0.131749, abs=5e-7)


def test_at_the_reference_the_posterior_is_the_reliability_and_the_first_step_that_of_cdpo() -> None:
    same = {"ref_chosen_logps": -12.0, "ref_rejected_logps": -14.0, "reliability": 0.8}
    assert of(label_posterior(dpo), pair(**same)).item() == pytest.approx(0.8, rel=1e-14)
    first = slopes(lcpo(dpo), changes=same)
    assert first == pytest.approx(slopes(cdpo, changes=same, label_smoothing=0.2), rel=1e-12)


@pytest.mark.parametrize("start", [0.55, 0.9, 0.99, 0.1])
def test_reliability_finds_the_share_of_right_labels(start: float) -> None:
    generator = torch.Generator().manual_seed(0)
    count, flips = 200_000, 0.25
    logits = torch.randn(count, generator=generator, dtype=torch.float64) * 2
    first_is_better = torch.rand(count, generator=generator, dtype=torch.float64) < logits.sigmoid()
    wrong = torch.rand(count, generator=generator, dtype=torch.float64) < flips
    logit_of_label = torch.where(first_is_better ^ wrong, logits, -logits)
    reliability = torch.tensor([start], dtype=torch.float64)
    for _ in range(200):
        right = posterior(logit_of_label, reliability)
        reliability = updated_reliability(reliability, right, torch.zeros(count, dtype=torch.int64), rate=1.0)
    # Four standard errors of a share, doubled for what the posterior does not tell.
    assert reliability.item() == pytest.approx(1 - flips, abs=8 * (0.25 * 0.75 / count) ** 0.5)


def test_each_annotator_moves_by_its_own_pairs() -> None:
    before = torch.tensor([0.9, 0.6, 0.7], dtype=torch.float64)
    after = updated_reliability(before, torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0, 0, 1]), rate=0.1)
    assert after.tolist() == pytest.approx([0.9 * 0.9 + 0.1 * 0.75, 0.9 * 0.6 + 0.1 * 0.2, 0.7])
    assert before.tolist() == [0.9, 0.6, 0.7]
    edge = updated_reliability(before, torch.ones(1), torch.tensor([2]), rate=1.0)
    assert edge[2].item() == pytest.approx(1 - 1e-3)
    with pytest.raises(ValueError, match=r"rate=1.5: expected a number in \[0, 1\]"):
        updated_reliability(before, torch.ones(1), torch.tensor([2]), rate=1.5)
