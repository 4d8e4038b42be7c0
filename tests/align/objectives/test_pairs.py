"""Soft labels of any pair loss."""

from __future__ import annotations

import inspect

import pytest
import torch

from burnish.align.objectives import OBJECTIVES, cpo, dpo, mixture
from burnish.align.objectives.pairs import input_names, other
from tests.align.objectives.example import of, random_pairs, swapped

PAIRED = [row for row in OBJECTIVES.values() if row.soft is not None and row.name != "sparse-po"]


def test_names_are_exchanged() -> None:
    assert other("chosen_logps") == "rejected_logps"
    assert other("ref_rejected_logps") == "ref_chosen_logps"
    assert other("similarity") == "similarity"


def test_the_signature_asks_for_labels_last_and_for_both_answers() -> None:
    assert input_names(mixture(cpo)) == (
        "chosen_logps",
        "rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
        "labels",
    )
    assert inspect.signature(mixture(cpo)).parameters["beta"].default == 0.1


@pytest.mark.parametrize("row", PAIRED, ids=lambda row: row.name)
def test_hard_labels_are_the_loss_of_either_order_and_others_between(row: object) -> None:
    pairs = random_pairs(0)
    soft, loss = mixture(row.loss), row.loss  # type: ignore[attr-defined]
    kept, flipped = of(loss, pairs), of(loss, swapped(pairs))
    ones = torch.ones(6).double()
    assert torch.equal(of(soft, pairs | {"labels": ones}), kept)
    assert torch.equal(of(soft, pairs | {"labels": 0 * ones}), flipped)
    assert torch.allclose(of(soft, pairs | {"labels": 0.3 * ones}), 0.3 * kept + 0.7 * flipped, rtol=1e-13)
    both = of(soft, swapped(pairs) | {"labels": 0.7 * ones})
    assert torch.allclose(both, of(soft, pairs | {"labels": 0.3 * ones}), rtol=1e-12)


def test_it_takes_positions_and_names_alike() -> None:
    pairs = random_pairs(1)
    labels = torch.full((6,), 0.2, dtype=torch.float64)
    tensors = [pairs[name] for name in input_names(dpo)]
    expected = 0.2 * of(dpo, pairs, beta=0.4) + 0.8 * of(dpo, swapped(pairs), beta=0.4)
    assert torch.allclose(mixture(dpo)(*tensors, labels, beta=0.4), expected, rtol=1e-6)
    assert torch.equal(mixture(dpo)(*tensors, labels, beta=0.4), of(mixture(dpo), pairs | {"labels": labels}, beta=0.4))
