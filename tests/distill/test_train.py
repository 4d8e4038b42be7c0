"""A whole distillation: it learns, it survives a kill, it gives the same bytes twice, and it refuses bad input."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import TrainerState

from burnish.checkpoint import Staging
from burnish.distill import DistillResult
from burnish.errors import DataError, OutputError, ResumeMismatchError, TrainingError, UnsupportedModelError
from burnish.evaluate import evaluate
from tests.conftest import TinyModel, logits_of, save_tokenizer

Run = Callable[..., DistillResult]


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the run record and the card, which hold times and paths."""
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in ("burnish.json", "README.md")
    }


@pytest.fixture(scope="module")
def whole(teacher: Path, student: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    from burnish.distill import distill
    from tests.distill.conftest import SMALL

    out = tmp_path_factory.mktemp("whole") / "out"
    return distill(student, out, teacher=teacher, dataset=text_file, eval_dataset=text_file, **SMALL)


def test_it_learns_and_its_numbers_are_those_of_evaluate(
    whole: DistillResult, teacher: Path, student: Path, text_file: Path
) -> None:
    first, last = whole.record["training"]["first_evaluation"], whole.record["training"]["last_evaluation"]
    assert last["eval_kl"] < first["eval_kl"]
    rows = evaluate(
        before=teacher, after=[student, whole.out], dataset=text_file, num_samples=2, max_length=32, dtype="float32",
        speed=False,
    ).rows  # fmt: skip
    # the same text in another order of blocks would give other numbers: two blocks of one document
    assert first["eval_kl"] == pytest.approx(rows[1].comparison.forward_kl.value, rel=1e-4)
    assert last["eval_kl"] == pytest.approx(rows[2].comparison.forward_kl.value, rel=1e-4)
    assert last["eval_nll"] == pytest.approx(rows[2].nll.value, rel=1e-4)


def test_u5_1_output_is_the_student_s_own_class_with_its_files_and_types(whole: DistillResult, student: Path) -> None:
    assert whole.out is not None
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in kept & {file.name for file in student.iterdir()}:
        assert (whole.out / name).read_bytes() == (student / name).read_bytes(), name
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (student, whole.out))
    assert type(before) is type(after)
    assert {n: (p.shape, p.dtype) for n, p in before.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in after.named_parameters()
    }
    assert sorted(path.name for path in whole.out.parent.iterdir()) == ["out"]  # nothing is left beside it


def test_the_record_and_the_metrics_say_what_was_done(whole: DistillResult) -> None:
    record = json.loads((whole.out / "burnish.json").read_text())
    training = record["training"]
    assert (record["verb"], training["steps"], training["tokens"], training["tokens_per_step"]) == (
        "distill", 12, 768, 64,
    )  # fmt: skip
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_kl" in line] == [0, 4, 8, 12]
    assert [line["tokens"] for line in lines if "loss" in line] == [64 * step for step in range(1, 13)]
    assert lines == list(whole.history)
    card = (whole.out / "README.md").read_text()
    assert "distilled by burnish" in card and "768 tokens" in card


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed_at(point: str, run: Run, out: Path) -> None:
    torch.set_num_threads(1)
    callbacks = [_Kill(int(point))] if point.isdigit() else []

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "while saving":
        TrainerState.save_to_json = die
    if point == "before publishing":
        Staging.publish = die
    run(out, callbacks=callbacks)


def kill(point: str, run: Run, out: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(point, run, out))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", ["1", "4", "7", "12", "while saving", "before publishing"])
def test_u2_1_u2_4_killed_and_run_again_gives_the_same_bytes_and_losses(
    point: str, run: Run, whole: DistillResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill(point, run, out)
    assert not out.exists()
    again = run(out)
    assert hashes(out) == hashes(whole.out)
    assert again.history == whole.history
    expected = {"1": 0, "4": 0, "7": 4, "12": 8, "while saving": 0, "before publishing": 12}
    assert again.record["training"]["resumed_at_step"] == expected[point]


def test_u2_1_a_checkpoint_that_was_cut_off_is_not_resumed_from(run: Run, whole: DistillResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill("9", run, out)
    checkpoints = tmp_path / ".out.partial" / "work"
    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()
    assert run(out).record["training"]["resumed_at_step"] == 4
    assert hashes(out) == hashes(whole.out)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 1e-3}, "options.lr was 0.003, is 0.001"), ({"seed": 1}, "options.seed was 0, is 1"),
     ({"tokens": 1024}, "options.tokens was 768, is 1024"), ({"loss": "reverse-kl"}, "options.loss")],
)  # fmt: skip
def test_u2_2_a_resume_directory_of_another_config_is_refused_by_key(
    change: dict[str, Any], named: str, run: Run, tmp_path: Path
) -> None:
    kill("1", run, tmp_path / "out")
    with pytest.raises(ResumeMismatchError, match=named):
        run(tmp_path / "out", **change)
    assert run(tmp_path / "out", overwrite=True, **change).out is not None


