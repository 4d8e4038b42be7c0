"""Orthogonalise matrices with matrix products alone: M = U S V^T becomes, nearly, its polar factor U V^T.

A quintic iteration X <- a X + (b A + c A A) X with A = X X^T leaves the singular vectors where they are and sends each
singular value s to a s + b s^3 + c s^5. Newton-Schulz does not reach 1: it lifts small values fast and lets the large
ones wander in [0.68, 1.13], which is what Muon is run with. Polar Express has other coefficients for each step and
stays nearer to 1 over a wider range, at the same cost.

Source: Newton-Schulz coefficients of K. Jordan et al., Muon (2024); Polar Express, arXiv 2505.16932, with those of the
Dion code; the Gram form after Zhang et al. (2026), restarted where bfloat16 needs it (ours, measured).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["newton-schulz", "polar-express", "gram", "svd"]
Quintic = tuple[float, float, float]

NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN = 1.02
MAX_STEPS = 100
RESTART_EVERY = 3
CPU_WORKING_SET = 12 * 2**20
GPU_WORKING_SET = 2 * 2**30


@dataclass(frozen=True)
class Iteration:
    """A way to orthogonalise: coefficients of each step, how the input is scaled, and in which form it is evaluated.

    Attributes:
        coefficients: (a, b, c) of each step.
        margin: the input is divided by `margin` times its Frobenius norm, so that rounding cannot lift a singular value
            above 1.
        gram: iterate on the Gram matrix and touch the long side only at restarts.
    """

    coefficients: tuple[Quintic, ...]
    margin: float = 1.0
    gram: bool = False


def iteration(method: Method = "newton-schulz", steps: int = 5) -> Iteration:
    """The coefficients of `steps` steps of a method that iterates.

    Raises:
        ValueError: the method is unknown, or has no such number of steps.
    """
    if method not in get_args(Method) or method == "svd":
        raise ValueError(f"orthogonalization={method!r} is unknown: choose one of {', '.join(get_args(Method))}")
    if not 1 <= steps < MAX_STEPS or steps != int(steps):
        raise ValueError(f"steps={steps}: choose a whole number from 1 to {MAX_STEPS - 1}")
    if method == "polar-express":
        # Beyond the table its last row is repeated.
        rows = POLAR_EXPRESS[:steps] + POLAR_EXPRESS[-1:] * (steps - len(POLAR_EXPRESS))
        return Iteration(rows, margin=POLAR_EXPRESS_MARGIN)
    return Iteration((NEWTON_SCHULZ,) * steps, gram=method == "gram")


def orthogonalize(
    matrices: Tensor,
    *,
    method: Method = "newton-schulz",
    steps: int = 5,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    out: Tensor | None = None,
) -> Tensor:
    """The polar factor U V^T of each matrix U S V^T, nearly ("svd": exactly).

    Args:
        matrices: Tensor [..., m, n], floating point, tall, wide or square; a batch is done in a few kernels.
        method: "newton-schulz" (five steps send a singular value in [0.01, 1] of the scaled matrix into [0.68, 1.13]),
            "polar-express" ([0.86, 1.14] down to 0.001), "gram" (the first, evaluated on the Gram matrix: the same in
            exact arithmetic, fewer products where a matrix is 1.5 times as long as it is wide or more), or "svd"
            (exact, slow; directions whose singular value is zero up to rounding stay zero).
        steps: of the iteration.
        dtype: of the computation and of the result; bfloat16 for float32, float16 and bfloat16 input, the input's own
            for float64.
        eps: the smallest Frobenius norm to divide by, so that zero stays zero.
        out: Tensor of the same shape that the result is written to; it may be `matrices` itself.

    Returns:
        Tensor [..., m, n] in `dtype`.

    Raises:
        ValueError: not floating point, fewer than two dimensions, an unknown method, or steps out of range.

    Examples:
        >>> import torch
        >>> singular = torch.linalg.svdvals(orthogonalize(torch.randn(4, 8, dtype=torch.float64)))
        >>> bool((0.6 < singular).all() and (singular < 1.21).all())
        True
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"orthogonalize takes real floating-point matrices [..., m, n]: got {list(matrices.shape)} {matrices.dtype}"
        )
    dtype = dtype or compute_dtype(matrices.dtype)
    if out is None:
        out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    if method == "svd":
        return out.copy_(exact_polar_factor(matrices))
    plan = iteration(method, steps)
    if 2 * max(matrices.shape[-2:]) < 3 * min(matrices.shape[-2:]):
        # Near a square, steps on the Gram matrix take more products than they save.
        plan = replace(plan, gram=False)
    if matrices.ndim != 3:
        flat = orthogonalize(matrices.unsqueeze(0).flatten(0, -3), method=method, steps=steps, dtype=dtype, eps=eps)
        return out.copy_(flat.view(matrices.shape))
    if not out.numel():
        return out
    # Two at least: a CPU's batched product of one matrix is slower by a fifth.
    size = max(2, _working_set(matrices.device) // (4 * matrices[0].numel() * dtype.itemsize))
    run = _form(matrices.device)
    tall = matrices.shape[-2] > matrices.shape[-1]
    for source, target in zip(torch.split(matrices, size), torch.split(out, size), strict=True):
        x = source.to(dtype)
        result = run(x.mT if tall else x, plan, eps)
        target.copy_(result.mT if tall else result)
    return out


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the products are taken by default: float64 keeps its precision, all else takes the fast units."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def exact_polar_factor(matrices: Tensor) -> Tensor:
    """U V^T of the singular value decomposition; a singular value that is zero up to rounding gives no direction.

    Args:
        matrices: Tensor [..., m, n]; half precision is computed in float32.
    """
    work = matrices if matrices.dtype in (torch.float32, torch.float64) else matrices.float()
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    floor = s[..., :1] * max(work.shape[-2:]) * torch.finfo(work.dtype).eps
    kept: Tensor = (u * ((s > floor) & (s > 0)).to(u.dtype).unsqueeze(-2)) @ vh
    return kept.to(matrices.dtype)


def _orthogonalize(x: Tensor, plan: Iteration, eps: float) -> Tensor:
    """The iteration on x [batch, m, n], m <= n."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / (norm * plan.margin).clamp(min=eps)
    return (_gram_iterate if plan.gram else _iterate)(x, plan.coefficients)


def _iterate(x: Tensor, coefficients: tuple[Quintic, ...]) -> Tensor:
    for a, b, c in coefficients:
        gram = x @ x.mT  # [batch, m, m], m the short side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram_iterate(x: Tensor, coefficients: tuple[Quintic, ...]) -> Tensor:
    """The same map, with all steps between two restarts taken on R = X X^T [batch, m, m].

    X becomes P X with P = a I + b R + c R^2, so R becomes P R P (they commute), and the product of all P is applied to
    X once. Rounding makes R drift from the X that it stands for, hence the restarts: after three steps in bfloat16 the
    result is as near to orthogonal as the plain form, after five it is not.
    """
    remaining = list(coefficients)
    while remaining:
        steps, remaining = remaining[:RESTART_EVERY], remaining[RESTART_EVERY:]
        gram = x @ x.mT
        product = None
        for index, (a, b, c) in enumerate(steps):
            bend = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a I
            if product is None:
                product = bend.clone()
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = torch.baddbmm(product, product, bend, beta=a)
            if index + 1 < len(steps):
                half = torch.baddbmm(gram, gram, bend, beta=a)
                gram = torch.baddbmm(half, bend, half, beta=a)
        assert product is not None
        x = product @ x
    return x


def _working_set(device: torch.device) -> int:
    # On a CPU a batch that leaves the last-level cache costs more than the longer loop saves.
    return GPU_WORKING_SET if device.type == "cuda" else CPU_WORKING_SET


@functools.cache
def _form(device: torch.device) -> Callable[[Tensor, Iteration, float], Tensor]:
    """Compiled on a GPU, where that fuses what lies between the products; plain elsewhere."""
    if device.type != "cuda":
        return _orthogonalize
    compiled = torch.compile(_orthogonalize, dynamic=True)
    try:
        compiled(torch.eye(2, device=device).unsqueeze(0), iteration(), 1e-7)
    except RuntimeError as error:
        warnings.warn(f"orthogonalize runs uncompiled, somewhat slower: {error}", stacklevel=4)
        return _orthogonalize
    return compiled
