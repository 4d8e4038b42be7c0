"""PMLE: the card's pairs, and DPO with a uniform reference."""

from __future__ import annotations

import pytest
import torch

from burnish.align.objectives import dpo, pmle
from tests.align.objectives.example import of, random_pairs, slopes, value

LONG = {"chosen_logps": -40.0, "rejected_logps": -42.5}


def test_the_numbers_of_the_card() -> None:
    assert value(pmle, gamma=0.1) == pytest.approx(0.598139, abs=5e-7)
    assert value(pmle, changes=LONG, gamma=0.01) == pytest.approx(0.680725, abs=5e-7)
    assert slopes(pmle, changes=LONG, gamma=0.01) == pytest.approx((-0.0049375, 0.0049375), abs=5e-8)
    assert value(pmle, changes=LONG, gamma=0.5) == pytest.approx(0.251929, abs=5e-7)
    assert slopes(pmle, changes=LONG, gamma=0.5)[0] == pytest.approx(-0.111350, abs=5e-7)


@pytest.mark.parametrize("level", [0.0, -7.0])
def test_it_is_dpo_with_a_uniform_reference(level: float) -> None:
    pairs = random_pairs(0)
    uniform = pairs | {f"ref_{side}_logps": torch.full((6,), level).double() for side in ("chosen", "rejected")}
    assert torch.allclose(of(dpo, uniform, beta=0.3), of(pmle, pairs, gamma=0.3), rtol=1e-12)
