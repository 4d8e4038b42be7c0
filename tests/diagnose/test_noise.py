"""Signal and noise against closed forms and NumPy's covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.diagnose import Eigenpairs, signal_and_noise


def axis(size: int) -> Eigenpairs:
    """The dominant subspace is the first coordinate."""
    return Eigenpairs(torch.ones(1), torch.eye(size)[:, :1], torch.zeros(1), 0)


def test_two_samples_by_hand() -> None:
    mean, deviation = torch.tensor([5.0, 4.0, 0.0]), torch.tensor([3.0, 1.0, 2.0])
    seen = signal_and_noise([mean + deviation, mean - deviation], axis(3))
    assert seen.num_samples == 2 and seen.mean.tolist() == [5, 4, 0]
    assert (seen.dominant_noise, seen.bulk_noise) == (18, 10)  # 2 d^2
    assert (seen.dominant_signal, seen.bulk_signal) == (16, 11)  # m^2 - d^2
    assert seen.noise_alignment == pytest.approx((18 / 28) ** 0.5)
    assert seen.signal_alignment == pytest.approx((16 / 27) ** 0.5)


def test_equals_the_covariance_of_numpy_in_any_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
    samples = torch.randn(40, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    seen = signal_and_noise(iter(samples), Eigenpairs(torch.ones(2), basis, torch.zeros(2), 0))
    inside = (basis @ basis.mT).numpy()
    covariance = np.cov(samples.numpy().T)
    assert seen.dominant_noise == pytest.approx(np.trace(inside @ covariance))
    assert seen.bulk_noise == pytest.approx(np.trace((np.eye(6) - inside) @ covariance))


def test_signals_are_unbiased() -> None:
    """Expectation (1, 2), noise variance (4, 1) a coordinate, 4 samples a study, 2,000 studies."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 4, 2, generator=generator) * torch.tensor([2.0, 1.0]) + torch.tensor([1.0, 2.0])
    studies = [signal_and_noise(samples, axis(2)) for samples in draws]
    dominant = np.array([study.dominant_signal for study in studies])
    bulk = np.array([study.bulk_signal for study in studies])
    for values, truth in ((dominant, 1.0), (bulk, 4.0)):
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - truth) < 4 * error and error < 0.1
    assert (dominant < 0).any()


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="1 samples: expected at least 2"):
        signal_and_noise([torch.zeros(3)], axis(3))
    with pytest.raises(ValueError, match="0 samples"):
        signal_and_noise([], axis(3))
