"""How long a step is, by rule and shape."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.optim import orthogonalize
from burnish.optim.scale import SCALES, scale_factor


@pytest.mark.parametrize(
    ("rule", "wide", "tall", "square"),
    [
        ("original", 1.0, math.sqrt(16 / 9), 1.0),
        ("match_rms_adamw", 0.2 * 4, 0.2 * 4, 0.2 * 3),
        ("spectral", 3 / 4, 4 / 3, 1.0),
        ("none", 1.0, 1.0, 1.0),
    ],
)
def test_each_rule_for_rows_and_columns(rule: str, wide: float, tall: float, square: float) -> None:
    assert [scale_factor(rule, *shape) for shape in ((9, 16), (16, 9), (9, 9))] == pytest.approx([wide, tall, square])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8)])
def test_match_rms_gives_entries_of_root_mean_square_one_fifth(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    step = orthogonalize(torch.randn(shape, dtype=torch.float64), method="svd") * scale_factor(
        "match_rms_adamw", *shape
    )
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8)])
def test_spectral_changes_outputs_of_unit_root_mean_square_by_as_much(shape: tuple[int, int]) -> None:
    """An input along a singular direction with entries of RMS 1 gives an output with entries of RMS 1."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    step = u @ vh * scale_factor("spectral", *shape)
    assert float((step @ vh[0] * math.sqrt(shape[1])).square().mean().sqrt()) == pytest.approx(1.0)


def test_the_conversion_in_the_documentation() -> None:
    """lr under match_rms_adamw is lr under original / (0.2 sqrt(d)) for a square matrix of width d."""
    ratio = scale_factor("original", 64, 64) / scale_factor("match_rms_adamw", 64, 64)
    assert ratio == pytest.approx(1 / (0.2 * math.sqrt(64)))


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'rms' is unknown: choose one of {', '.join(SCALES)}"):
        scale_factor("rms", 2, 2)
