"""AveragedWeights in the Hugging Face Trainer: what is evaluated, saved and resumed, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from burnish.errors import TrainingError
from burnish.optim import AMUSE, AdamWScheduleFree, Muon, NorMuon, split_parameters
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.callback import AveragedWeights, find_averaged

STEPS = 6
AVERAGING: dict[str, Callable[..., AveragedOptimizer]] = {
    "amuse": lambda params, **more: AMUSE(params, lr=0.02, warmup_steps=2, weight_decay=0.1, **more),
    "adamw-schedule-free": lambda params, **more: AdamWScheduleFree(params, lr=0.02, warmup_steps=2, **more),
}
BUILDS: dict[str, Callable[..., Optimizer]] = {
    **AVERAGING,
    "muon": lambda params, **more: Muon(params, lr=0.02, **more),
    "normuon": lambda params, **more: NorMuon(params, lr=0.02, **more),
}


def model_of(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def rows(count: int = 48) -> list[dict[str, Tensor]]:
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert expected.keys() <= found.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


class Watch(TrainerCallback):
    """Both sequences after every step, and what the model held when it was evaluated, saved and trained on.

    Attributes:
        y, x: by step; x as the paper has it, from y and z.
        evaluated, trained: weights, with the step at which they were used.
    """

    def __init__(self) -> None:
        self.y: dict[int, dict[str, Tensor]] = {}
        self.x: dict[int, dict[str, Tensor]] = {}
        self.evaluated: list[tuple[int, dict[str, Tensor]]] = []
        self.trained: list[tuple[int, dict[str, Tensor]]] = []

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        step = state.global_step + 1
        self.y[step] = weights_of(model)
        if "mode" not in optimizer.param_groups[0]:
            return
        found = find_averaged(optimizer)
        beta = {id(parameter): group["beta"] for group in found.param_groups for parameter in group["params"]}
        self.x[step] = {
            name: torch.lerp(parameter.detach(), found.state[parameter]["z"], 1 - 1 / beta[id(parameter)])
            if "x" not in found.state[parameter]
            else found.state[parameter]["x"].to(parameter.dtype)
            for name, parameter in model.named_parameters()
        }

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.evaluated.append((state.global_step, weights_of(model)))


class WatchedTrainer(Trainer):
    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            watch = next(one for one in self.callback_handler.callbacks if isinstance(one, Watch))
            watch.trained.append((self.state.global_step, weights_of(model)))
        return super().compute_loss(model, *args, **kwargs)


def trainer_of(
    out: Path,
    build: Callable[..., Optimizer] = AVERAGING["amuse"],
    *,
    callbacks: tuple[TrainerCallback, ...] | None = None,
    model: LlamaForCausalLM | None = None,
    wrap: Callable[[Optimizer], Any] = lambda optimizer: optimizer,
    schedule: Callable[[int], float] = lambda step: 1.0,
    **changes: Any,
) -> tuple[WatchedTrainer, Watch]:
    options = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip
    model = model if model is not None else model_of()
    optimizer = build(split_parameters(model))
    watch = Watch()
    if callbacks is None:
        callbacks = (AveragedWeights(),)
    trainer = WatchedTrainer(
        model, TrainingArguments(str(out), **options), train_dataset=rows(), eval_dataset=rows(4),
        optimizers=(wrap(optimizer), LambdaLR(optimizer, schedule)), callbacks=[*callbacks, watch],
    )  # fmt: skip
    return trainer, watch


class Reached(Optimizer):
    """As a trainer's or a sharding library's wrapper: it delegates, keeps what it wraps in `.optimizer`, and has no
    `train()` or `eval()`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class Hidden(Reached):
    """A wrapper that keeps what it wraps where nobody looks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inside = optimizer

    optimizer = property(lambda self: None)  # type: ignore[assignment]
    param_groups = property(lambda self: self.inside.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inside.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.inside.defaults)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return self.inside.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inside.load_state_dict(state_dict)


@pytest.mark.parametrize("name", AVERAGING)
def test_u7_5_saved_and_evaluated_is_the_average_and_training_goes_on_from_y(name: str, tmp_path: Path) -> None:
    trainer, watch = trainer_of(
        tmp_path, AVERAGING[name], eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3
    )
    trainer.train()
    for step in (3, 6):
        assert equal(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), watch.x[step])
    assert [step for step, _ in watch.evaluated] == [2, 4, 6]
    for step, seen in watch.evaluated:
        assert equal(seen, watch.x[step])
    assert [step for step, _ in watch.trained] == list(range(STEPS))
    for step, seen in watch.trained[1:]:
        assert largest_difference(seen, watch.y[step]) < 1e-6  # twice through the average and back
        if step > 1:
            assert largest_difference(watch.y[step], watch.x[step]) > 1e-4
    assert equal(weights_of(trainer.model), watch.x[STEPS])
    trainer.save_model(str(tmp_path / "final"))
    assert equal(load_file(tmp_path / "final" / "model.safetensors"), watch.x[STEPS])
    assert equal(weights_of(LlamaForCausalLM.from_pretrained(tmp_path / "final")), watch.x[STEPS])


def test_the_average_is_the_one_of_a_bare_loop(tmp_path: Path) -> None:
    """All batches are alike, so that their order does not matter."""
    trainer, _ = trainer_of(tmp_path, eval_strategy="steps", eval_steps=1, max_grad_norm=0.0)
    trainer.train_dataset = rows(1) * 24
    trainer.train()
    model = model_of()
    optimizer = AVERAGING["amuse"](split_parameters(model))
    batch = {key: torch.stack([value] * 4) for key, value in rows(1)[0].items()}
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with optimizer.averaged():
        expected = weights_of(model)
    assert largest_difference(expected, weights_of(model_of())) > 1e-2
    assert largest_difference(weights_of(trainer.model), expected) < 1e-5


@pytest.mark.parametrize("changes", [{"save_strategy": "steps", "save_steps": 2}, {"save_strategy": "epoch"}])
def test_saving_without_evaluation(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, watch = trainer_of(tmp_path, max_steps=-1, num_train_epochs=0.5, **changes)
    trainer.train()
    saved = {int(path.name.rpartition("-")[2]): path for path in tmp_path.glob("checkpoint-*")}
    assert sorted(saved) == ([2, 4, 6] if "save_steps" in changes else [6])
    for step, path in saved.items():
        assert equal(load_file(path / "model.safetensors"), watch.x[step])


def test_evaluating_without_saving(tmp_path: Path) -> None:
    trainer, watch = trainer_of(tmp_path, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert [step for step, _ in watch.evaluated] == [5, 6]  # every training ends with an evaluation
    assert equal(watch.evaluated[0][1], watch.x[5])
    assert largest_difference(watch.trained[5][1], watch.y[5]) < 1e-6
    assert equal(weights_of(trainer.model), watch.x[STEPS])
    trainer.evaluate()
    assert equal(watch.evaluated[-1][1], watch.x[STEPS])


def test_by_epochs(tmp_path: Path) -> None:
    trainer, watch = trainer_of(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=16, eval_strategy="epoch",
        save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in watch.evaluated] == [3, 6]
    for step, seen in watch.evaluated:
        assert equal(seen, watch.x[step])
        assert equal(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), watch.x[step])
    assert largest_difference(watch.trained[3][1], watch.y[3]) < 1e-6


def test_every_micro_batch_of_accumulated_gradients_is_at_y(tmp_path: Path) -> None:
    trainer, watch = trainer_of(
        tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in watch.trained] == [step for step in range(STEPS) for _ in range(2)]
    for step, seen in watch.trained[2:]:
        assert largest_difference(seen, watch.y[step]) < 1e-6
    for step, seen in watch.evaluated:
        assert equal(seen, watch.x[step])


class EvaluateAtStep(TrainerCallback):
    """The metric is best at one step."""

    def __init__(self, best: int) -> None:
        self.best = best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        metrics["eval_chosen"] = -abs(state.global_step - self.best)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer, watch = trainer_of(
        tmp_path, callbacks=(AveragedWeights(), EvaluateAtStep(2)), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="chosen",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert equal(weights_of(trainer.model), watch.x[2])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("best", [True, False])
def test_a_stop_that_the_callback_did_not_see_coming(best: bool, tmp_path: Path) -> None:
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "chosen", "greater_is_better": True}
    trainer, watch = trainer_of(
        tmp_path, callbacks=(AveragedWeights(), EvaluateAtStep(2), StopAt(5)), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, **(changes if best else {}),
    )  # fmt: skip
    trainer.train()
    assert equal(weights_of(trainer.model), watch.x[2 if best else 5])
    assert {group["mode"] for group in trainer.optimizer.param_groups} == {"averaged"}


class SaveAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == self.step


def test_a_callback_that_asks_to_save_behind_its_back_is_refused(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path / "behind", callbacks=(AveragedWeights(), SaveAt(3)))
    with pytest.raises(TrainingError, match="AveragedWeights must be the last"):
        trainer.train()
    trainer, watch = trainer_of(tmp_path / "before", callbacks=(SaveAt(3), AveragedWeights()))
    trainer.train()
    assert equal(load_file(tmp_path / "before" / "checkpoint-3" / "model.safetensors"), watch.x[3])


@pytest.mark.parametrize("wrappers", [0, 2])
def test_u7_5_evaluation_by_hand_while_training_is_at_the_average_or_refused(wrappers: int, tmp_path: Path) -> None:
    """The trainer itself calls `eval()` of what it holds, which two wrappers hide."""

    class Evaluate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                trainer.evaluate()

    trainer, watch = trainer_of(
        tmp_path, callbacks=(AveragedWeights(), Evaluate()),
        wrap=lambda optimizer: Reached(Reached(optimizer)) if wrappers else optimizer,
    )  # fmt: skip
    trainer.evaluate()  # before training there is nothing to average
    if wrappers:
        with pytest.raises(TrainingError, match="evaluated the weights that are being trained"):
            trainer.train()
        return
    trainer.train()
    assert equal(watch.evaluated[1][1], watch.x[2])
    assert largest_difference(watch.trained[2][1], watch.y[2]) < 1e-6


def resumed_from(
    out: Path, step: int, build: Callable[..., Optimizer], dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[WatchedTrainer, Watch]:
    trainer, watch = trainer_of(out, build, model=model_of(dtype), **changes)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    return trainer, watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDS)
def test_u2_4_u7_3_a_resume_is_the_uninterrupted_run_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    if name not in AVERAGING:
        changes |= {"schedule": lambda step: 1 - step / STEPS, "callbacks": ()}
    whole, _ = trainer_of(tmp_path, BUILDS[name], model=model_of(dtype), **changes)
    whole.train()
    expected, history = weights_of(whole.model), whole.state.log_history
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt")
    again, _ = resumed_from(tmp_path, 2, BUILDS[name], dtype, **changes)
    assert equal(weights_of(again.model), expected)
    assert largest_difference(expected, load_file(tmp_path / "checkpoint-2" / "model.safetensors")) > 1e-4
    found = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt")
    assert found["param_groups"] == state["param_groups"]
    for number, tensors in state["state"].items():
        assert all(torch.equal(tensor, found["state"][number][key]) for key, tensor in tensors.items())
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (history, again.state.log_history)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_u7_5_a_checkpoint_written_while_training_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    """Without the callback: the checkpoint holds y, and its state says so."""
    changes = {"callbacks": (), "save_strategy": "steps", "save_steps": 2}
    whole, watch = trainer_of(tmp_path, **changes)
    whole.train()
    assert equal(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), watch.y[2])
    again, _ = resumed_from(tmp_path, 2, AVERAGING["amuse"], **changes)
    assert equal(weights_of(again.model), weights_of(whole.model))
    # With the callback from there on, the model ends as the average of that same run.
    ended, _ = resumed_from(tmp_path, 2, AVERAGING["amuse"])
    assert equal(weights_of(ended.model), watch.x[STEPS])


def test_the_evaluation_at_the_start_of_a_resumed_run_sees_the_average(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_on_start": True}
    trainer, watch = trainer_of(tmp_path, **changes)
    trainer.train()
    assert equal(watch.evaluated[0][1], weights_of(model_of()))
    _, again = resumed_from(tmp_path, 3, AVERAGING["amuse"], **changes)
    assert again.evaluated[0][0] == 3
    assert equal(again.evaluated[0][1], watch.x[3])


def test_a_resume_goes_on_with_a_followed_schedule(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "schedule": lambda step: 1 - step / (2 * STEPS)}

    def build(params: Any) -> Optimizer:
        return AVERAGING["amuse"](params, scheduler="follow")

    whole, _ = trainer_of(tmp_path, build, **changes)
    whole.train()
    again, _ = resumed_from(tmp_path, 2, build, **changes)
    assert equal(weights_of(again.model), weights_of(whole.model))
    constant, _ = trainer_of(tmp_path / "constant", build)
    constant.train()
    assert largest_difference(weights_of(constant.model), weights_of(whole.model)) > 1e-4


def test_a_schedule_is_refused_at_the_first_lr_that_it_changes(tmp_path: Path) -> None:
    model = model_of()
    options = {"params": model, "lr": 0.02, "warmup_steps": 2}
    steps: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    def train(**changes: Any) -> None:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **changes
        )
        Trainer(
            model, arguments, train_dataset=rows(), optimizer_cls_and_kwargs=(AMUSE, dict(options)),
            callbacks=[Count(), AveragedWeights()],
        ).train()  # fmt: skip

    with pytest.raises(ValueError, match=r"lr went from 0\.02 to 0\.015: a scheduler .*lr_scheduler_type='constant'"):
        train(lr_scheduler_type="linear")
    assert steps == [1]
    with pytest.raises(ValueError, match=r"lr went from 0\.02 to 0\.0: a scheduler"):
        train(lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    steps.clear()
    train(lr_scheduler_type="constant")
    options["scheduler"] = "follow"
    train(lr_scheduler_type="linear")
    assert steps == [1, 2, 3, 4] * 2


def test_u7_5_wrappers_that_hide_eval_are_looked_through(tmp_path: Path) -> None:
    trainer, watch = trainer_of(
        tmp_path, wrap=lambda optimizer: Reached(Reached(optimizer)), save_strategy="steps", save_steps=3
    )  # fmt: skip
    assert not hasattr(trainer.optimizer, "eval")
    trainer.train()
    assert equal(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), watch.x[3])
    assert equal(weights_of(trainer.model), watch.x[STEPS])


def test_u7_5_a_wrapper_that_cannot_be_looked_through_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer, watch = trainer_of(tmp_path, wrap=lambda optimizer: Reached(Hidden(optimizer)))
    with pytest.raises(TrainingError, match="no averaged optimizer in AcceleratedOptimizer > Reached > Hidden: "):
        trainer.train()
    assert watch.trained == []


def test_u7_5_an_optimizer_of_copied_weights_is_refused(tmp_path: Path) -> None:
    """As sharding with masters of its own does: the average would never reach the model."""
    model = model_of()
    masters = copy.deepcopy(model)
    optimizer = AVERAGING["amuse"](split_parameters(masters))
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=2, lr_scheduler_type="constant"),
        train_dataset=rows(), optimizers=(Reached(optimizer), LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[AveragedWeights()],
    )  # fmt: skip
    with pytest.raises(TrainingError, match="AcceleratedOptimizer > Reached gave AMUSE copies of the model's weights"):
        trainer.train()


def test_an_optimizer_that_does_not_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no averaged optimizer in AcceleratedOptimizer > Muon: train with one"):
        trainer_of(tmp_path, BUILDS["muon"])[0].train()
    with pytest.raises(TrainingError, match="no averaged optimizer in NoneType"):
        find_averaged(None)