def test_u12_2_the_global_state_is_the_same_before_and_after(run: Run, tmp_path: Path) -> None:
    random.seed(3)
    torch.manual_seed(3)
    before = (random.getstate(), torch.get_rng_state().clone(), torch.get_num_threads(), dict(os.environ))
    run(tmp_path / "out", tokens=128)
    after = (random.getstate(), torch.get_rng_state(), torch.get_num_threads(), dict(os.environ))
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2:] == after[2:]


def test_every_seed_is_evaluated_on_the_same_text(run: Run, whole: DistillResult, tmp_path: Path) -> None:
    other = run(tmp_path / "out", seed=5)
    assert other.history[0] == whole.history[0]  # the start is the same model on the same blocks
    assert other.history[1]["loss"] != whole.history[1]["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_as_the_cpu_does(run: Run, whole: DistillResult, tmp_path: Path) -> None:
    found = run(tmp_path / "out", device="cuda", dtype="float32", teacher_dtype="float32")
    for mine, theirs in zip(found.history, whole.history, strict=True):
        key = "eval_kl" if "eval_kl" in mine else "loss"
        assert mine[key] == pytest.approx(theirs[key], rel=1e-2), (mine, theirs)
    assert found.record["peak_device_bytes"] > 0


def test_u11_1_no_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    run(tmp_path / "out", tokens=128)


def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(run: Run, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 6:
                with torch.no_grad():
                    model.lm_head.weight.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"the loss is nan in step 7: the last good checkpoint is .*checkpoint-4"):
        run(tmp_path / "out", callbacks=[Poison()])
    assert not (tmp_path / "out").exists()
    good = tmp_path / ".out.partial" / "work" / "checkpoint-4"
    assert torch.isfinite(logits_of(good, torch.tensor([[5, 6, 7]]))).all()
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        run(tmp_path / "early", lr=1e30, checkpoint_every=768)


def test_an_infinite_gradient_stops_the_run_before_it_reaches_the_weights(run: Run, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            pytest.fail("the gradient was let through")

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.lm_head.weight.register_hook(lambda grad: grad * torch.inf)

    with pytest.raises(TrainingError, match=r"the gradient is (nan|inf) in step 1"):
        run(tmp_path / "out", callbacks=[Poison()])


def test_u8_1_stored_logits_replace_the_teacher(
    run: Run, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = tmp_path / "logits"
    written = run(tmp_path / "first", teacher_logits=logits, top_logits=96)
    assert written.record["training"]["tail_mass"] < 1e-4  # every token of the vocabulary is kept
    live = run(tmp_path / "live")
    for mine, theirs in zip(written.history, live.history, strict=True):
        key = "eval_kl" if "eval_kl" in mine else "loss"
        assert mine[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-3)
    loaded: list[str] = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **o: loaded.append(str(path)) or original(path, **o)
    )
    again = run(tmp_path / "second", teacher=None, teacher_logits=logits, top_logits=96)
    assert str(teacher) not in loaded and len(loaded) == 1
    assert again.history == written.history
    with pytest.raises(ResumeMismatchError, match=r"held_out was .*; tokens was"):
        run(tmp_path / "third", teacher=None, teacher_logits=logits, top_logits=96, max_length=16)
    with pytest.raises(ResumeMismatchError, match=r"temperature was 1\.0, is 2\.0"):
        run(tmp_path / "fourth", teacher=None, teacher_logits=logits, top_logits=96, temperature=2.0)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "mixtral"])
def test_expanded_routing_of_the_teacher(model_type: str, tiny_model: TinyModel, some_tokens: torch.Tensor) -> None:
    """k' = k is the teacher itself; k' = E is the mixture of all experts, weighted by the softmax over all."""
    from burnish.checkpoint import Checkpoint
    from burnish.checkpoint.load import load_model

    path = tiny_model(model_type)
    checkpoint = Checkpoint.open(path)
    experts = checkpoint.config.get("num_experts") or checkpoint.config["num_local_experts"]
    plain = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        same = load_model(checkpoint, dtype=torch.float32, num_experts_per_tok=checkpoint.config["num_experts_per_tok"])
        assert torch.equal(same(some_tokens).logits, plain(some_tokens).logits)
        wide = load_model(checkpoint, dtype=torch.float32, num_experts_per_tok=experts)
        seen: dict[str, Any] = {}
        block = next(module for name, module in wide.named_modules() if name.endswith("experts"))
        block.register_forward_pre_hook(lambda _, args: seen.update(indices=args[1], weights=args[2]))
        router = wide.get_submodule(_router_of(wide))
        router.register_forward_hook(lambda *a: seen.update(logits=a[2][0] if isinstance(a[2], tuple) else a[2]))
        wide(some_tokens)
    assert seen["indices"].shape[-1] == experts
    weights = torch.zeros_like(seen["logits"]).scatter(1, seen["indices"].view(-1, experts),
                                                       seen["weights"].view(-1, experts).float())  # fmt: skip
    assert torch.allclose(weights, seen["logits"].float().softmax(-1), atol=1e-5)


