"""What the claims about ProxGen measure with: pruning to a share, the choice of a strength, whole runs in the small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from burnish.penalties import sparsity
from claims import proxgen


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten well separated classes in place of the images, and short runs."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 784, generator=draw)

    def images(scratch: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        count = 6000 if part == "train" else 500
        labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(len(part)))
        return centres[labels] + torch.randn(count, 784, generator=torch.Generator().manual_seed(count)), labels

    monkeypatch.setattr(proxgen, "images", images)
    monkeypatch.setattr(proxgen, "STEPS", 60)
    monkeypatch.setattr(proxgen, "QUANT_STEPS", 40)


def test_pruning_keeps_the_largest_of_all_matrices_together() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 21).view(5, 4))
        model[1].weight.copy_(-torch.arange(21.0, 31).view(2, 5))
    bias = model[0].bias.detach().clone()
    proxgen.prune(model, 0.9)
    assert sparsity(model).zeros == 27 and sorted(model[1].weight[model[1].weight != 0].tolist()) == [-30, -29, -28]
    assert torch.equal(model[0].bias, bias)


def test_the_strength_is_chosen_on_images_held_back() -> None:
    def run(held: float, test: float) -> dict[str, Any]:
        return {"pruned": {"held": held, "test": test}}

    assert proxgen.at_most({1.0: run(0.8, 0.9), 2.0: run(0.9, 0.7)}) == 0.7
    assert proxgen.spread([0.80, 0.81, 0.82]) == "81.00 ± 2.48"


def test_maps_leave_zeros_that_subgradients_do_not(toy: None, tmp_path: Path) -> None:
    ours, theirs = (proxgen.sparse_run(tmp_path, way, "l1/2", 1e-3, 0) for way in ("prox", "subgradient"))
    assert ours["zeros"] > 0.5 > 0.001 > theirs["zeros"]
    assert ours["pruned_zeros"] >= 0.9 and theirs["pruned_zeros"] == pytest.approx(0.9, abs=1e-4)
    assert min(one["accuracy"]["test"] for one in (ours, theirs)) > 0.9


def test_levels_are_reached_and_runs_are_remembered(toy: None, tmp_path: Path) -> None:
    weak, strong = (
        proxgen.remembered(tmp_path, proxgen.quantized_run, "revised", "ternary", rate, 0) for rate in (1e-6, 1e-1)
    )
    assert strong["distance_at_rounding"] < 0.01 < 0.02 < weak["distance_at_rounding"]
    file = tmp_path / "proxgen" / "quantized_run-revised-ternary-0.1-0.json"
    file.write_text(file.read_text().replace(str(strong["distance_at_rounding"]), "7.0"))
    again = proxgen.remembered(tmp_path, proxgen.quantized_run, "revised", "ternary", 1e-1, 0)
    assert again["distance_at_rounding"] == 7.0


def test_every_claim_says_before_what_counts() -> None:
    assert len({claim.name for claim in proxgen.CLAIMS}) == len(proxgen.CLAIMS) == 4
    for claim in proxgen.CLAIMS:
        assert claim.budget == "cpu-minutes" and "partly" in claim.reproduced_if
