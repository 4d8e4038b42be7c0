"""Directions in which a zeroth-order method looks: drawn from a seed each time they are needed, never stored.

Every perturbation answers one question, z = `draw(weights)`, for a tensor or a piece of it. Elementwise ones are drawn
in pieces that fit in the cache, so that a pass over the weights reads and writes them once and holds no copy of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from burnish.optim.blocks import derived_seed

# Elements drawn at a time. The numbers of a direction depend on it, so that it is part of what a log says.
NOISE_PIECE = {"cpu": 2**17}
DEVICE_PIECE = 2**25


def noise_layout(device: torch.device) -> str:
    """What the numbers of a seed depend on besides the tensors: the generator's device and the piece."""
    return f"{device.type}/{NOISE_PIECE.get(device.type, DEVICE_PIECE)}"


@dataclass(frozen=True)
class Row:
    """One tensor of a block, in pieces.

    Attributes:
        index: of the tensor among all tensors.
        copied: whether the weights are a copy.
        pieces: views of equal shape: the weights that are looked at and updated, the tensor of the model (the same one
            where there is no copy), and the optimizer's buffers.
        notes: what `Perturbation.prepare` left for the tensor.
    """

    index: int
    copied: bool
    pieces: tuple[tuple[Tensor, ...], ...]
    notes: dict[str, Tensor]


def row(index: int, columns: Sequence[Tensor], notes: dict[str, Tensor], *, split: bool) -> Row:
    """A row of tensors of one shape, in flat pieces where `split` allows it and all are contiguous."""
    size, copied = NOISE_PIECE.get(columns[0].device.type, DEVICE_PIECE), columns[0] is not columns[1]
    if not split or columns[0].numel() <= size or not all(tensor.is_contiguous() for tensor in columns):
        return Row(index, copied, (tuple(columns),), notes)
    views = [torch.split(tensor.view(-1), size) for tensor in columns]
    return Row(index, copied, tuple(zip(*views, strict=True)), notes)


