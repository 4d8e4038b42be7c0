"""A whole tuning with gradients: it learns answers alone, survives a kill, and refuses what makes no sense."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_model
from burnish.data.examples import encode, load_examples
from burnish.errors import BurnishError, DataError, OutputError, ResumeMismatchError, TrainingError
from burnish.tune import TuneResult, tune
from tests.conftest import logits_of
from tests.distill.test_train import hashes, kill
from tests.tune.conftest import SMALL, ZEROTH, Run


@pytest.fixture(scope="module")
def whole(llama: Path, rows: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return tune(llama, tmp_path_factory.mktemp("whole") / "out", dataset=rows, eval_dataset=held_out, **SMALL)


def plain_nll(directory: Path, data: Path, count: int | None = None) -> float:
    """Cross-entropy of answers row by row, in plain transformers, mean over their tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, tokens = 0.0, 0
    for example in list(load_examples(data, seed=0))[:count]:
        ids, labels, _ = encode(tokenizer, example, 32)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        tokens += int((labels[1:] != -100).sum())
    return total / tokens


def test_it_learns_and_its_numbers_are_those_of_plain_transformers(
    whole: TuneResult, llama: Path, held_out: Path
) -> None:
    first, last = whole.record["training"]["first_evaluation"], whole.record["training"]["last_evaluation"]
    assert last["eval_nll"] < first["eval_nll"] - 0.5
    assert first["eval_nll"] == pytest.approx(plain_nll(llama, held_out, 6), rel=1e-5)
    assert last["eval_nll"] == pytest.approx(plain_nll(whole.out, held_out, 6), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_step_is_adamw_on_the_mean_over_all_answer_tokens(
    accumulation: int, run: Run, llama: Path, rows: Path, tmp_path: Path
) -> None:
    """One step over all rows against the formulas written down; how rows are split into batches does not matter."""
    batch = 40 // accumulation
    result = run(tmp_path / "out", steps=1, batch_size=batch, gradient_accumulation=accumulation, max_grad_norm=1e9,
                 schedule="constant", lr=1e-3, eval_dataset=None)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    total, tokens = torch.zeros(()), 0
    for example in load_examples(rows):
        ids, labels, _ = encode(tokenizer, example, 32)
        total = total + F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    (total / tokens).backward()
    assert result.history[0]["loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        moved = written[name] - parameter.detach()
        # AdamW's first step is lr g / (|g| + 1e-8).
        expected = -1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
        clear = parameter.grad.abs() > 1e-5
        assert torch.allclose(moved[clear], expected[clear], atol=2e-6), name


def test_u5_1_output_has_the_classes_files_and_types_of_the_model(whole: TuneResult, llama: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (whole.out / name).read_bytes() == (llama / name).read_bytes(), name
    before, after = (load_file(path / "model.safetensors") for path in (llama, whole.out))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert sorted(path.name for path in whole.out.parent.iterdir()) == ["out"]


def test_the_record_the_metrics_and_the_card_say_what_was_done(whole: TuneResult) -> None:
    record = json.loads((whole.out / "burnish.json").read_text())
    training = record["training"]
    assert (record["verb"], training["steps"], training["examples"], training["rows"]) == ("tune", 12, 48, 40)
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_nll" in line] == [0, 4, 8, 12]
    assert [line["examples"] for line in lines if "loss" in line] == [4 * step for step in range(1, 13)]
    assert lines == list(whole.history)
    assert "trained on 40 rows: 40 prompt-completion" in " ".join(record["notes"])
    assert "weights tuned by burnish" in (whole.out / "README.md").read_text()


@pytest.mark.parametrize("point", ["1", "7", "while saving", "before publishing"])
def test_u2_1_u2_4_killed_and_run_again_gives_the_same_bytes_and_losses(
    point: str, run: Run, whole: TuneResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill(point, run, out)
    assert not out.exists()
    again = run(out)
    assert hashes(out) == hashes(whole.out)
    assert again.history == whole.history
    expected = {"1": 0, "7": 4, "while saving": 0, "before publishing": 12}
    assert again.record["training"]["resumed_at_step"] == expected[point]


def test_u2_2_a_run_of_other_options_or_data_is_not_resumed(run: Run, rows: Path, tmp_path: Path) -> None:
    kill("1", run, tmp_path / "out")
    with pytest.raises(ResumeMismatchError, match=r"options\.lr was 0\.003, is 0\.001"):
        run(tmp_path / "out", lr=1e-3)
    other = tmp_path / "rows.jsonl"
    other.write_text(rows.read_text() + '{"prompt": "a > ", "completion": "aa"}\n')
    with pytest.raises(ResumeMismatchError, match=r"data\.rows\.jsonl was"):
        run(tmp_path / "out", dataset=other)


@pytest.mark.parametrize("name", ["muon", "amuse", "sgd"])
def test_other_optimizers_train_too(name: str, run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "out", optimizer=name, lr=1e-2)
    training = result.record["training"]
    assert training["last_evaluation"]["eval_nll"] < training["first_evaluation"]["eval_nll"]


@pytest.mark.parametrize("penalty", ["l1", "l0", "group-lasso"])
def test_proxgen_leaves_exact_zeros_in_matrices_alone(penalty: str, run: Run, tmp_path: Path) -> None:
    none = run(tmp_path / "none", optimizer="proxgen", penalty=penalty, penalty_strength=0.0)
    adamw = run(tmp_path / "adamw")
    losses, expected = ([line["loss"] for line in one.history if "loss" in line] for one in (none, adamw))
    assert losses == pytest.approx(expected, rel=1e-4) and none.record["training"]["zeros"] == 0.0
    strength = {"l1": 0.3, "l0": 0.02, "group-lasso": 3.0}[penalty]
    result = run(tmp_path / "out", optimizer="proxgen", penalty=penalty, penalty_strength=strength)
    written = load_file(tmp_path / "out" / "model.safetensors")
    zeros = {name: float((tensor == 0).float().mean()) for name, tensor in written.items()}
    assert max(zeros.values()) > 0.05 and zeros["model.embed_tokens.weight"] == zeros["model.norm.weight"] == 0.0
    assert result.record["training"]["zeros"] == pytest.approx(
        sum(int((tensor == 0).sum()) for tensor in written.values())
        / sum(tensor.numel() for tensor in written.values() if tensor.ndim > 1)
    )
    assert "exactly zero" in result.summary()


def test_u12_2_u11_1_no_network_and_the_global_random_state_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state().clone()
    run(tmp_path / "a", steps=2)
    run(tmp_path / "b", steps=2, lora=True)
    run(tmp_path / "c", **ZEROTH | {"steps": 2})
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("changes", [{}, ZEROTH], ids=["adamw", "mezo-bcd"])
def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(
    changes: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 6:
                with torch.no_grad():
                    model.model.embed_tokens.weight.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"the loss is nan in step 7: the last good checkpoint is .*checkpoint-4"):
        run(tmp_path / "out", callbacks=[Poison()], **changes)
    assert not (tmp_path / "out").exists()
    good = tmp_path / ".out.partial" / "work" / "checkpoint-4"
    assert torch.isfinite(logits_of(good, torch.tensor([[5, 6, 7]]))).all()


ADAMW: dict[str, Any] = {}
MEZO = {"optimizer": "mezo"}
LORA = {"lora": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": None}, "give a dataset"),
        ({"optimizer": "adamv"}, "optimizer='adamv' is unknown: choose one of adamw"),
        ({"objective": "f1"}, "objective='f1' is a score of generated text and has no gradient"),
        (MEZO | {"objective": "accuracy"}, "objective='accuracy': choose one of loss, exact-match, f1"),
        ({"eps": 1e-3}, "eps=0.001 has no effect without mezo or mezo-bcd"),
        ({"queries": 2}, "queries=2 has no effect"),
        (MEZO | {"interval": 5}, "interval=5 has no effect without mezo-bcd"),
        (MEZO | {"max_grad_norm": 1.0}, "max_grad_norm=1.0 has no effect"),
        (MEZO | {"gradient_checkpointing": True}, "gradient_checkpointing has no effect"),
        (MEZO | {"eps": 0.0}, "eps=0.0"),
        (MEZO | {"queries": 0}, "queries=0: expected 1 or more"),
        (MEZO | {"perturbation": "cauchy"}, "perturbation='cauchy': choose one of gaussian"),
        (ZEROTH | {"order": "acending"}, "order='acending': choose one of random"),
        (ZEROTH | {"blocks": ["*nothing*"]}, r"'\*nothing\*' matches no tensor, such as 'model\.embed"),
        (ZEROTH | {"blocks": "many"}, "blocks='many': write a positive number"),
        ({"penalty": "l1"}, "penalty='l1' has no effect without proxgen"),
        ({"optimizer": "proxgen", "penalty": "l3"}, "penalty='l3': choose one of l0, l1/2"),
        ({"optimizer": "proxgen", "penalty_strength": -1.0}, "strength=-1.0"),
        ({"lora_rank": 4}, "lora_rank=4 has no effect without --lora"),
        ({"merge": True}, "merge=True has no effect without --lora"),
        (LORA | {"lora_rank": 0}, "lora_rank=0"),
        (LORA | {"lora_dropout": 1.0}, "lora_dropout=1.0"),
        (LORA | {"lora_targets": ["w_proj"]}, r"'w_proj' matches no module: choose from q_proj, k_proj"),
        (LORA | {"lora_targets": "lm_head"}, "lora_targets names the head"),
        ({"steps": 3, "epochs": 1.0}, "steps=3 and epochs=1.0: give one of them"),
        ({"steps": None, "epochs": 0.0}, "epochs=0.0"),
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"eps": 0.0}, "eps=0.0 has no effect without"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"max_length": 4096}, "max_length=4096 but .* has 128 positions"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"report_to": "paper"}, "report_to='paper'"),
        ({"max_shard_size": "5"}, "size '5'"),
        ({"device": "tpu9"}, "device='tpu9'"),
    ],
)  # fmt: skip
def test_u9_2_options_are_refused_before_a_weight_is_read(
    change: dict[str, Any], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.training.base.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **change)
    assert list(tmp_path.iterdir()) == []


