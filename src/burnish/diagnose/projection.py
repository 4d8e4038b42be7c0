"""Training in the dominant subspace alone, or in the bulk alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from burnish.diagnose.hessian import Loss, Parameters, unflatten
from burnish.diagnose.recorder import SubspaceRecorder
from burnish.diagnose.subspace import dominant

Part = Literal["dominant", "bulk"]

SETTLED_MEASUREMENTS = 5
"""Measurements in a row that must be aligned before the gradient counts as settled (ours)."""


class ProjectedTraining(SubspaceRecorder):
    """Lets through only one part of what an optimizer does to the parameters: P u ("dominant") or (I - P) u ("bulk").

    It hangs on the optimizer's hooks as `SubspaceRecorder` does, of which it is one: measurements are of the update
    before it is projected. Parameters outside of `params`, and the optimizer's state, go their own way: momentum sums
    up whole gradients.

    Args:
        optimizer, loss, params, k: as for `SubspaceRecorder`.
        part: what is let through, "dominant" or "bulk".
        refresh_every: steps for which the eigenvectors are kept; the source computes them at every step.
        start: the first step that may be projected; before it the optimizer trains as it is.
        settled: project only once the gradient's alignment was at least this at five measurements in a row, and from
            then on; None does not wait.
        options: as for `SubspaceRecorder`.

    Attributes:
        active: whether updates are projected now.

    Raises:
        ValueError: an option out of range, or an optimizer that keeps iterates besides the parameters (schedule-free):
            projecting the parameters alone would break its average.

    Source: Song, Ahn and Yun, arXiv 2405.16002, section 4 (Dom-SGD, Bulk-SGD), which switch once alignment settled.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss: Loss,
        params: Parameters,
        k: int,
        *,
        part: Part,
        refresh_every: int = 1,
        start: int = 0,
        settled: float | None = None,
        **options: Any,
    ) -> None:
        if part not in ("dominant", "bulk"):
            raise ValueError(f"part={part!r}: choose dominant or bulk")
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every}: expected 1 or more steps")
        if settled is not None and not 0 < settled <= 1:
            raise ValueError(f"settled={settled}: expected an alignment above 0 and at most 1, or None")
        for group in optimizer.param_groups:
            if "mode" in group or "train_mode" in group:
                raise ValueError(
                    f"{type(optimizer).__name__} averages its iterates, and projecting the parameters alone would break"
                    " the average: use its base optimizer"
                )
        super().__init__(optimizer, loss, params, k, every=refresh_every, **options)
        self.part, self.start, self.settled = part, start, settled
        self.active = False

    @torch.no_grad()
    def act(self, old: Tensor, update: Tensor) -> None:
        """Replace the update by its part, once projection has begun."""
        self.active = self.active or (self.step >= self.start and self._has_settled())
        if not self.active:
            return
        assert self.subspace is not None
        inside = dominant(update, self.subspace)
        new = old + inside if self.part == "dominant" else old + (update - inside)
        for tensor, value in zip(self.tensors, unflatten(new, self.tensors), strict=True):
            tensor.copy_(value)

    def _has_settled(self) -> bool:
        if self.settled is None:
            return True
        last = [measured.gradient_alignment or 0.0 for measured in self.measurements[-SETTLED_MEASUREMENTS:]]
        return len(last) == SETTLED_MEASUREMENTS and min(last) >= self.settled
