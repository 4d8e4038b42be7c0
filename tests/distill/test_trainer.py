"""The trainer's loss against one written down plainly, and its bookkeeping over accumulation and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainingArguments

from burnish.data.examples import IGNORED
from burnish.distill import DistillTrainer, LiveTeacher, Objective, jensen_shannon, reverse_kl
from tests.conftest import VOCABULARY, TinyModel


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def examples(count: int = 4, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    if padding:
        labels[-1, -padding:] = IGNORED
    return [{"input_ids": i, "labels": label, "row": torch.tensor(n)} for n, (i, label) in
            enumerate(zip(ids, labels, strict=True))]  # fmt: skip


def trainer(student: Path, teacher: Path, tmp_path: Path, objective: Objective, data: Any, **changes: Any) -> Any:
    settings = {"max_steps": 1, "per_device_train_batch_size": len(data), "learning_rate": 0.0, "max_grad_norm": 1e9}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "work"), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        optim="sgd", save_strategy="no", **{**settings, **changes},
    )  # fmt: skip
    return DistillTrainer(
        load(student), LiveTeacher(load(teacher)), objective, args=arguments, train_dataset=data, eval_dataset=data
    )


def plain_loss(student: Any, teacher: Any, data: Any, objective: Objective) -> torch.Tensor:
    """The objective as its docstring says it, over whole logits; mean over the tokens that count."""
    ids = torch.stack([example["input_ids"] for example in data])
    labels = torch.stack([example["labels"] for example in data])[:, 1:]
    live = labels != IGNORED
    mine = student(input_ids=ids, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
    log_q, log_p = (
        (out.logits[:, :-1] / objective.temperature).log_softmax(-1)[live] for out in (mine, theirs)
    )  # fmt: skip
    loss = (1 - objective.ce_weight) * objective.temperature**2 * objective.divergence(log_p, log_q).mean()
    loss = loss + objective.ce_weight * F.cross_entropy(mine.logits[:, :-1][live], labels[live])
    if objective.hidden_weight:
        distances = [
            (a[:, :-1][live] - b[:, :-1][live]).square().mean() / b[:, :-1][live].square().mean()
            for a, b in zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        ]
        loss = loss + objective.hidden_weight * sum(distances) / len(distances)
    return loss


OBJECTIVES = {
    "forward": Objective(),
    "reverse": Objective(reverse_kl, temperature=2.0),
    "mixed": Objective(jensen_shannon, ce_weight=0.25),
    "hidden": Objective(hidden_weight=0.5, temperature=0.7),
    "text": Objective(ce_weight=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_the_plain_ones(name: str, student: Path, teacher: Path, tmp_path: Path) -> None:
    data, objective = examples(padding=5), OBJECTIVES[name]
    mine = trainer(student, teacher, tmp_path, objective, data)
    seen: dict[str, torch.Tensor] = {}
    norm = mine._get_grad_norm

    def keep(model: Any, grad_norm: Any = None) -> Any:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return norm(model, grad_norm)

    mine._get_grad_norm = keep
    mine.train()
    reference = load(student)
    expected = plain_loss(reference, load(teacher), data, objective)
    expected.backward()
    assert mine.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert seen.keys() == dict(reference.named_parameters()).keys()
    for parameter, value in reference.named_parameters():
        assert torch.allclose(seen[parameter], value.grad, atol=1e-6, rtol=1e-4), parameter


def test_accumulated_steps_weigh_every_token_the_same(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Two passes of unequal numbers of tokens give the loss and gradient norm of one pass over all of them."""
    data, logged = examples(padding=12), []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        mine = trainer(
            student, teacher, tmp_path, Objective(), data,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        mine.train()
        logged.append(mine.state.log_history[0])
    for entry in logged[1:]:
        for key in ("loss", "grad_norm", "divergence", "nll"):
            assert entry[key] == pytest.approx(logged[0][key], rel=1e-4), key


def test_evaluation_reports_forward_kl_at_temperature_one_whatever_is_trained(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    data = examples(padding=3)
    metrics = trainer(student, teacher, tmp_path, OBJECTIVES["reverse"], data).evaluate()
    assert metrics["eval_kl"] == pytest.approx(
        plain_loss(load(student), load(teacher), data, Objective()).item(), rel=1e-5
    )
    assert metrics["eval_nll"] == pytest.approx(
        plain_loss(load(student), load(teacher), data, Objective(ce_weight=1.0)).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": 0.0}, "temperature=0.0"), ({"ce_weight": 1.5}, "ce_weight=1.5"),
     ({"hidden_weight": -1.0}, "hidden_weight=-1.0")],
)  # fmt: skip
def test_objectives_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**change)


def test_teacher_is_frozen_and_runs_in_its_own_type(tiny_model: TinyModel) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.bfloat16)
    source = LiveTeacher(half)
    batch = {"input_ids": examples(2)[0]["input_ids"][None]}
    live = torch.ones(1, 15, dtype=torch.bool)
    with torch.autocast("cpu", torch.float16):
        target = source.target(batch, live, states=True)
    assert target.hidden.dtype == torch.bfloat16 and not target.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in half.parameters())
    assert len(target.states) == half.config.num_hidden_layers + 1