def test_u9_3_rows_of_the_wrong_form_are_refused_by_file_row_and_column(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: column 'completion' is int 3"):
        run(tmp_path / "out", dataset=tmp_path / "rows.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows in it"):
        run(tmp_path / "out", dataset=tmp_path / "empty.jsonl")


def test_a_missing_peft_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(BurnishError, match=r'pip install "burnish\[lora\]"'):
        run(tmp_path / "out", lora=True)


def test_taken_outputs_and_the_model_s_own_directory_are_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path / "out")
    with pytest.raises(OutputError, match="lies in the model's own directory"):
        run(llama / "inside")


def test_steps_follow_from_epochs_and_defaults_from_the_optimizer(run: Run, tmp_path: Path) -> None:
    def training(**changes: Any) -> dict[str, Any]:
        record = run(tmp_path / "out", dry_run=True, steps=None, lr=None, **changes).record
        return record["options"] | {"steps": record["training"]["steps"]}

    assert training()["steps"] == 30  # 3 epochs of 40 rows in batches of 4
    assert training(epochs=1.5, gradient_accumulation=3)["steps"] == 6  # ceil(1.5 * ceil(40 / 12))
    assert training()["lr"] == 2e-5 and training(lora=True)["lr"] == 2e-4 and training()["max_grad_norm"] == 1.0
    mezo = training(optimizer="mezo")
    assert (mezo["steps"], mezo["lr"], mezo["eps"], mezo["schedule"]) == (20_000, 1e-6, 1e-3, "constant")
    bcd = training(optimizer="mezo-bcd", lora=True)
    assert (bcd["lr"], bcd["eps"], bcd["interval"], bcd["lora_alpha"]) == (5e-4, 1e-2, 100, 32)
    assert list(tmp_path.iterdir()) == []


