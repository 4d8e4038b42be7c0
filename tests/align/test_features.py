"""Features: means of hidden states whatever the batch, and directions that a known structure has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.align.features import Projection, pooled_states, principal_directions
from tests.align.tiny_policy import tiny_causal

TREES = [
    {"prompt_ids": [1, 40, 41, 42], "branch_ids": [[50, 51, 2], [60]]},
    {"prompt_ids": [1], "branch_ids": [[70, 71, 72, 73, 74, 2], [70, 71]]},
]


def test_a_feature_is_the_mean_state_of_the_completions_tokens() -> None:
    model = tiny_causal(num_hidden_layers=2)
    found = pooled_states(model, TREES, pad=0)
    row = 0
    for tree in TREES:
        for branch in tree["branch_ids"]:
            ids = torch.tensor([[*tree["prompt_ids"], *branch]])
            with torch.no_grad():
                states = model.model(ids).last_hidden_state[0, len(tree["prompt_ids"]) :]
            assert torch.allclose(found[row], states.mean(0), atol=1e-5)
            row += 1
    assert row == len(found) and found.dtype == torch.float32


def grouped_states() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Completions differ along two directions, prompts along a third, much longer one."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3, generator=generator, dtype=torch.float64)).Q.T
    states = []
    for _ in range(40):
        weights = torch.randn(4, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
        states.append(weights @ basis[:2] + 100 * torch.randn(1, generator=generator, dtype=torch.float64) * basis[2])
    return states, basis


def test_directions_are_those_in_which_completions_of_one_prompt_differ() -> None:
    states, basis = grouped_states()
    found = principal_directions(states, 5)
    assert found.directions.shape == (2, 12)  # no more are there
    assert torch.allclose((found.directions @ basis[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=0.1)
    assert torch.allclose(found.directions @ basis[2], torch.zeros(2, dtype=torch.float64), atol=1e-8)
    assert found.share == pytest.approx(1.0)
    centred = torch.cat([rows - rows.mean(0) for rows in states])
    variances = torch.cat([found(rows) - found(rows).mean(0) for rows in states]).square().sum(0)
    assert torch.allclose(variances, torch.linalg.eigvalsh(centred.T @ centred).flip(0)[:2])
    first = principal_directions(states, 1)
    assert first.share == pytest.approx(float(variances[0] / variances.sum()))
    assert torch.allclose(first.directions, found.directions[:1])


def test_signs_are_fixed() -> None:
    states, _ = grouped_states()
    found = principal_directions(states, 2).directions
    turned = principal_directions([-rows for rows in states], 2).directions
    assert torch.allclose(found, turned)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_projection_is_the_same_after_saving(tmp_path: Path) -> None:
    states, _ = grouped_states()
    found = principal_directions(states, 2)
    found.save(tmp_path / "p.safetensors")
    loaded = Projection.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.directions, found.directions) and loaded.share == found.share
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    assert torch.allclose(loaded(states[0].float()), states[0].float().double() @ found.directions.T)


def test_nothing_to_tell_apart() -> None:
    states = [torch.randn(1, 8).expand(3, 8) for _ in range(4)]
    with pytest.raises(ValueError, match="all have equal states"):
        principal_directions(states, 2)
    with pytest.raises(ValueError, match="num_features=0"):
        principal_directions(states, 0)
