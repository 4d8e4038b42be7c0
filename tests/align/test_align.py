"""A whole alignment: from pairs, from draws in a step, in rounds; it survives a kill and refuses what is wrong."""

from __future__ import annotations

import gc
import json
import math
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from burnish.align import AlignResult, align
from burnish.align.policy import Policy
from burnish.align.reference import ReferenceLogps
from burnish.align.trainer import with_mismatched
from burnish.data.preferences import encode_preferences, load_completions, load_preferences
from burnish.errors import (
    BurnishError,
    CheckpointError,
    DataError,
    LabelsNeededError,
    OutputError,
    ResumeMismatchError,
    UnsupportedModelError,
)
from tests.align.test_reference import plain_logps
from tests.distill.test_train import hashes, kill
from tests.tune.conftest import save_llama

SMALL: dict[str, Any] = {
    "steps": 12, "max_length": 32, "batch_size": 4, "lr": 3e-3, "eval_samples": 6, "eval_every": 4,
    "checkpoint_every": 4, "device": "cpu",
}  # fmt: skip
DRAWN: dict[str, Any] = {"max_new_tokens": 4, "max_length": 24}

Run = Callable[..., AlignResult]


def lowercase(prompts: list[str], completions: list[str]) -> list[float]:
    """How many letters are small ones."""
    return [float(sum(letter.islower() for letter in text)) for text in completions]


def never_a_number(prompts: list[str], completions: list[str]) -> list[float]:
    return [math.nan for _ in completions]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs_of(count: int, seed: int) -> list[dict[str, Any]]:
    """The first letter of the prompt is preferred to the last, at different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        letters = ["abcd"[pick] for pick in torch.randint(4, (2 + number % 4,), generator=generator)]
        rows.append({"prompt": f"{' '.join(letters)} > ", "chosen": letters[0] * 2, "rejected": letters[-1] + "d",
                     "score_chosen": 1.0, "score_rejected": -0.5 * (number % 3)})  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs_of(40, 0))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "held-out.jsonl", pairs_of(9, 1))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl",
                 [{"prompt": f"{letter} {other} > "} for letter in "abcd" for other in "bcd"])  # fmt: skip


@pytest.fixture(scope="module")
def forget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("forget") / "forget.jsonl",
                 [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs_of(40, 0)])  # fmt: skip


@pytest.fixture
def run(llama: Path, pairs: Path, held_out: Path) -> Run:
    def run(out: Path, **changes: Any) -> AlignResult:
        options = {"dataset": pairs, "eval_dataset": held_out, **SMALL, **changes}
        return align(options.pop("model", llama), out, **options)

    return run


@pytest.fixture(scope="module")
def whole(llama: Path, pairs: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> AlignResult:
    return align(llama, tmp_path_factory.mktemp("whole") / "out", dataset=pairs, eval_dataset=held_out, **SMALL)


def plain_dpo(policy: Path, reference: Path, data: Path, count: int, beta: float = 0.1) -> tuple[float, float]:
    """Loss and accuracy of DPO row by row, each completion by itself in plain transformers."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (policy, reference)]
    tokenizer = AutoTokenizer.from_pretrained(reference)
    rows, _ = encode_preferences(tokenizer, list(load_preferences(data, seed=0))[:count], 32)
    logps = torch.tensor([[plain_logps(model, row) for row in rows] for model in models], dtype=torch.float64)
    margins = beta * ((logps[0] - logps[1])[:, 0] - (logps[0] - logps[1])[:, 1])
    return float(-F.logsigmoid(margins).mean()), float((margins > 0).double().mean())


def evaluations(result: AlignResult) -> tuple[dict[str, Any], dict[str, Any]]:
    training = result.record["training"]
    return training["first_evaluation"], training["last_evaluation"]


def test_it_learns_and_its_numbers_are_those_of_plain_transformers(
    whole: AlignResult, llama: Path, held_out: Path
) -> None:
    first, last = evaluations(whole)
    assert first["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    loss, accuracy = plain_dpo(whole.out, llama, held_out, 6)
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-4) and loss < 0.5
    assert last["eval_accuracy"] == pytest.approx(accuracy)