@dataclass(frozen=True)
class Source:
    """Where the numbers of one direction come from.

    Attributes:
        generator: seeded for this direction.
        slow_seed: of what stays the same for `interval` steps: equal within each such epoch.
        index: of the tensor.
        notes: what `prepare` left for the tensor.
        bases: subspaces that were made before, by tensor.
    """

    generator: torch.Generator
    slow_seed: int
    index: int
    notes: dict[str, Tensor]
    bases: dict[int, tuple[int, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Perturbation:
    """How a direction z is drawn. z is float32 (float64 for float64 weights) and of unit variance where nothing else
    is said, so that E[z z'] = I and the two-point estimate (z.g) z is an unbiased gradient.
    """

    elementwise: ClassVar[bool] = True
    unperturbed: ClassVar[bool] = False
    """It looks at the weights, which must be there without the perturbation."""

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z for a tensor, or for a piece of it where the perturbation is elementwise."""
        raise NotImplementedError

    def prepare(self, weights: Tensor) -> dict[str, Tensor]:
        """Small tensors to keep from the base weights."""
        return {}

    @property
    def epoch_length(self) -> int:
        """Steps for which a part of it stays the same."""
        return 1

    def describe(self) -> dict[str, Any]:
        """JSON-ready; `perturbation(**described)` builds it again."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Gaussian(Perturbation):
    """Independent standard normal numbers, as in MeZO (arXiv 2305.17333)."""

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z `[...]`, of the shape of the weights."""
        return _normal(weights, weights.shape, source.generator)


@dataclass(frozen=True)
class Rademacher(Perturbation):
    """Independent signs: the second moment of the estimate is d |g|^2 instead of (d + 2) |g|^2 (Spall 1992)."""

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z `[...]` of -1 and 1."""
        signs = torch.randint(
            2, weights.shape, generator=source.generator, dtype=_dtype(weights), device=weights.device
        )
        return signs.mul_(2).sub_(1)


@dataclass(frozen=True)
class LowRank(Perturbation):
    """Matrices of low rank, U V': U is new each step, V after `interval` steps. One-dimensional tensors are Gaussian.

    Attributes:
        rank: of the matrices; a tensor of more than two dimensions is the matrix [first, all others].
        interval: steps between new V.
        normalize: divide by sqrt(rank), so that E[z z'] = I; False is the released code, whose step is `rank` times as
            long.

    Source: LOZO, arXiv 2410.07698. The released code updates in another direction than it perturbed in when V is new;
    this one does not.
    """

    rank: int = 2
    interval: int = 50
    normalize: bool = True
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_counts(self, "rank", "interval")

    @property
    def epoch_length(self) -> int:
        """Steps for which V stays."""
        return self.interval

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z `[m, ...]` of rank at most `rank`."""
        if weights.ndim < 2:
            return _normal(weights, weights.shape, source.generator)
        columns = weights.numel() // max(len(weights), 1)

        def fresh(generator: torch.Generator) -> tuple[Tensor, ...]:
            return (_normal(weights, (self.rank, columns), generator),)

        (right,) = _basis(weights, source, fresh)
        left = _normal(weights, (len(weights), self.rank), source.generator)
        scale = self.rank**-0.5 if self.normalize else 1.0
        return (left.mul_(scale) @ right).view(weights.shape)


@dataclass(frozen=True)
class Subspace(Perturbation):
    """sqrt(m n) / r U Z V' with a new Gaussian Z `[r, r]` each step and orthonormal U, V that change after `interval`
    steps. One-dimensional tensors are Gaussian.

    Attributes:
        rank: r; at most the smaller side of a matrix.
        interval: steps between new U and V.

    Source: SubZero, arXiv 2410.08989.
    """

    rank: int = 24
    interval: int = 1000
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_counts(self, "rank", "interval")

    @property
    def epoch_length(self) -> int:
        """Steps for which U and V stay."""
        return self.interval

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z `[m, ...]` in the span of U and V."""
        if weights.ndim < 2 or not weights.numel():
            return _normal(weights, weights.shape, source.generator)
        rows, columns = len(weights), weights.numel() // len(weights)
        rank = min(self.rank, rows, columns)

        def fresh(generator: torch.Generator) -> tuple[Tensor, ...]:
            both = [_normal(weights, (side, rank), generator) for side in (rows, columns)]
            return tuple(torch.linalg.qr(matrix).Q for matrix in both)

        left, right = _basis(weights, source, fresh)
        core = _normal(weights, (rank, rank), source.generator).mul_((rows * columns) ** 0.5 / rank)
        return (left @ core @ right.mT).view(weights.shape)


@dataclass(frozen=True)
class Sparse(Perturbation):
    """Gaussian numbers on a part of the weights.

    Attributes:
        keep: share that is perturbed.
        by: "magnitude" keeps weights at most as large as the base weights' `keep` quantile of their tensor (SparseMeZO,
            arXiv 2402.15751: small weights); "random" draws a new mask each step.
    """

    keep: float = 0.25
    by: Literal["magnitude", "random"] = "magnitude"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: expected a share in (0, 1]")
        if self.by not in ("magnitude", "random"):
            raise ValueError(f"by={self.by!r}: choose magnitude or random")

    @property
    def unperturbed(self) -> bool:  # type: ignore[override]
        """A mask by magnitude must be the same before and after the weights are moved."""
        return self.by == "magnitude"

    def prepare(self, weights: Tensor) -> dict[str, Tensor]:
        """The largest magnitude that is perturbed."""
        if self.by == "random" or not weights.numel():
            return {}
        sizes = weights.detach().abs().flatten()
        return {"threshold": sizes.float().kthvalue(max(1, round(self.keep * sizes.numel()))).values}

    def draw(self, weights: Tensor, source: Source) -> Tensor:
        """z `[...]`, zero where the mask is."""
        noise = _normal(weights, weights.shape, source.generator)
        if self.by == "magnitude":
            return noise.mul_(weights.abs() <= source.notes["threshold"])
        mask = torch.rand(weights.shape, generator=source.generator, device=weights.device) < self.keep
        return noise.mul_(mask)


KINDS: dict[str, type[Perturbation]] = {
    kind.__name__: kind for kind in (Gaussian, Rademacher, LowRank, Subspace, Sparse)
}


def perturbation(kind: str, **options: Any) -> Perturbation:
    """Build a perturbation by name: what `Perturbation.describe` says.

    Raises:
        ValueError: unknown name, or an option out of range.
    """
    names = {name.lower(): name for name in KINDS} | {"low-rank": "LowRank"}
    if kind.lower() not in names:
        raise ValueError(f"perturbation={kind!r}: choose one of gaussian, rademacher, low-rank, subspace, sparse")
    return KINDS[names[kind.lower()]](**options)


class Direction:
    """One direction over several tensors: walking it again gives the same numbers.

    Args:
        kind: how it is drawn.
        seed: of its numbers.
        slow_seed: of what stays for an epoch.
        bases: a dictionary that outlives the direction, for what an epoch shares.
        keep: hold the numbers after the first walk instead of drawing them again.
    """

    def __init__(
        self,
        kind: Perturbation,
        seed: int,
        slow_seed: int = 0,
        bases: dict[int, tuple[int, tuple[Tensor, ...]]] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.kind, self.seed, self.slow_seed = kind, seed, slow_seed
        self.bases = {} if bases is None else bases
        self._kept: list[Tensor] | None = None
        self._keep = keep

    def walk(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """z of each piece of each row, in order; the weights of a piece are looked at when it is drawn."""
        if self._kept is not None:
            yield from self._kept
            return
        drawn: list[Tensor] = []
        generators: dict[torch.device, torch.Generator] = {}
        for row in rows:
            device = row.pieces[0][0].device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(self.seed)
            source = Source(generators[device], self.slow_seed, row.index, row.notes, self.bases)
            for weights, *_ in row.pieces:
                noise = self.kind.draw(weights, source)
                if self._keep:
                    drawn.append(noise)
                yield noise
        if self._keep:
            self._kept = drawn


def _basis(weights: Tensor, source: Source, fresh: Any) -> tuple[Tensor, ...]:
    """What the steps of an epoch share for a tensor."""
    held = source.bases.get(source.index)
    if held is None or held[0] != source.slow_seed or held[1][0].device != weights.device:
        generator = torch.Generator(weights.device).manual_seed(derived_seed(source.slow_seed, source.index))
        held = source.bases[source.index] = (source.slow_seed, fresh(generator))
    return held[1]


def _dtype(weights: Tensor) -> torch.dtype:
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def _normal(weights: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=_dtype(weights), device=weights.device)


def _require_counts(options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: expected 1 or more")
