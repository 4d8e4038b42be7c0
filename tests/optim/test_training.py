"""What a Trainer is given for an optimizer chosen by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from burnish.optim.callback import AveragedWeights
from burnish.optim.table import OPTIMIZERS
from burnish.optim.training import choose_schedule, trainer_options, training_arguments
from tests.optim.test_callback import equal, model_of, rows, weights_of

AVERAGED = [name for name, info in OPTIMIZERS.items() if info.averaged]
FORWARD = [name for name, info in OPTIMIZERS.items() if info.forward_only]
GRADIENT = [name for name in OPTIMIZERS if name not in FORWARD]
OTHERS = [name for name in GRADIENT if name not in AVERAGED]


@pytest.mark.parametrize("name", GRADIENT)
def test_an_optimizer_that_averages_needs_no_schedule_and_refuses_one(name: str) -> None:
    averaged = OPTIMIZERS[name].averaged
    assert choose_schedule(name) == ("constant" if averaged else "cosine")
    assert choose_schedule(name, "constant") == "constant"
    for schedule in ("cosine", "linear"):
        if averaged:
            with pytest.raises(ValueError, match=f"schedule='{schedule}': {name} averages in place of decaying"):
                choose_schedule(name, schedule)
        else:
            assert choose_schedule(name, schedule) == schedule


@pytest.mark.parametrize("name", FORWARD)
def test_an_optimizer_of_forward_passes_is_for_verbs_that_can(name: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer='{name}' takes no gradients: `burnish tune` trains with it"):
        choose_schedule(name)
    assert choose_schedule(name, forward_only=True) == "constant"
    assert choose_schedule(name, "linear", forward_only=True) == "linear"
    assert choose_schedule("adamw", forward_only=True) == "cosine"


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw_torch_fused", "lion_32bit"])
def test_names_of_the_trainer_are_known_too(name: str) -> None:
    assert choose_schedule(name) == "cosine"
    assert trainer_options(name, model_of(), lr=0.1).optimizer is None


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer='amsue' is unknown: choose one of adamw, sgd, .*amuse, muon, .*lion"
    ):
        choose_schedule("amsue")
    with pytest.raises(ValueError, match="schedule='step' is unknown: choose one of auto, cosine, linear, constant"):
        choose_schedule("muon", "step")


def test_warmup_and_schedule_are_the_trainer_s_where_the_optimizer_does_not_average() -> None:
    assert training_arguments("adamw", "cosine", 3) == {
        "optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 3,
    }  # fmt: skip
    assert training_arguments("adamw_8bit", "constant", 3)["optim"] == "adamw_8bit"
    for name in OTHERS:
        assert training_arguments(name, "constant", 3) == {
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
        }  # fmt: skip
    for name in AVERAGED:
        assert training_arguments(name, "constant", 3) == {"lr_scheduler_type": "constant"}


@pytest.mark.parametrize("name", GRADIENT)
def test_u7_4_every_tensor_once_matrices_decayed_vectors_not(name: str) -> None:
    model, info = model_of(), OPTIMIZERS[name]
    chosen = trainer_options(name, model, lr=0.03, weight_decay=0.1, warmup_steps=5)
    assert chosen.optimizer is not None
    cls, options = chosen.optimizer
    assert cls is info.load()
    optimizer = cls(**options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(tensor)], group) for group in optimizer.param_groups for tensor in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    for tensor, group in found:
        vector = model.get_parameter(tensor).ndim < 2
        assert group["weight_decay"] == (0.0 if vector else 0.1), tensor
        projection = not vector and "embed" not in tensor and "lm_head" not in tensor
        assert group["use_muon"] == (projection and info.matrix_rule), tensor
        assert group["lr"] == 0.03
        if info.warmup:
            assert group["warmup_steps"] == 5
    table = {route.name: route.reason for route in optimizer.routing_table()}
    reason = {"proxgen": "no penalty: embedding"}.get(name, "embedding" if info.matrix_rule else "the only rule")
    assert table["model.embed_tokens.weight"] == reason
    assert (chosen.routing is not None) == info.matrix_rule
    assert [type(one) for one in chosen.callbacks] == ([AveragedWeights] if info.averaged else [])


def test_a_warmup_that_is_too_short_becomes_the_least() -> None:
    for name in AVERAGED:
        chosen = trainer_options(name, model_of(), lr=0.1, warmup_steps=0)
        assert chosen.optimizer is not None
        assert chosen.optimizer[1].get("warmup_steps") == {"amuse": 2, "radam-schedule-free": None}.get(name, 0)


@pytest.mark.parametrize("name", ["adamw", *GRADIENT])
def test_a_trainer_trains_with_it_and_ends_with_the_model_to_keep(name: str, tmp_path: Path) -> None:
    model, start = model_of(), weights_of(model_of())
    chosen = trainer_options(name, model, lr=0.003 if name != "sgd-schedule-free" else 1.0, warmup_steps=2)
    options: dict[str, Any] = training_arguments(name, choose_schedule(name), 2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=0.003, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows(8), callbacks=list(chosen.callbacks),
        optimizer_cls_and_kwargs=chosen.optimizer,
    )  # fmt: skip
    trainer.train()
    batch = {key: torch.stack([row[key] for row in rows(8)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        before, after = model_of()(**batch).loss, model(**batch).loss
    assert after < before and not equal(weights_of(model), start)
    if OPTIMIZERS[name].averaged if name in OPTIMIZERS else False:
        assert {group["mode"] for group in trainer.optimizer.param_groups} == {"averaged"}
