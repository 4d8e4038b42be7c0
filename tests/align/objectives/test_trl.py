"""Equality with TRL's own loss code, run on log-probabilities of our choice: its trainers are not constructed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.align.objectives import kto_kl, objective
from burnish.align.objectives.orpo import log_odds
from burnish.align.objectives.sequences import per_token

LENGTHS = torch.tensor([3, 9, 1, 5, 7, 2, 4, 8])  # four chosen, four rejected
PROMPT = 2
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
DPO_LOSSES = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {"average": True}),
    "exo_pair": ("exo", {"label_smoothing": 0.1}),
    "robust": ("rdpo", {"label_smoothing": 0.1}),
    "sigmoid_norm": ("sigmoid-norm", {}),
}


def token_logps(lengths: Tensor, seed: int) -> Tensor:
    """Log-probabilities of tokens, zero outside of completions, as TRL's fused head gives them."""
    generator = torch.Generator().manual_seed(seed)
    mask = completion_mask(lengths)[:, 1:]
    return torch.randn(mask.shape, generator=generator).abs().mul(-2) * mask


def completion_mask(lengths: Tensor) -> Tensor:
    positions = torch.arange(PROMPT + int(lengths.max()))
    return ((positions >= PROMPT) & (positions < PROMPT + lengths[:, None])).long()


def stand_in(**settings: Any) -> SimpleNamespace:
    """What TRL's loss code reads of its trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip


def model_of(log_probs: Tensor) -> Any:
    zeros = torch.zeros_like(log_probs)
    return lambda **_: SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("theirs", DPO_LOSSES)
def test_losses_of_pairs(theirs: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    ours, options = DPO_LOSSES[theirs]
    tokens, reference = token_logps(LENGTHS, 0).requires_grad_(), token_logps(LENGTHS, 1).sum(1)
    mask = completion_mask(LENGTHS)
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference[:4], "ref_rejected_logps": reference[4:]}
    trainer = stand_in(loss_types=[theirs], beta=0.3, label_smoothing=options.get("label_smoothing", 0.0))
    expected = DPOTrainer._compute_loss(trainer, model_of(tokens), batch, False)

    logps = tokens.sum(1)
    available = {"chosen_logps": logps[:4], "rejected_logps": logps[4:], **batch}
    available |= {"chosen_lengths": LENGTHS[:4], "rejected_lengths": LENGTHS[4:]}
    found = objective(ours, beta=0.3, **options)(available).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    mine, other = torch.autograd.grad(found, tokens)[0], torch.autograd.grad(expected, tokens)[0]
    assert torch.allclose(mine * completion_mask(LENGTHS)[:, 1:], other * completion_mask(LENGTHS)[:, 1:], atol=1e-6)


@pytest.mark.parametrize("kl_shift", [0.0, -50.0])
def test_kto(kl_shift: float) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    tokens, reference = token_logps(LENGTHS, 0), token_logps(LENGTHS, 1).sum(1)
    mismatched, ref_mismatched = token_logps(LENGTHS, 2).sum(1), token_logps(LENGTHS, 3).sum(1) + kl_shift
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    mask = completion_mask(LENGTHS)
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": labels}
    batch |= {"ref_logps": reference, "ref_KL_logps": ref_mismatched}
    trainer = stand_in(
        loss_type="kto", beta=0.3, calculate_KL=True, desirable_weight=1.25, undesirable_weight=0.75,
        _compute_kl_logps=lambda *_: mismatched,
    )  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, model_of(tokens), batch, False)
    available = {"logps": tokens.sum(1), "ref_logps": reference, "labels": labels}
    available["kl"] = kto_kl(mismatched, ref_mismatched)
    found = objective("kto", beta=0.3, desirable_weight=1.25, undesirable_weight=0.75)(available).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("theirs", ["sigmoid", "simpo"])
def test_cpo_and_simpo(theirs: str) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logps = token_logps(LENGTHS, 0).sum(1)
    pair = {"chosen_logps": logps[:4], "rejected_logps": logps[4:]}
    pair |= {"chosen_lengths": LENGTHS[:4], "rejected_lengths": LENGTHS[4:]}
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=ACCELERATOR, beta=2.0, loss_type=theirs, label_smoothing=0.0, simpo_gamma=0.7
    )
    if theirs == "simpo":
        means = per_token(logps, LENGTHS)
        expected = CPOTrainer.cpo_loss(trainer, means[:4], means[4:])[0]
        found = objective("simpo", beta=2.0, gamma=0.7)(pair)
    else:
        # TRL adds `cpo_alpha` times the mean over tokens outside of this function.
        expected = CPOTrainer.cpo_loss(trainer, logps[:4], logps[4:])[0]
        found = objective("cpo", beta=2.0, alpha=0.0)(pair)
        assert torch.equal(objective("pmle", gamma=2.0)(pair), found)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_orpo() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps = token_logps(LENGTHS, 0).sum(1)
    pair = {"chosen_logps": logps[:4], "rejected_logps": logps[4:]}
    pair |= {"chosen_lengths": LENGTHS[:4], "rejected_lengths": LENGTHS[4:]}
    means = per_token(logps, LENGTHS)
    trainer = SimpleNamespace(beta=0.3, accelerator=ACCELERATOR)
    weighted, *_, log_odds_ratio = ORPOTrainer.odds_ratio_loss(trainer, means[:4], means[4:])
    assert torch.allclose(objective("orpo", beta=0.3)(pair), -means[:4] - weighted, rtol=1e-6)
    assert (log_odds(means[:4]) - log_odds(means[4:])).mean().item() == pytest.approx(log_odds_ratio.item(), rel=1e-5)
