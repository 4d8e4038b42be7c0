"""Signal and noise of minibatch gradients or updates at fixed parameters, in the dominant subspace and in the bulk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from burnish.diagnose.eigenpairs import Eigenpairs
from burnish.diagnose.subspace import Vector, bulk, dominant, laid_out


@dataclass(frozen=True)
class SignalAndNoise:
    """The mean of sampled vectors, and how far they scatter, as squared lengths in both subspaces.

    The square of a mean of S samples exceeds that of the expectation by the noise over S, which is taken off here, so
    that signals are unbiased; one that is lost in the noise can come out below 0.

    Attributes:
        num_samples: S.
        mean: Tensor `[numel]`, float64.
        dominant_signal: ||P m||^2 of the expectation m.
        bulk_signal: ||(I - P) m||^2.
        dominant_noise: trace of P C, with the covariance C of one sample.
        bulk_noise: trace of (I - P) C.
    """

    num_samples: int
    mean: Tensor
    dominant_signal: float
    bulk_signal: float
    dominant_noise: float
    bulk_noise: float

    @property
    def signal_alignment(self) -> float:
        """chi of the signal: ||P m|| / ||m||."""
        return _alignment(self.dominant_signal, self.bulk_signal)

    @property
    def noise_alignment(self) -> float:
        """chi of the noise: the root of the dominant share of its variance."""
        return _alignment(self.dominant_noise, self.bulk_noise)


def signal_and_noise(vectors: Iterable[Vector], subspace: Eigenpairs) -> SignalAndNoise:
    """Split samples into mean (signal) and deviation (noise), and both into dominant and bulk part.

    Only sums are kept, so the samples may be a generator.

    Args:
        vectors: at least 2 of Tensor `[numel]` (or a tensor a parameter), independent: gradients of minibatches drawn
            at the same parameters, or the updates that an optimizer makes of them.
        subspace: at these parameters.

    Raises:
        ValueError: fewer than 2 samples, or of another size than the eigenvectors.

    Source: the question (which part of an orthogonalised update is noise) is AMUSE's, arXiv 2605.22432; the estimators
    are the usual unbiased ones.
    """
    subspace = replace(subspace, vectors=subspace.vectors.double())
    total: Tensor | None = None
    count, squares = 0, [0.0, 0.0]
    for vector in vectors:
        whole = laid_out(vector, subspace)
        total = whole if total is None else total + whole
        count += 1
        for index, part in enumerate((dominant(vector, subspace), bulk(vector, subspace))):
            squares[index] += float(part.square().sum())
    if total is None or count < 2:
        raise ValueError(f"{count} samples: expected at least 2, to tell noise from signal")
    mean = total / count
    of_mean = [float(part.square().sum()) for part in (dominant(mean, subspace), bulk(mean, subspace))]
    noise = [(square - count * energy) / (count - 1) for square, energy in zip(squares, of_mean, strict=True)]
    signal = [energy - variance / count for energy, variance in zip(of_mean, noise, strict=True)]
    return SignalAndNoise(count, mean, *signal, *noise)


def _alignment(dominant_energy: float, bulk_energy: float) -> float:
    """NaN where there is nothing to align."""
    inside, total = max(dominant_energy, 0.0), max(dominant_energy, 0.0) + max(bulk_energy, 0.0)
    return math.sqrt(inside / total) if total else math.nan
