"""Statistics of batch normalisation at the weights that are shipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def refresh_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, num_batches: int = 50, device: torch.device | None = None
) -> None:
    """Measure running means and variances anew, for the weights that the model has now.

    While training they are measured at the points where gradients are taken; the average is another point. Call it
    inside `optimizer.averaged()` before evaluating or saving a model with batch normalisation.

    Args:
        model: left in the mode it was in. Normalisations that are in another mode than the model are frozen: they keep
            their statistics.
        batches: of inputs, or of tuples whose first item is the input.
        num_batches: how many to use; the statistics are the plain mean over them.
        device: to move inputs to.

    Raises:
        ValueError: there is no batch to measure on.

    Source: as the vision code of AMUSE (arXiv 2605.22432) does before each evaluation, 50 batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module, training in modes if isinstance(module, _BatchNorm) and training == model.training]
    frozen = [module for module, training in modes if isinstance(module, _BatchNorm) and training != model.training]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    model.train()
    for norm in frozen:
        norm.eval()
    count = 0
    try:
        for count, batch in enumerate(itertools.islice(batches, num_batches), 1):
            for norm in norms if count == 1 else ():
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            model(inputs if device is None else inputs.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("no batch to measure statistics of batch normalisation on: give at least one")
