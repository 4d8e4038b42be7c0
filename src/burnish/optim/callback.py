"""The two modes of an averaged optimizer, kept right by a callback of the Hugging Face `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from burnish.errors import TrainingError
from burnish.optim.averaging import TRAINING, AveragedOptimizer


def find_averaged(optimizer: Any, model: nn.Module | None = None) -> AveragedOptimizer:
    """The averaged optimizer inside wrappers that keep what they wrap in `.optimizer` (Accelerate's does).

    Args:
        optimizer: as a trainer holds it.
        model: if given, its parameters must be those that the optimizer moves.

    Raises:
        TrainingError: there is none, or it moves other tensors than the model's: putting the average into those would
            leave the model as it is, and the wrong weights would be saved.
    """
    chain = [optimizer]
    while not isinstance(chain[-1], AveragedOptimizer):
        inner = getattr(chain[-1], "optimizer", None)
        if inner is None or inner in chain:
            names = " > ".join(type(one).__name__ for one in chain)
            raise TrainingError(
                f"no averaged optimizer in {names}: train with one such as AMUSE, or drop AveragedWeights"
            )
        chain.append(inner)
    found = chain[-1]
    if model is not None:
        own = {id(parameter) for parameter in model.parameters()}
        moved = {id(parameter) for group in found.param_groups for parameter in group["params"]}
        if not moved <= own:
            wrappers = " > ".join(type(one).__name__ for one in chain[:-1]) or "something"
            raise TrainingError(
                f"{wrappers} gave {type(found).__name__} copies of the model's weights: their average cannot reach the"
                " model; train with FSDP2 or DDP, or with an optimizer that does not average"
            )
    return found


class AveragedWeights(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves and ends with the averaged weights, and trains on with the others.

    A checkpoint holds the average and an optimizer state that says so, so that a resume is exact and `from_pretrained`
    on any checkpoint gives the model to ship. Give it last, after callbacks that ask for a save or an evaluation.

    Raises:
        TrainingError: there is no averaged optimizer, its average cannot reach the model (see `find_averaged`), or what
            was saved or evaluated was not the average.

    Examples:
        >>> from transformers import Trainer
        >>> from burnish.optim import AMUSE, split_parameters
        >>> options = {"params": split_parameters(model).param_groups(), "lr": 0.01, "warmup_steps": 500}
        ... # doctest: +SKIP
        >>> Trainer(
        ...     model, arguments, optimizer_cls_and_kwargs=(AMUSE, options), callbacks=[AveragedWeights()]
        ... )  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        found = find_averaged(optimizer, options.get("model"))
        if args.eval_on_start:  # also where the start is a checkpoint
            found.eval()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        find_averaged(optimizer).train()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if control.should_evaluate or control.should_save or ends:
            find_averaged(optimizer).eval()

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        _require_average(optimizer, "saved")

    def on_evaluate(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        if optimizer is not None:
            _require_average(optimizer, "evaluated")

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        found = find_averaged(optimizer)
        if any(group["mode"] == TRAINING for group in found.param_groups):
            if args.load_best_model_at_end:
                raise TrainingError("the best model was loaded in training mode: save and evaluate at the same steps")
            found.eval()


def _require_average(optimizer: Any, done: str) -> None:
    if any(group["mode"] == TRAINING and group["step"] for group in find_averaged(optimizer).param_groups):
        raise TrainingError(
            f"{done} the weights that are being trained, not their average: AveragedWeights must be the last callback,"
            " and what you evaluate or save by hand belongs inside `with optimizer.averaged():`"
        )
