"""Watch the dominant subspace while any optimizer trains in any loop."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from burnish.diagnose.course import append, continue_at
from burnish.diagnose.eigenpairs import Eigenpairs, Method, Which, check_options, top_eigenpairs
from burnish.diagnose.hessian import Hessian, Loss, Parameters, flatten, loss_gradient
from burnish.diagnose.subspace import alignment, bulk_share

SUBSPACE_FILE = "subspace.jsonl"


@dataclass(frozen=True)
class SubspaceMeasurement:
    """A line of `subspace.jsonl`.

    Attributes:
        step: steps taken before.
        eigenvalues: of the Hessian, the top k, descending; the first is the sharpness.
        gradient_alignment: chi_k of the gradient of the loss; None where it is zero.
        update_alignment: chi_k of what the optimizer's next step did to the parameters; None where it did nothing.
        bulk_share: of that update's squared length, 1 - chi_k^2; None where it did nothing.
    """

    step: int
    eigenvalues: tuple[float, ...]
    gradient_alignment: float | None
    update_alignment: float | None
    bulk_share: float | None


class SubspaceRecorder:
    """Measures, every so many steps of an optimizer, how its update lies to the top eigenvectors of the Hessian.

    It hangs on the optimizer's own hooks, so that loops and trainers need not know of it. Each measurement takes the
    products of `top_eigenpairs` and a gradient of `loss`; nothing of the training is changed by it.

    Args:
        optimizer: any; the innermost one where wrappers are around it.
        loss: whose Hessian; of the whole training subset: see `Loss`.
        params: those of the optimizer to look at: see `Parameters`.
        k: eigenvectors that span the dominant subspace.
        every: steps between measurements.
        directory: for `subspace.jsonl`, such as the run directory; None writes nothing.
        step: number of the next step; a resumed training goes on in its file from there.
        overwrite: let a training from step 0 replace the file of an earlier one.
        method, which, tol, max_iterations, seed: as in `top_eigenpairs`.

    Attributes:
        subspace: Eigenpairs at the last measurement; None before the first.
        measurements: list of SubspaceMeasurement of this training.
        step: number of the next step.

    Raises:
        ValueError: an option out of range, a wrapper around the optimizer, or tensors that it does not hold.
        OutputError: the file of an earlier training is there.

    Examples:
        >>> with SubspaceRecorder(optimizer, loss, model, k=10, every=50, directory="run"):  # doctest: +SKIP
        ...     train()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss: Loss,
        params: Parameters,
        k: int,
        *,
        every: int = 1,
        directory: str | Path | None = None,
        step: int = 0,
        overwrite: bool = False,
        method: Method = "lanczos",
        which: Which = "LM",
        tol: float = 1e-3,
        max_iterations: int = 300,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: expected 1 or more steps")
        if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            raise ValueError(f"{type(optimizer).__name__} wraps an optimizer and has no hooks: pass its .optimizer")
        params = params if isinstance(params, nn.Module) else list(params)
        hessian = Hessian(loss, params)
        check_options(hessian, k, method=method, which=which, tol=tol, max_iterations=max_iterations)
        self.tensors = hessian.tensors
        held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for position, tensor in enumerate(self.tensors):
            if id(tensor) not in held:
                raise ValueError(f"tensor {position} of params is not in the optimizer: name those that it trains")
        self.loss, self.params, self.k = loss, params, k
        self.every, self.step = every, step
        self.options: dict[str, Any] = {
            "method": method, "which": which, "tol": tol, "max_iterations": max_iterations, "seed": seed
        }  # fmt: skip
        self.file = None if directory is None else Path(directory) / SUBSPACE_FILE
        if self.file is not None:
            continue_at(self.file, step, overwrite=overwrite)
        self.subspace: Eigenpairs | None = None
        self.measurements: list[SubspaceMeasurement] = []
        self._old: Tensor | None = None
        self._due = False
        self._gradient_alignment = math.nan
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the optimizer."""
        for handle in self._handles:
            handle.remove()

    def act(self, old: Tensor, update: Tensor) -> None:
        """What to make of the update of the parameters `old`, after it was measured: here nothing."""

    def _before_step(self, *_: Any) -> None:
        self._due = self.subspace is None or self.step % self.every == 0
        if self._due:
            self.subspace = top_eigenpairs(self.loss, self.params, self.k, start=self.subspace, **self.options)
            self._gradient_alignment = alignment(loss_gradient(self.loss, self.params), self.subspace)
        self._old = flatten(self.tensors)

    def _after_step(self, *_: Any) -> None:
        assert self._old is not None
        update = flatten(self.tensors) - self._old
        if self._due:
            self._write(update)
        self.act(self._old, update)
        self._old = None
        self.step += 1

    def _write(self, update: Tensor) -> None:
        assert self.subspace is not None
        measured = self._gradient_alignment, alignment(update, self.subspace), bulk_share(update, self.subspace)
        numbers = (None if math.isnan(number) else number for number in measured)
        self.measurements.append(SubspaceMeasurement(self.step, tuple(self.subspace.values.tolist()), *numbers))
        if self.file is not None:
            append(self.file, [asdict(self.measurements[-1])])
