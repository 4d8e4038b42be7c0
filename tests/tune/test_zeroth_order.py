"""Tuning with forward passes only: the step is the formula, memory is that of inference, and a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from burnish.data.examples import encode, load_examples
from burnish.optim.mezo import MeZO
from burnish.optim.trajectory import Trajectory
from burnish.tune import TuneResult, replay, tune
from burnish.tune.score import f1
from burnish.tune.trainer import answer_loss, generated_answers
from tests.distill.test_train import hashes, kill
from tests.tune.conftest import SMALL, ZEROTH, Run


@pytest.fixture(scope="module", params=["mezo", "mezo-bcd"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ZEROTH | {"optimizer": request.param} if request.param == "mezo-bcd" else {"optimizer": "mezo", "lr": 1e-4}


@pytest.fixture(scope="module")
def whole(
    kind: dict[str, Any], half_llama: Path, rows: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> TuneResult:
    out = tmp_path_factory.mktemp("whole") / "out"
    return tune(half_llama, out, dataset=rows, eval_dataset=held_out, **{**SMALL, **kind})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_first_step_is_the_two_point_formula_over_all_answer_tokens(
    accumulation: int, run: Run, llama: Path, rows: Path, tmp_path: Path
) -> None:
    """w - lr g z with g = (L(w + eps z) - L(w - eps z)) / 2 eps, L in plain transformers, z of the optimizer alone."""
    result = run(
        tmp_path / "out", optimizer="mezo", steps=1, batch_size=40 // accumulation, lr=1e-3, eps=1e-2,
        gradient_accumulation=accumulation, eval_dataset=None,
    )  # fmt: skip
    record = Trajectory.read(tmp_path / "out" / "trajectory.jsonl").records[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    start = {name: value.clone() for name, value in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(llama)

    def loss() -> float:
        total, tokens = 0.0, 0
        for example in load_examples(rows):
            ids, labels, _ = encode(tokenizer, example, 32)
            logits = model(ids[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            tokens += int((labels[1:] != -100).sum())
        return total / tokens

    with torch.no_grad():
        unit = MeZO(model, lr=1.0, eps=1.0)  # a record with g = -1 moves the weights by z
        unit.measure(lambda: 0.0)
        unit.apply(record.__class__(0, 0, record.seed, (-1.0,), (1.0,) * len(unit.param_groups), 0.0))
        noise = {name: value - start[name] for name, value in model.named_parameters()}
        losses = []
        for distance in (1e-2, -1e-2):
            for name, value in model.named_parameters():
                value.copy_(start[name] + distance * noise[name])
            losses.append(loss())
    slope = (losses[0] - losses[1]) / 2e-2
    assert record.gradients[0] == pytest.approx(slope, rel=1e-2)
    assert result.history[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in start.items():
        assert torch.allclose(written[name], value - 1e-3 * record.gradients[0] * noise[name], atol=1e-6), name


def test_it_learns(run: Run, tmp_path: Path) -> None:
    for optimizer, options in (("mezo", {"lr": 3e-4}), ("mezo-bcd", {"lr": 1e-3, "interval": 10})):
        result = run(tmp_path / optimizer, optimizer=optimizer, steps=300, batch_size=16, eval_every=300,
                     **{"checkpoint_every": 300} | options)  # fmt: skip
        training = result.record["training"]
        assert training["last_evaluation"]["eval_nll"] < training["first_evaluation"]["eval_nll"] - 0.5, optimizer


@pytest.mark.parametrize("point", ["1", "5", "while saving", "before publishing"])
def test_u2_1_u2_4_killed_and_run_again_gives_the_same_bytes_losses_and_log(
    point: str, kind: dict[str, Any], run: Run, whole: TuneResult, half_llama: Path, tmp_path: Path
) -> None:
    def half(out: Path, **changes: Any) -> TuneResult:
        return run(out, model=half_llama, **kind, **changes)

    kill(point, half, tmp_path / "out")
    again = half(tmp_path / "out")
    assert again.record["training"]["resumed_at_step"] == {"5": 4, "before publishing": 12}.get(point, 0)
    assert hashes(tmp_path / "out") == hashes(whole.out)  # trajectory.jsonl among them
    assert again.history == whole.history


def test_base_and_log_are_the_tuned_model_bit_for_bit(whole: TuneResult, half_llama: Path, tmp_path: Path) -> None:
    replay(whole.out, half_llama, tmp_path / "again")
    assert hashes(tmp_path / "again") == {
        name: digest for name, digest in hashes(whole.out).items() if name not in ("metrics.jsonl", "trajectory.jsonl")
    }
    before, after = (load_file(path / "model.safetensors") for path in (half_llama, whole.out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys() and after["lm_head.weight"].dtype == torch.bfloat16


def test_only_the_blocks_that_had_their_turn_have_moved(run: Run, llama: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", **ZEROTH | {"steps": 6, "order": "descending"})
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "out"))
    moved = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"2", "1"}


def test_prefix_reuse_is_on_and_changes_no_bit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = run(tmp_path / "fast", **ZEROTH)
    monkeypatch.setattr("burnish.tune.train.prefix_reuse", lambda *_: None)
    plain = run(tmp_path / "plain", **ZEROTH)
    assert (fast.record["training"]["prefix_reuse"], plain.record["training"]["prefix_reuse"]) == (True, False)
    assert any("every evaluation runs all layers" in note for note in plain.record["notes"])
    assert hashes(tmp_path / "fast") == hashes(tmp_path / "plain")


def test_nothing_keeps_a_graph_and_dropout_is_off(run: Run, llama: Path, tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            assert not model.training and not any(tensor.requires_grad for tensor in model.parameters())
            assert all(tensor.grad is None for tensor in model.parameters())

    run(tmp_path / "out", **ZEROTH, callbacks=[Watch()])


def test_metrics_show_the_derivative_and_no_gradient_norm(whole: TuneResult) -> None:
    records = Trajectory.read(whole.out / "trajectory.jsonl").records
    lines = [line for line in whole.history if "loss" in line]
    assert [line["projected_gradient"] for line in lines] == [record.gradients[0] for record in records]
    assert [line["loss"] for line in lines] == pytest.approx([record.loss for record in records], rel=1e-6)
    assert not any("grad_norm" in line for line in lines)


@pytest.mark.parametrize("objective", ["f1", "exact-match"])
def test_a_score_of_generated_answers_is_trained(
    objective: str, run: Run, llama: Path, rows: Path, tmp_path: Path
) -> None:
    """From a model that knows the task half: a score is flat where no answer is near."""
    half = run(tmp_path / "half", steps=60, batch_size=16, eval_every=60, checkpoint_every=60)
    result = run(
        tmp_path / "out", model=half.out, objective=objective, optimizer="mezo", lr=1e-3, eps=3e-2, steps=25,
        batch_size=16, eval_every=25, checkpoint_every=25,
    )  # fmt: skip
    lines = [line for line in result.history if "loss" in line]
    assert all(-1 <= line["loss"] <= 0 for line in lines) and any(line["projected_gradient"] != 0 for line in lines)
    training = result.record["training"]
    assert training["last_evaluation"].keys() >= {"eval_score", "eval_nll"}
    assert training["prefix_reuse"] is False
    assert f"held-out {objective}" in result.summary()


@torch.no_grad()
def test_generated_answers_are_those_of_greedy_decoding_alone(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([20, 21, 22, 23, 24])]
    found = generated_answers(model, prompts, [3, 5, 1], pad=0)
    for prompt, answer, length in zip(prompts, found, [3, 5, 1], strict=True):
        ids = prompt
        for _ in range(length):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
        assert answer.tolist() == ids[len(prompt) :].tolist()


def test_the_score_that_is_trained_is_the_mean_over_rows(run: Run, llama: Path, rows: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", objective="f1", optimizer="mezo", steps=1, batch_size=40, lr=1e-6, eps=1e-7,
                 eval_dataset=rows, eval_samples=40)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    scores = []
    for example in load_examples(rows):
        ids, labels, _ = encode(tokenizer, example, 32)
        start = int((labels != -100).nonzero()[0])
        (answer,) = generated_answers(model, [ids[:start]], [len(ids) - start], pad=0)
        scores.append(f1(*(tokenizer.decode(part, skip_special_tokens=True) for part in (answer, ids[start:]))))
    mean = sum(scores) / len(scores)
    assert result.history[0]["eval_score"] == pytest.approx(mean)
    assert result.history[1]["loss"] == pytest.approx(-mean)


@torch.no_grad()
def test_the_loss_is_that_of_each_row_alone(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.randint(4, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(10) < torch.tensor([[2], [5], [7]]), -100)
    ids[1, 8:], labels[1, 8:] = 0, -100  # padding
    total, sums = answer_loss(model, ids, labels)
    alone = [answer_loss(model, ids[i : i + 1, : 8 if i == 1 else 10], labels[i : i + 1, : 8 if i == 1 else 10])[1]
             for i in range(3)]  # fmt: skip
    assert torch.allclose(sums, sum(alone), rtol=1e-6) and float(total) == pytest.approx(float(sums[0]))
    assert sums[1] == 8 + 3 + 3


def test_the_log_begins_with_what_a_replay_needs(whole: TuneResult) -> None:
    header = json.loads((whole.out / "trajectory.jsonl").read_text().splitlines()[0])
    assert header["format"] == "burnish.trajectory/1"
    assert header["base"].keys() == {"weights", "dtype", "lora"} and len(header["base"]["weights"]) == 32
