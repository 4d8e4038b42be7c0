"""NorMuon beside its twin, and what its rows must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import Muon, NorMuon, orthogonalize
from burnish.optim.normuon import normalize_rows
from tests.optim.reference import MuonTwin, lockstep, tensors

MATRICES = tensors((4, 3), (3, 4), (2, 6), (2, 3, 5), (3, 4, 2, 2), seed=1)
FUSED = tensors((4, 6), (2, 4, 6), (4, 3, 2, 1), seed=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"weight_decay": 0.2},
    "beta2": {"beta2": 0.5, "nesterov": False},
    "scale": {"scale": "match_rms_adamw", "momentum_form": "accumulate"},
    "svd": {"orthogonalization": "svd"},
}
VIEWS: dict[str, dict[str, Any]] = {
    "transposed": {"transposed": True},
    "heads": {"heads": 2},
    "splits": {"splits": (1, 3)},
    "transposed-splits": {"transposed": True, "splits": (2, 4)},
}


def twin(values: list[Tensor], options: dict[str, Any], **view: Any) -> MuonTwin:
    return MuonTwin(
        values, lr=0.02, weight_decay=options.get("weight_decay", 0.0), row_beta2=options.get("beta2", 0.95),
        nesterov=options.get("nesterov", True), form=options.get("momentum_form", "ema"),
        scale=options.get("scale", "original"), method=options.get("orthogonalization", "newton-schulz"), **view,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("view", VIEWS)
def test_u7_3_each_step_equals_the_twin_with_resumes_and_resting_tensors(variant: str, view: str) -> None:
    options = VARIANTS[variant]

    def build(parameters: list[list[Tensor]]) -> NorMuon:
        matrices, fused = parameters
        groups = [{"params": matrices, "use_muon": True}, {"params": fused, "use_muon": True, **VIEWS[view]}]
        return NorMuon(groups, **options)

    lockstep([twin(MATRICES, options), twin(FUSED, options, **VIEWS[view])], build, resume=(4, 9), tolerance=2e-12)


def test_the_first_step_has_rows_of_one_length_and_the_norm_of_muon() -> None:
    gradient = torch.tensor([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]], dtype=torch.float64)
    direction = orthogonalize(gradient)
    moment = torch.zeros(3, 1, dtype=torch.float64)
    rows = normalize_rows(direction, moment, beta2=0.95, eps=1e-10)
    assert rows.square().mean(1).sqrt().tolist() == pytest.approx([0.4793079] * 3, abs=5e-6)
    assert float(rows.norm()) == pytest.approx(1.17405967, abs=1e-5)  # eps of the published matrix moves digit 6
    assert float(rows.norm()) == pytest.approx(float(direction.norm()), rel=1e-9)
    assert float(rows.square().mean(1).var()) < 1e-16
    assert torch.equal(rows.sign(), direction.sign())
    torch.testing.assert_close(moment[:, 0], 0.05 * direction.square().mean(1))


def test_the_second_step_remembers_the_first() -> None:
    """Two rows, V from zero: after O_1 = diag(1, 2) and O_2 = diag(1, 1) the rows are as 1 : sqrt(1.95 / 4.8)."""
    moment = torch.zeros(2, 1, dtype=torch.float64)
    normalize_rows(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)), moment, beta2=0.95, eps=0.0)
    rows = normalize_rows(torch.eye(2, dtype=torch.float64), moment, beta2=0.95, eps=0.0)
    assert float(rows[1, 1] / rows[0, 0]) == pytest.approx((1.95 / 4.8) ** 0.5)
    assert float(rows.norm()) == pytest.approx(2**0.5)


def test_rows_without_a_gradient_do_not_move() -> None:
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    weight.grad = tensors((4, 3))[0]
    weight.grad[1] = 0
    NorMuon([weight], lr=0.1).step()
    assert torch.equal(weight[1], torch.ones(3, dtype=torch.float64)) and not torch.equal(weight[2], weight[1])


def test_vectors_go_as_in_muon() -> None:
    results = []
    for kind in (Muon, NorMuon):
        vector = nn.Parameter(torch.ones(3))
        optimizer = kind([vector], lr=0.1, weight_decay=0.2)
        for t in range(3):
            vector.grad = torch.tensor([1.0, -1.0, t])
            optimizer.step()
        assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
        results.append(vector.detach())
    assert torch.equal(*results)


def test_row_statistics_of_half_precision_weights_are_float32() -> None:
    weight = nn.Parameter(torch.ones(2, 6, 3, dtype=torch.bfloat16))
    optimizer = NorMuon([weight])
    rows = optimizer.state[weight]["row_second_moment"]
    assert (rows.shape, rows.dtype) == ((2, 6, 1), torch.float32)
    weight.grad = torch.ones_like(weight) * 0.5
    optimizer.step()
    saved = optimizer.state_dict()
    again = NorMuon([nn.Parameter(weight.detach().clone())])
    again.load_state_dict(saved)
    loaded = again.state[again.param_groups[0]["params"][0]]["row_second_moment"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, rows) and rows.any()