def test_u5_1_output_has_the_files_and_types_of_the_model_and_says_what_it_is(whole: AlignResult, llama: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (whole.out / name).read_bytes() == (llama / name).read_bytes(), name
    before, after = (load_file(path / "model.safetensors") for path in (llama, whole.out))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert sorted(path.name for path in whole.out.parent.iterdir()) == ["out"]
    record = json.loads((whole.out / "burnish.json").read_text())
    training = record["training"]
    assert (record["verb"], training["objective"], training["mode"], training["rows"]) == (
        "align",
        "dpo",
        "offline",
        40,
    )
    assert training["objective_options"] == {"beta": 0.1}
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8, 12] and lines == list(whole.history)
    assert {"margin", "logps/chosen", "loss", "lr"} <= lines[1].keys()
    card = (whole.out / "README.md").read_text()
    assert "objective: dpo (arXiv 2305.18290), beta 0.1" in card and "reference: the base model" in card
    assert "trained on 40 rows: 40 prompt-chosen-rejected" in card


def test_the_page_of_a_run_draws_margins_and_says_what_was_done(whole: AlignResult) -> None:
    from burnish.report.page import courses, description, tiles
    from burnish.report.records import read_run

    (conversion,) = (found := read_run(whole.out)).conversions
    assert description(conversion) == "aligned with dpo over 12 steps"
    drawn = {course.name: (course.trained, course.evaluated) for course in courses(conversion.metrics)}
    assert drawn == dict.fromkeys(
        ("Margin of implicit rewards", "Share of pairs with a margin above 0", "Training loss"), (True, True)
    )
    assert "Held-out accuracy" in [tile.name for tile in tiles(found, ())]


