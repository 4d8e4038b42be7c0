"""How reliable each annotator is: the state of LCPO, which lies in a trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from burnish.align.objectives.lcpo import updated_reliability


class Reliabilities(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The probability that a label of an annotator is right, for each annotator.

    Attributes:
        names: of annotators; pairs without one share "".
        values: Tensor `[annotators]`, float64.

    Args:
        names: of all annotators that can come.
        start: of each at first.
        rate: weight of a new batch in the moving average.

    Source: LCPO / RE-PO, arXiv 2509.24159, Eq 5-7: starts at 0.9, rate 0.1.
    """

    def __init__(self, names: Iterable[str | None] = (), start: float = 0.9, rate: float = 0.1) -> None:
        self.names = sorted({name or "" for name in names} | {""})
        self.values = torch.full((len(self.names),), start, dtype=torch.float64)
        self.start, self.rate = start, rate
        self._places = {name: place for place, name in enumerate(self.names)}

    def places(self, names: Sequence[str | None]) -> Tensor:
        """Places of annotators in `values`, Tensor `[len(names)]`, int64; an unknown one counts as ""."""
        return torch.tensor([self._places.get(name or "", self._places[""]) for name in names])

    def of(self, places: Tensor) -> Tensor:
        """Reliabilities, Tensor `[len(places)]`, float64."""
        return self.values.to(places.device)[places]

    def update(self, places: Tensor, posteriors: Tensor) -> None:
        """Move towards the mean posterior of each annotator in a batch.

        Args:
            places: Tensor `[pairs]`, int64.
            posteriors: Tensor `[pairs]`: probabilities that the labels are right.
        """
        self.values = updated_reliability(self.values, posteriors.double().cpu(), places.cpu(), rate=self.rate)

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into a checkpoint."""
        args = {"names": self.names, "start": self.start, "rate": self.rate}
        return {"args": args, "attributes": {"values": self.values.tolist()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from a checkpoint."""
        stored = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and stored is not None:
            stored = stored[-1] if isinstance(stored, list) else stored
            seen = dict(zip(stored["args"]["names"], stored["attributes"]["values"], strict=True))
            self.values = torch.tensor([seen.get(name, self.start) for name in self.names], dtype=torch.float64)
