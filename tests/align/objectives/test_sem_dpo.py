"""Sem-DPO: weights of the card, normalisation, and DPO as a limit."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.align.objectives import dpo, sem_dpo
from tests.align.objectives.example import of, pair, random_pairs, slopes, value

WEIGHTS = {
    1.0: (1, 0.904837, 0.606531, 0.367879, 0.135335),
    2.0: (1, 0.818731, 0.367879, 0.135335, 0.018316),
    5.0: (1, 0.606531, 0.082085, 0.006738, 4.5e-5),
}


def test_the_worked_pair() -> None:
    assert value(sem_dpo, changes={"similarity": 0.8}, alpha=2.0) == pytest.approx(0.416240, abs=5e-7)
    assert slopes(sem_dpo, changes={"similarity": 0.8}, alpha=2.0)[0] == pytest.approx(-0.0310070, abs=5e-8)


@pytest.mark.parametrize("alpha", WEIGHTS)
def test_the_table_of_weights(alpha: float) -> None:
    plain = value(dpo)
    found = [value(sem_dpo, changes={"similarity": c}, alpha=alpha) / plain for c in (1.0, 0.9, 0.5, 0.0, -1.0)]
    assert found == pytest.approx(WEIGHTS[alpha], abs=6e-7)


def test_without_alpha_it_is_dpo_to_the_bit() -> None:
    pairs = random_pairs(0)
    assert torch.equal(of(sem_dpo, pairs, alpha=0.0), of(dpo, pairs))


def test_the_normalised_batch_is_a_weighted_mean() -> None:
    losses = (0.620957, 0.3, 1.2)
    one = pair(similarity=0.0)
    batch = {name: tensor.detach().repeat(3) for name, tensor in one.items()}
    # beta margins whose dpo is the loss wanted, and similarities whose weights are 0.5, 1, 0.2
    batch["chosen_logps"] = torch.tensor([-13.5 - math.log(math.expm1(loss)) / 0.1 for loss in losses]).double()
    batch["similarity"] = torch.tensor([1 + math.log(w) for w in (0.5, 1.0, 0.2)]).double()
    assert of(sem_dpo, batch, alpha=1.0).mean().item() == pytest.approx(0.283493, abs=5e-7)
    assert of(sem_dpo, batch, alpha=1.0, normalize=True).mean().item() == pytest.approx(0.500281, abs=5e-7)