@pytest.mark.parametrize("point", ["1", "7", "while saving", "before publishing"])
def test_u2_1_u2_4_killed_and_run_again_gives_the_same_bytes_and_losses(
    point: str, run: Run, whole: AlignResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill(point, run, out)
    assert not out.exists()
    again = run(out)
    assert hashes(out) == hashes(whole.out)
    assert again.history == whole.history
    expected = {"1": 0, "7": 4, "while saving": 0, "before publishing": 12}
    assert again.record["training"]["resumed_at_step"] == expected[point]


def test_u2_2_a_run_of_other_options_or_data_is_not_resumed(run: Run, pairs: Path, tmp_path: Path) -> None:
    kill("1", run, tmp_path / "out")
    with pytest.raises(ResumeMismatchError, match=r"options\.beta was None, is 0\.2"):
        run(tmp_path / "out", beta=0.2)
    other = tmp_path / "pairs.jsonl"
    other.write_text(pairs.read_text() + json.dumps(pairs_of(1, 7)[0]))
    with pytest.raises(ResumeMismatchError, match=r"data\.dataset\.pairs\.jsonl was"):
        run(tmp_path / "out", dataset=other)


class _Parameters(TrainerCallback):
    """How many numbers all parameters in memory have, at the end of each step."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gc.collect()
        alive = {id(one): one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)}
        self.found.append(sum(one.numel() for one in alive.values()))


@pytest.mark.parametrize("guided", [False, True])
def test_u8_1_no_reference_model_is_in_memory_while_it_trains(
    guided: bool, run: Run, whole: AlignResult, llama: Path, tmp_path: Path
) -> None:
    gc.collect()
    before = sum(one.numel() for one in gc.get_objects() if isinstance(one, torch.nn.Parameter))
    seen = _Parameters()
    changes = {"reference": whole.out} if guided else {}
    run(tmp_path / "out", steps=2, callbacks=[seen], **changes)
    weights = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert [count - before for count in seen.found] == [weights, weights]


def test_u8_1_reference_log_probabilities_are_computed_once_and_read_after_that(
    run: Run, whole: AlignResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reference.safetensors"
    first = run(tmp_path / "a", reference_logps=file)
    assert first.history == whole.history and hashes(tmp_path / "a") == hashes(whole.out)
    settings = ReferenceLogps.load(file).settings
    assert settings["max_length"] == 32 and settings["dtype"] == "float32" and len(settings["weights"]) == 32
    monkeypatch.setattr("burnish.align.run.computed", lambda *_, **__: pytest.fail("computed again"))
    second = run(tmp_path / "b", reference_logps=file)
    assert second.history == whole.history
    with pytest.raises(ResumeMismatchError, match=r"another run: max_length was 32, is 30"):
        run(tmp_path / "c", reference_logps=file, max_length=30)
    with pytest.raises(ResumeMismatchError, match=r"another run: weights was '\w{32}', is '\w{32}'"):
        run(tmp_path / "d", reference_logps=file, model=whole.out)
    with pytest.raises(DataError, match=r"has no value for \d+ completions, first in row \d"):
        run(tmp_path / "e", reference_logps=file, dataset=write(tmp_path / "more.jsonl", pairs_of(3, 5)))


def test_pre_dpo_takes_another_model_as_the_reference(
    run: Run, whole: AlignResult, llama: Path, held_out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "reference.safetensors"
    guided = run(tmp_path / "out", reference=whole.out, reference_logps=file, steps=2, lr=1e-4, eval_every=1)
    with pytest.raises(ResumeMismatchError, match="another run: weights was"):
        run(tmp_path / "other", reference_logps=file)  # the model itself is another reference
    first, last = evaluations(guided)
    expected, _ = plain_dpo(llama, whole.out, held_out, 6)
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-4) and abs(expected - math.log(2)) > 0.1
    expected, _ = plain_dpo(guided.out, whole.out, held_out, 6)
    assert last["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_adapters_are_trained_against_the_model_without_them_and_written_alone(
    run: Run, llama: Path, held_out: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    result = run(tmp_path / "adapters", lora=True)
    first, last = evaluations(result)
    assert first["eval_loss"] == pytest.approx(math.log(2), rel=1e-6) and last["eval_loss"] < 0.6
    assert not (result.out / "config.json").exists() and not (result.out / "ref").exists()
    written = load_file(result.out / "adapter_model.safetensors")
    assert len(written) == 2 * 3 * 7 and all("ref" not in name for name in written)
    merged = run(tmp_path / "merged", lora=True, merge=True)
    loss, _ = plain_dpo(merged.out, llama, held_out, 6)
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-3)
    model = AutoPeftModelForCausalLM.from_pretrained(result.out).merge_and_unload()
    expected = AutoModelForCausalLM.from_pretrained(merged.out)
    ids = torch.tensor([[5, 40, 41, 9]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)


def test_rewards_of_the_data_and_of_a_function_are_the_same_thing(run: Run, pairs: Path, tmp_path: Path) -> None:
    scored = pairs_of(40, 0)
    for row in scored:
        row["score_chosen"], row["score_rejected"] = lowercase([], [row["chosen"], row["rejected"]])
    by_columns = run(
        tmp_path / "a", objective="pd", dataset=write(tmp_path / "scored.jsonl", scored), eval_dataset=None
    )
    by_function = run(tmp_path / "b", objective="pd", reward_model=lowercase, eval_dataset=None)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert by_columns.history == by_function.history
    other = run(tmp_path / "c", objective="pd", eval_dataset=None)
    assert other.history[0]["loss"] != pytest.approx(by_columns.history[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [("simpo", {"beta": 2.0}), ("pmle", {"gamma": 0.3}), ("ipo", {}), ("rebel", {"options": {"eta": 0.5}}),
     ("pd", {"gamma": 0.3}), ("lcpo", {}), ("cdpo", {"options": {"label_smoothing": 0.2}})],
)  # fmt: skip
def test_objectives_of_pairs_learn(objective: str, changes: dict[str, Any], run: Run, tmp_path: Path) -> None:
    rows = [row | {"annotator": f"person {number % 2}"} for number, row in enumerate(pairs_of(40, 0))]
    data = {"dataset": write(tmp_path / "rows.jsonl", rows), "eval_dataset": None} if objective == "lcpo" else {}
    result = run(tmp_path / "out", objective=objective, **data, **changes)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_kto_pairs_each_completion_with_one_of_another_prompt() -> None:
    """Pairs that were taken apart lie side by side with the same prompt; of five in a circle 0 and 4 begin alike."""
    prompts = [[1], [1], [2], [3], [1]]
    rows = [{"prompt_ids": ids, "branch_ids": [[10 + place]]} for place, ids in enumerate(prompts)]
    found = [row["branch_ids"][1][0] - 10 for row in with_mismatched(Dataset.from_list(rows))]
    assert found == [3, 3, 1, 2, 3]
    with pytest.raises(ValueError, match="kto: all rows have one prompt"):
        with_mismatched(Dataset.from_list(rows[:2]))


def test_judged_completions_are_learned_and_forgotten(
    run: Run, pairs: Path, held_out: Path, forget: Path, tmp_path: Path
) -> None:
    kto = run(tmp_path / "kto", objective="kto", steps=30)
    first, last = evaluations(kto)
    assert last["eval_loss"] < first["eval_loss"] - 0.02
    npo = run(tmp_path / "npo", objective="npo", dataset=forget, eval_dataset=forget)
    first, last = evaluations(npo)
    assert (
        first["eval_loss"] == pytest.approx(20 * math.log(2), rel=1e-5) and last["eval_loss"] < first["eval_loss"] - 3
    )
    assert last["eval_log_ratio"] < -0.3


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", ["npo-gd", "npo-kl"])
def test_what_is_to_be_kept_is_forgotten_less(
    objective: str, lora: bool, run: Run, forget: Path, tmp_path: Path
) -> None:
    """Rows of upper-case letters are kept beside the unlearning of the others."""
    rows = [{"prompt": f"{letter} < ", "completion": letter * 2} for letter in "KLMNOPQR"]
    kept = write(tmp_path / "kept.jsonl", rows)

    def lost(out: Path, **changes: Any) -> float:
        options = {"dataset": forget, "eval_dataset": None, "lora": lora, "merge": lora, "lr": 1e-2 if lora else 3e-3}
        model = run(out, **options | changes).out
        tokenizer = AutoTokenizer.from_pretrained(model)
        data, _ = encode_preferences(tokenizer, load_completions(kept), 32)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return -sum(value for row in data for value in plain_logps(policy, row)) / len(data)

    options = {"retain_weight": 10.0}
    beside = lost(tmp_path / "beside", objective=objective, retain_dataset=kept, options=options, eval_dataset=forget)
    assert beside < lost(tmp_path / "alone", objective="npo") - 1


def test_objectives_of_tokens_learn_with_the_reference_beside_the_policy(
    run: Run, prompts: Path, tmp_path: Path
) -> None:
    for lora in (False, True):
        sparse = run(tmp_path / f"sparse-{lora}", objective="sparse-po", lora=lora, options={"beta": 0.8})
        first, last = evaluations(sparse)
        assert (
            first["eval_loss"] == pytest.approx(math.log(2), rel=1e-5) and last["eval_loss"] < first["eval_loss"] - 0.1
        )
    shortcut = run(tmp_path / "shortcut", objective="rkl-token", dataset=prompts, eval_dataset=None,
                   reward_model=lowercase, steps=30, batch_size=12, lr=1e-2, **DRAWN)  # fmt: skip
    assert rewards_drawn(shortcut.out, prompts) > 2


@pytest.mark.parametrize(
    "changes",
    [{"objective": "rkl", "options": {"beta": 0.0, "gamma": 0.02}}, {"objective": "rlhf", "samples_per_prompt": 8},
     {"objective": "dpo", "samples_per_prompt": 4, "labels": "best-worst"}, {"objective": "pd", "gamma": 0.5}],
    ids=lambda changes: changes["objective"],
)  # fmt: skip
def test_the_policy_is_rewarded_for_what_it_draws_in_each_step(
    changes: dict[str, Any], run: Run, prompts: Path, tmp_path: Path
) -> None:
    result = run(tmp_path / "out", dataset=prompts, eval_dataset=None, reward_model=lowercase, steps=30, batch_size=12,
                 lr=1e-2, **DRAWN | changes)  # fmt: skip
    assert result.record["training"]["mode"] == "online"
    assert rewards_drawn(result.out, prompts) > rewards_drawn(Path(result.record["source"]["name"]), prompts) + 1


def test_an_evaluation_draws_for_its_own_prompts(run: Run, prompts: Path, tmp_path: Path) -> None:
    def of_z(prompts: list[str], completions: list[str]) -> list[float]:
        return [float("z" in prompt) for prompt in prompts]

    other = write(tmp_path / "other.jsonl", [{"prompt": "z > "}, {"prompt": "b z > "}, {"prompt": "too long " * 9}])
    result = run(tmp_path / "out", objective="rlhf", dataset=prompts, eval_dataset=other, reward_model=of_z, steps=2,
                 eval_every=1, **DRAWN)  # fmt: skip
    assert [line["eval_reward"] for line in result.history if "eval_reward" in line] == [1.0] * 3
    assert [line["reward"] for line in result.history if "reward" in line] == [0.0] * 2


def rewards_drawn(model: Path, prompts: Path) -> float:
    """Mean reward of 16 draws for each prompt, in plain transformers."""
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer([json.loads(line)["prompt"] for line in prompts.read_text().splitlines()], return_tensors="pt",
                    padding=True)  # fmt: skip
    torch.manual_seed(0)
    drawn = policy.generate(ids["input_ids"], max_new_tokens=4, do_sample=True, top_k=0, num_return_sequences=16)
    texts = tokenizer.decode(drawn[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(lowercase([], texts)) / len(texts)


def test_an_on_policy_kl_beside_pairs_of_the_data_holds_the_policy_back(run: Run, tmp_path: Path) -> None:
    def moved(**changes: Any) -> float:
        history = run(tmp_path / f"{changes}", objective="pmle", gamma=0.5, eval_dataset=None, **changes).history
        return history[-1]["logps/chosen"] - history[-1]["logps/rejected"]

    assert moved() > moved(kl=10.0, max_new_tokens=4, samples_per_prompt=4) + 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_rounds_raise_the_reward_and_leave_their_course(lora: bool, run: Run, prompts: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", dataset=prompts, eval_dataset=None, reward_model=lowercase, rounds=2, steps=10,
                 lora=lora, samples_per_prompt=4, labels="best-worst", lr=1e-2 if lora else 3e-3, **DRAWN)  # fmt: skip
    rewards = [line["reward"] for line in result.rounds]
    assert len(rewards) == 3 and rewards[-1] > rewards[0] + 0.4
    assert (result.out / "rounds" / "rounds.jsonl").exists() and not list(result.out.rglob("weights"))
    steps = [(line["round"], line["step"]) for line in result.history if "loss" in line]
    assert steps == [(number, 10 * number + step) for number in range(2) for step in range(1, 11)]
    assert "2 rounds of 10 steps" in result.summary()
    if not lora:
        assert rewards_drawn(result.out, prompts) > rewards_drawn(Path(result.record["source"]["name"]), prompts) + 0.3


def test_trainers_of_rounds_leave_the_model_as_it_was(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each puts a forward of its own on the model; behind it, and before it, there is none."""
    found: list[bool] = []

    class Patched(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            found.append("forward" in vars(model))

    drawn = Policy.sample

    def seen(policy: Policy, *args: Any, **options: Any) -> Any:
        found.append("forward" in vars(policy.model))
        return drawn(policy, *args, **options)

    monkeypatch.setattr(Policy, "sample", seen)
    run(tmp_path / "out", dataset=prompts, eval_dataset=None, reward_model=lowercase, rounds=2, steps=1,
        callbacks=[Patched()], **DRAWN)  # fmt: skip
    assert found.count(True) == 2 and len(found) > 4 and not found[-1]


def test_prompts_leave_room_for_what_is_drawn(run: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "prompts.jsonl", [{"prompt": "a" * length} for length in (19, 20, 21)])
    record = run(tmp_path / "out", dry_run=True, **RKL | {"dataset": rows}).record
    assert (record["training"]["rows"], DRAWN) == (2, {"max_new_tokens": 4, "max_length": 24})
    assert "3 rows: 3 prompt; 39 tokens, 0 of completions, 1 dropped" in record["notes"][0]


def test_u2_1_rounds_that_were_killed_end_with_the_same_bytes(run: Run, prompts: Path, tmp_path: Path) -> None:
    options = {"dataset": prompts, "eval_dataset": None, "reward_model": lowercase, "rounds": 2, "steps": 3, **DRAWN}
    whole = run(tmp_path / "whole", **options)
    for point in ("2", "before publishing"):
        kill(point, lambda out, callbacks: run(out, callbacks=callbacks, **options), tmp_path / point)
        again = run(tmp_path / point, **options)
        assert again.history == whole.history and hashes(tmp_path / point) == hashes(tmp_path / "whole")


def test_rounds_wait_for_people_and_go_on(run: Run, prompts: Path, tmp_path: Path) -> None:
    options = {"dataset": prompts, "eval_dataset": None, "rounds": 1, "steps": 2, "labels": "ask", **DRAWN}
    with pytest.raises(LabelsNeededError, match=r"to_label\.jsonl"):
        run(tmp_path / "out", **options)
    (asked,) = tmp_path.rglob("to_label.jsonl")
    ids = [json.loads(line)["id"] for line in asked.read_text().splitlines()]
    write(asked.with_name("labels.jsonl"), [{"id": one, "label": 1} for one in ids])
    assert run(tmp_path / "out", **options).out == tmp_path / "out"


def test_u12_2_u11_1_u11_2_no_network_and_the_global_random_state_is_kept(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state().clone()
    run(tmp_path / "a", steps=2)
    run(tmp_path / "b", steps=2, lora=True)
    run(tmp_path / "c", steps=2, objective="rkl", dataset=prompts, eval_dataset=None, reward_model=lowercase, **DRAWN)
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


LORA = {"lora": True}
RKL: dict[str, Any] = {"objective": "rkl", "eval_dataset": None, "reward_model": lowercase, **DRAWN}
ROUNDS: dict[str, Any] = {"rounds": 2, "eval_dataset": None, "reward_model": lowercase, **DRAWN}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": None}, "give a dataset"),
        ({"objective": "dop"}, "objective='dop' is unknown: nearest is 'dpo'"),
        ({"objective": "sigmoid"}, "TRL's sigmoid is 'dpo' here"),
        ({"gamma": 1.0}, "dpo has no option 'gamma'"),
        ({"beta": -1.0}, "beta=-1.0: expected a number in"),
        ({"beta": 0.1, "options": {"beta": 0.2}}, "beta=0.1 and beta=0.2 in options: give one of them"),
        ({"options": {"betta": 0.2}}, "dpo has no option 'betta': nearest is 'beta'"),
        ({"rounds": -1}, "rounds=-1"),
        ({"objective": "kto", "rounds": 1}, "rounds=1: kto takes judged completions"),
        ({"max_new_tokens": 4}, r"max_new_tokens=4 has no effect without completions that are drawn"),
        ({"labels": "soft"}, r"labels='soft' has no effect without completions that are drawn"),
        ({"sampler": "design"}, "sampler='design' has no effect without --rounds"),
        ({"warm_start": False}, "warm_start=False has no effect without --rounds"),
        ({"reward_model": lowercase}, "reward_model=.* has no effect without an objective of rewards"),
        ({"objective": "simpo", "reference": "x"}, "reference='x' has no effect without an objective that needs a ref"),
        ({"objective": "simpo", "reference_logps": "x"}, "reference_logps='x' has no effect without an objective that"),
        (RKL | {"reference_logps": "x"}, "reference_logps='x' has no effect without completions that are all in the d"),
        ({"reference_logps": "no/such/place"}, r"reference_logps='no/such/place': .*/no/such is no directory"),
        ({"retain_dataset": "x"}, "retain_dataset='x' has no effect without npo-gd or npo-kl"),
        (RKL | {"reward_model": None}, "completions that are drawn need --reward-model"),
        (RKL | {"labels": "hard"}, "labels='hard' has no effect without an objective of pairs"),
        (RKL | {"samples_per_prompt": 1}, "samples_per_prompt=1: rkl needs 2 or more"),
        (RKL | {"temperature": -1.0}, "temperature=-1.0"),
        (RKL | {"top_p": 0.0}, "top_p=0.0"),
        (RKL | {"max_new_tokens": 24}, "max_new_tokens=24 leaves no room for a prompt in max_length=24"),
        (RKL | {"reward_scale": 0.0}, "reward_scale=0.0"),
        (ROUNDS | {"labels": "loud"}, "labels='loud' is unknown"),
        (ROUNDS | {"labels": "scores"}, "labels='scores': dpo takes pairs: choose hard, soft"),
        (ROUNDS | {"objective": "rkl"}, "rounds=2: rkl learns from what the policy draws now"),
        (ROUNDS | {"sampler": "desing"}, "sampler='desing' is unknown: choose one of policy"),
        ({"lora_rank": 4}, "lora_rank=4 has no effect without --lora"),
        (LORA | {"lora_targets": ["w_proj"]}, r"'w_proj' matches no module: choose from q_proj"),
        ({"steps": 3, "epochs": 1.0}, "steps=3 and epochs=1.0: give one of them"),
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"layout": "square"}, "layout='square': choose auto, padded"),
        ({"optimizer": "mezo"}, "optimizer='mezo' takes no gradients"),
        ({"max_length": 4096}, "max_length=4096 but .* has 128 positions"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "tpu9"}, "device='tpu9'"),
        ({"max_shard_size": "5"}, "size '5'"),
        ({"objective": "npo-gd", "dataset": "FORGET"}, "npo-gd needs --retain-dataset: rows of what is to be kept"),
        ({"objective": "npo-kl", "dataset": "FORGET", "reference_logps": "x", "retain_dataset": "x"},
         "reference_logps='x' has no effect without completions that are all in the data, judged as a whole"),
    ],
)  # fmt: skip
def test_u9_2_options_are_refused_before_a_weight_is_read(
    change: dict[str, Any], message: str, run: Run, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.training.base.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    if change.get("dataset") == "FORGET":
        change = change | {"dataset": forget, "eval_dataset": None}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": "sem-dpo"}, DataError, "pairs.jsonl: sem-dpo needs a column 'similarity' in every row"),
        ({"objective": "lcpo"}, DataError, "pairs.jsonl: lcpo needs a column 'annotator' in every row"),
        ({"dataset": "nothing.jsonl"}, DataError, "nothing.jsonl: no such file"),
        ({"max_length": 2}, DataError, "no prompt is shorter than max_length=2"),
        ({"reference": "nothing"}, CheckpointError, "nothing"),
        (RKL | {"reward_model": "no_module:reward"}, BurnishError, "no_module: no such module"),
        (RKL | {"reward_model": "nothing"}, CheckpointError, "nothing"),
    ],
)
def test_u9_2_u9_3_inputs_are_refused_before_a_weight_is_read(
    change: dict[str, Any], error: type[Exception], message: str, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("burnish.training.base.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(error, match=message):
        run(tmp_path / "out", **change)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_and_mixed_ones_are_refused(run: Run, prompts: Path, tmp_path: Path) -> None:
    row = pairs_of(1, 0)[0]
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: column 'chosen' is empty"):
        run(tmp_path / "out", dataset=write(tmp_path / "rows.jsonl", [row, row | {"chosen": ""}]))
    with pytest.raises(DataError, match="expected rows of the same kind as in dataset"):
        run(tmp_path / "out", eval_dataset=prompts)
    unscored = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    with pytest.raises(ValueError, match="pd needs rewards: give columns `score_chosen` and `score_rejected`, or --re"):
        run(tmp_path / "out", dataset=write(tmp_path / "rows.jsonl", [unscored]), objective="pd")


def test_rewards_that_are_no_numbers_stop_the_run(run: Run, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the reward of row 1 is nan"):
        run(tmp_path / "a", objective="pd", reward_model=never_a_number)
    with pytest.raises(DataError, match=r"the reward of row 1 is nan"):
        run(tmp_path / "b", **RKL | {"dataset": prompts, "reward_model": never_a_number})


def test_a_reference_of_another_vocabulary_is_refused(run: Run, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModelError, match=r"'a'|'b'"):
        run(tmp_path / "out", reference=other)


def test_taken_outputs_and_the_model_s_own_directory_are_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path / "out")
    with pytest.raises(OutputError, match="lies in the model's own directory"):
        run(llama / "inside")


def test_u13_1_steps_defaults_and_the_forecast(run: Run, prompts: Path, tmp_path: Path) -> None:
    def dry(**changes: Any) -> dict[str, Any]:
        result = run(tmp_path / "out", dry_run=True, steps=None, lr=None, **changes)
        assert "dry run, nothing written" in result.summary()
        return result.record

    plain = dry()
    assert plain["training"]["steps"] == 10 and plain["options"]["lr"] == 1e-6
    assert dry(epochs=1.5, gradient_accumulation=3)["training"]["steps"] == 6  # ceil(1.5 * ceil(40 / 12))
    assert dry(**LORA)["options"]["lr"] == 1e-5
    weights = 2 * 96 * 32 + 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    assert plain["forecast"]["memory_bytes"] == 16 * weights  # the reference goes before the training begins
    online = {"dataset": prompts, "objective": "rkl", "eval_dataset": None, "reward_model": lowercase, **DRAWN}
    assert dry(**online)["forecast"]["memory_bytes"] == 16 * weights + 4 * weights
    adapters = 3 * 16 * (4 * 32 + 2 * 16 + 2 * 32 + 3 * 32 + 3 * 48)
    assert dry(**online | LORA)["forecast"]["memory_bytes"] == 4 * weights + 16 * adapters
    assert list(tmp_path.iterdir()) == []


def test_the_default_length_is_what_the_model_has(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "out", max_length=None, dry_run=True).record["options"]["max_length"] == 128