def test_u13_1_the_forecast_counts_what_each_way_of_training_holds(run: Run, half_llama: Path, tmp_path: Path) -> None:
    def needs(**changes: Any) -> dict[str, int]:
        result = run(tmp_path / "out", dry_run=True, **changes)
        assert "dry run, nothing written" in result.summary()
        return result.record["forecast"]

    weights = 2 * 96 * 32 + 32 + 3 * (layer := 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    assert needs()["memory_bytes"] == 16 * weights
    mezo = {"optimizer": "mezo", "lr": 1e-6}
    assert needs(**mezo)["memory_bytes"] == 4 * weights  # inference
    assert needs(**mezo, model=half_llama)["memory_bytes"] == 2 * weights + 4 * weights  # and a float32 copy
    bcd = needs(**ZEROTH, model=half_llama)
    assert bcd["memory_bytes"] == 2 * weights + (4 + 4) * layer  # a copy and the noise of one block
    assert (bcd["block_weights"], bcd["trained_weights"]) == (layer, 3 * layer)
    adapters = 3 * 16 * (4 * 32 + 2 * 16 + 2 * 32 + 3 * 32 + 3 * 48)
    lora = needs(lora=True)
    assert lora["trained_weights"] == adapters
    assert lora["memory_bytes"] == 4 * weights + 16 * adapters


def test_u14_1_tensorboard_gets_the_losses_when_asked(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "out", report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "out" / "runs").rglob("events*")
    seen = [event.value for event in EventAccumulator(str(events.parent)).Reload().Scalars("train/loss")]
    assert seen == pytest.approx([line["loss"] for line in result.history if "loss" in line], rel=1e-5)


def test_shards_are_written_on_request(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "out", steps=1, max_shard_size="40kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert load_model(Checkpoint.open(result.out), dtype="auto") is not None
