"""Statistics of batch normalisation at the weights that are shipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn


def refresh_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, num_batches: int = 50, device: torch.device | None = None
) -> None:
    """Measure running means and variances anew, for the weights that the model has now.

    While training they are measured at the points where gradients are taken; the average is another point. Call it
    inside `optimizer.averaged()` before evaluating or saving a model with batch normalisation.

    Args:
        model: left in the mode it was in.
        batches: of inputs, or of tuples whose first item is the input.
        num_batches: how many to use; the statistics are the plain mean over them.
        device: to move inputs to.

    Source: as the vision code of AMUSE (arXiv 2605.22432) does before each evaluation, 50 batches.
    """
    update_bn(itertools.islice(batches, num_batches), model, device=device)