def _router_of(model: Any) -> str:
    return next(
        name for name, module in model.named_modules()
        if name.endswith((".mlp.gate", ".block_sparse_moe.router", ".block_sparse_moe.gate"))
    )  # fmt: skip


def test_one_expert_students_resume_with_their_stacked_weights(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path, run: Run
) -> None:
    """OLMoE's student keeps one expert, which transformers saves in pieces and Trainer alone does not find again."""
    from burnish.densify import densify

    moe = tiny_model("olmoe")
    densify(moe, tmp_path / "student", score="sf", dataset=str(text_file), num_samples=4, max_length=32)
    options = {"student": tmp_path / "student", "teacher": moe}
    whole = run(tmp_path / "whole", **options)
    kill("7", lambda out, **o: run(out, **options, **o), tmp_path / "out")
    assert run(tmp_path / "out", **options).history == whole.history
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "give a teacher"),
        ({"loss": "kl"}, "loss='kl' is unknown: choose one of forward-kl"),
        ({"temperature": 0}, "temperature=0"),
        ({"tokens": "many"}, "tokens='many': write a positive number"),
        ({"tokens": 0}, "tokens=0"),
        ({"max_length": 4096}, "max_length=4096 but .* has 128 positions"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"warmup": 1.0}, "warmup=1.0: expected a share"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"optimizer": "adamv"}, "optimizer='adamv' is unknown"),
        ({"report_to": "paper"}, "report_to='paper' is unknown"),
        ({"teacher_top_k": 1}, r"teacher_top_k=1: choose 2\.\.8"),
        ({"teacher_top_k": 9}, r"teacher_top_k=9: choose 2\.\.8"),
        ({"top_logits": 97}, r"top_logits=97: choose 1\.\.96"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "tpu9"}, "device='tpu9'"),
        ({"max_shard_size": "5"}, "size '5': write a positive number with a unit"),
        ({"hidden_weight": 1.0, "teacher_logits": "x"}, "stored logits hold no hidden states"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **change)
    assert list(tmp_path.iterdir()) == []


def test_u8_3_different_tokenizers_are_refused_before_weights_are_loaded(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    monkeypatch.setattr("burnish.distill.train.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UnsupportedModelError, match=r"token \d+ is '[AB]' against '[AB]'"):
        run(tmp_path / "out", teacher=other)


def test_u9_3_empty_and_non_text_data_are_refused_by_file_and_row(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no text in it"):
        run(tmp_path / "out", dataset=tmp_path / "empty.txt")
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: column 'text' is int 3, expected a string"):
        run(tmp_path / "out2", dataset=tmp_path / "rows.jsonl")
    (tmp_path / "short.txt").write_text("a few tokens")
    with pytest.raises(DataError, match="12 tokens do not fill one block of 32"):
        run(tmp_path / "out3", dataset=tmp_path / "short.txt")


def test_taken_outputs_and_the_student_s_own_directory_are_refused(run: Run, student: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path / "out")
    with pytest.raises(OutputError, match="lies in the model's own directory"):
        run(student / "inside")


def test_u13_1_a_dry_run_writes_nothing_and_says_what_it_would_take(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "out", dry_run=True, tokens="4B")
    assert list(tmp_path.iterdir()) == [] and result.out is None
    assert "4,000,000,000 tokens in 62,500,000 steps of 64" in result.summary()
    assert result.record["forecast"]["student_bytes"] == 16 * result.record["source"]["parameters"]


def test_u14_1_tensorboard_gets_the_losses_when_asked(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out", report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "out" / "runs").rglob("events*")
    seen = EventAccumulator(str(events.parent)).Reload()
    losses = [event.value for event in seen.Scalars("train/loss")]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss"] for line in lines if "loss" in line], rel=1e-5)
    assert not (tmp_path / "live" / "runs").exists()


def test_a_smaller_corpus_is_read_again_in_another_order(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one layer of many weights are chosen by tokens " * 3)
    result = run(tmp_path / "out", dataset=tmp_path / "text.txt", tokens=64 * 8)
    assert result.record["training"]["blocks"] == 4
    assert result.record["training"]["steps"] == 8


def test_mixed_vocabulary_padding_is_sliced_and_said(tiny_model: TinyModel, run: Run, tmp_path: Path) -> None:
    padded = tiny_model("qwen3_moe", vocab_size=112)
    save_tokenizer(padded)
    result = run(tmp_path / "out", teacher=padded, tokens=128)
    assert any("[112, 96] logits: the first 96 take part" in note for note in result.record["notes"])
