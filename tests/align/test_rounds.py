"""Rounds with a tiny model: what they train on, from where, against what; how they stop and go on; what they refuse."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from burnish.align.options import RoundOptions
from burnish.align.policy import Policy
from burnish.align.rounds import OnPolicyRounds
from burnish.align.sample import sample
from burnish.errors import DataError, LabelsNeededError, OutputError, ResumeMismatchError, TrainingError
from tests.align.tiny_policy import (
    PROMPTS,
    TinyFit,
    contents,
    lines_of,
    tiny_causal,
    tiny_rounds,
    tiny_tokenizer,
    vowels,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def logps_of(model: Any, row: dict[str, Any]) -> list[float]:
    found = []
    for branch in row["branch_ids"]:
        ids = torch.tensor([[*row["prompt_ids"], *branch]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        found.append(float(logps.gather(1, torch.tensor(branch)[:, None]).sum()))
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_stays_and_the_policy_moves_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, lora: bool
) -> None:
    """Refreshing the reference would be another algorithm, with no fixed target."""
    rounds, fit = tiny_rounds(tmp_path / "out", tokenizer, lora=lora)
    lines = rounds.run(2)
    reference = tiny_causal()
    for rows, _, _ in fit.calls:
        for row in rows:
            assert row["ref_logps"] == pytest.approx(logps_of(reference, row), abs=1e-4)
            assert row["rewards"][0] >= row["rewards"][1] and row["label"] == 1.0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[0]["win_rate_low"] < 0.5 < lines[0]["win_rate_high"]
    assert lines[2]["kl"] > 10 * abs(lines[0]["kl"]) + 1e-3
    first, second = (lines_of(tmp_path / f"out/round-00{number}/samples.jsonl") for number in (0, 1))
    ids = {tuple(row["prompt_ids"]): row["branch_ids"] for row in first}
    assert any(ids[tuple(row["prompt_ids"])] != row["branch_ids"] for row in second)
    evaluated = lines_of(tmp_path / "out/round-001/evaluation/samples.jsonl")
    scores = lines_of(tmp_path / "out/round-001/evaluation/scores.jsonl")
    policy = rounds.policy.model
    assert scores[0]["logps"] == pytest.approx(logps_of(policy, evaluated[0]), abs=1e-4)  # left with the last weights


def test_rounds_raise_the_reward_each_time_and_more_than_pairs_of_the_reference(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Vowels are rare under the reference: pairs of the policy say more at as many labels and steps."""
    last = {}
    for sampler in ("policy", "reference"):
        options = {"labels": "soft", "label_scale": 20.0, "samples_per_prompt": 16, "eval_prompts": PROMPTS * 4}
        rounds, fit = tiny_rounds(tmp_path / sampler, tokenizer, sampler=sampler, **options)
        fit.lr, fit.steps = 2e-2, 12
        lines = rounds.run(4)
        assert [line["rounds"] for line in lines] == [0, 1, 2, 3, 4] and [line["rows"] for line in lines[1:]] == [
            96
        ] * 4
        assert lines_of(tmp_path / sampler / "rounds.jsonl") == lines
        last[sampler] = lines[-1]
        if sampler == "policy":
            rewards = [line["reward"] for line in lines]
            assert rewards == sorted(rewards) and rewards[4] > rewards[0] + 8 * lines[4]["reward_error"]
            assert lines[4]["win_rate_low"] > 0.8 and lines[4]["kl"] > 3 * lines[4]["kl_error"] > 0
    error = (last["policy"]["reward_error"] ** 2 + last["reference"]["reward_error"] ** 2) ** 0.5
    assert last["policy"]["reward"] > last["reference"]["reward"] + 4 * error


def test_a_fit_starts_warm_or_from_the_start(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    begun: dict[bool, list[Any]] = {}
    for warm in (True, False):
        rounds, fit = tiny_rounds(tmp_path / str(warm), tokenizer, warm_start=warm)
        found: list[Any] = []

        def watched(rows: Any, number: int, start: Any, fit: Any = fit, found: Any = found) -> Any:
            weights = {name: tensor.clone() for name, tensor in fit.policy.model.state_dict().items()}
            found.append((start.weights, weights))
            return fit(rows, number, start)

        rounds.fit = watched
        rounds.run(2)
        begun[warm] = found
    start = tiny_causal().state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "True/round-000/weights").state_dict()
    for (directory, weights), expected in zip([*begun[True], *begun[False]], (start, after, start, start), strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert directory == (tmp_path / "True/round-000/weights" if expected is after else None)
    # restarted from the start, but with completions of the policy as it was
    files = [load_file(tmp_path / f"{warm}/round-001/weights/model.safetensors") for warm in (True, False)]
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert (tmp_path / "True/round-001/samples.jsonl").read_bytes() == (
        tmp_path / "False/round-001/samples.jsonl"
    ).read_bytes()


def test_batches_are_fresh_or_accumulated(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for accumulate in (False, True):
        rounds, fit = tiny_rounds(tmp_path / str(accumulate), tokenizer, accumulate=accumulate, prompts_per_round=5)
        lines = rounds.run(3)
        sizes = [len(rows) for rows, _, _ in fit.calls]
        assert sizes == ([5, 10, 15] if accumulate else [5, 5, 5]) == [int(line["rows"]) for line in lines[1:]]
        if accumulate:
            assert fit.calls[2][0][:10] == fit.calls[1][0]
            assert fit.calls[2][0][10:] == lines_of(tmp_path / "True/round-002/rows.jsonl")


def test_prompts_take_turns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, prompts_per_round=8)
    rounds.run(3)
    prompts = [row["prompt"] for n in range(3) for row in lines_of(tmp_path / f"out/round-00{n}/samples.jsonl")]
    assert sorted(prompts[:12]) == sorted(prompts[12:]) == sorted(PROMPTS)
    assert prompts[:12] != prompts[12:] and prompts[:12] != PROMPTS


def test_the_reference_may_be_sampled_in_every_round(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, sampler="reference")
    rounds.run(2)
    rows = lines_of(tmp_path / "out/round-001/samples.jsonl")
    expected = sample(tiny_causal(), [row["prompt_ids"] for row in rows], tokenizer=tokenizer, max_new_tokens=6,
                      seed=rounds._seed("round", 1))  # fmt: skip
    assert [row["branch_ids"] for row in rows] == expected


def test_two_rounds_by_design_and_then_by_the_policy(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, sampler=("design", "policy"), samples_per_prompt=4)
    lines = rounds.run(3)
    first, second, third = (lines_of(tmp_path / f"out/round-00{n}/pairs.jsonl") for n in range(3))
    assert len(first) == 12 and len(second) == len(third) == 24
    design = json.loads((tmp_path / "out/round-000/design.json").read_text())
    assert design["rank"] == design["features"] == 3 and design["leverage"] <= 3.04
    assert not (tmp_path / "out/round-001/design.json").exists()
    assert lines[1]["pairs_log_det"] > lines[2]["pairs_log_det"]  # that is what a design is for
    assert lines[1]["design_log_det"] == design["log_det"] and "design_log_det" not in lines[2]


def test_half_of_a_hybrid_batch_is_designed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, sampler="hybrid", samples_per_prompt=3, labels="sampled")
    rounds.run(1)
    pairs = [row["pair"] for row in lines_of(tmp_path / "out/round-000/pairs.jsonl")]
    assert len(pairs) == 12 and pairs[:6] == [[at, 0, 1] for at in range(6)]


def test_the_best_is_paired_with_the_worst(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, fit = tiny_rounds(tmp_path / "out", tokenizer, labels="best-worst", samples_per_prompt=5)
    rounds.run(1)
    scores = lines_of(tmp_path / "out/round-000/scores.jsonl")
    spreads = [[max(score["rewards"]), min(score["rewards"])] for score in scores]
    assert [row["rewards"] for row in fit.calls[0][0]] == spreads


def test_scores_alone_keep_all_completions(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, labels="scores", samples_per_prompt=3)
    seen: list[Any] = []
    rounds.fit = lambda rows, number, start: seen.extend(rows) or {}
    lines = rounds.run(1)
    assert len(seen) == 12 and all(len(row["branch_ids"]) == len(row["rewards"]) == 3 for row in seen)
    assert all("label" not in row for row in seen) and "pairs" not in lines[1]


def test_rewards_are_shaped_before_they_are_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    options = {"reward_scale": 2.0, "reward_clip": (0.0, 0.5), "missing_end_penalty": 3.0, "max_new_tokens": 12}
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, samples_per_prompt=8, **options)
    rounds.run(1)
    samples, scores = (lines_of(tmp_path / f"out/round-000/{name}.jsonl") for name in ("samples", "scores"))
    ends = set()
    for row, score in zip(samples, scores, strict=True):
        raw = vowels([], row["texts"])
        expected = [min(2 * value, 0.5) - 3.0 * (not ended) for value, ended in zip(raw, row["ended"], strict=True)]
        assert score["rewards"] == pytest.approx(expected)
        assert row["ended"] == [branch[-1] == 2 for branch in row["branch_ids"]]
        ends |= set(row["ended"])
    assert ends == {True, False}


def test_people_label_and_the_run_goes_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(2):
        rounds, fit = tiny_rounds(out, tokenizer, labels="ask", reward=None)
        with pytest.raises(LabelsNeededError, match=f"round-00{number}/to_label.jsonl: 12 pairs wait"):
            rounds.run(2)
        assert len(fit.calls) == 0 if number == 0 else True
        asked = lines_of(out / f"round-00{number}/to_label.jsonl")
        labels = [{"id": row["id"], "label": float("e" in row["b"]) * 0.25} for row in asked]
        (out / f"round-00{number}/labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels[::-1]))
    rounds, fit = tiny_rounds(out, tokenizer, labels="ask", reward=None)
    lines = rounds.run(2)
    (rows, number, _), *others = fit.calls
    assert not others and number == 1  # the first round is not done again
    samples = lines_of(out / "round-001/samples.jsonl")
    for row, label, question, seen in zip(rows, labels, asked, samples, strict=True):
        assert question["a"] == seen["texts"][0] and row["label"] == 1 - label["label"]
        assert row["branch_ids"] == seen["branch_ids"][::-1] and "rewards" not in row
    assert "reward" not in lines[2] and "kl" in lines[2]


def test_u2_1_finished_rounds_are_not_done_again_and_more_may_follow(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole, _ = tiny_rounds(tmp_path / "whole", tokenizer, accumulate=True)
    lines = whole.run(3)
    first, _ = tiny_rounds(tmp_path / "parts", tokenizer, accumulate=True)
    first.run(1)
    second, fit = tiny_rounds(tmp_path / "parts", tokenizer, accumulate=True)
    assert second.run(3) == lines
    assert [number for _, number, _ in fit.calls] == [1, 2]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    third, fit = tiny_rounds(tmp_path / "parts", tokenizer, accumulate=True)
    assert third.run(3) == lines and fit.calls == []
    expected = whole.policy.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in third.policy.model.state_dict().items())


def test_a_fit_that_failed_is_begun_anew_from_where_it_started(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole, _ = tiny_rounds(tmp_path / "whole", tokenizer)
    lines = whole.run(2)
    rounds, fit = tiny_rounds(tmp_path / "failing", tokenizer)
    failures = [1, 0]

    def failing(rows: Any, number: int, start: Any) -> Any:
        metrics = fit(rows, number, start)
        if number in failures:
            failures.remove(number)
            raise TrainingError("the loss is nan")
        return metrics

    rounds.fit = failing
    for _ in range(2):
        with pytest.raises(TrainingError):
            rounds.run(2)
    assert rounds.run(2) == lines and contents(tmp_path / "failing") == contents(tmp_path / "whole")


def test_u12_2_the_global_random_state_is_left_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, sampler="hybrid", labels="sampled")
    torch_state, state = torch.get_rng_state(), random.getstate()
    rounds.run(1)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == state


def test_u12_1_a_round_says_what_it_is(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer)
    lines = rounds.run(1)
    record = json.loads((tmp_path / "out/round-000/round.json").read_text())
    assert record["diagnostics"] == lines[1] and record["round"] == 0
    assert sorted(record["files"]) == ["rows.jsonl", "samples.jsonl", "scores.jsonl"]
    told = json.loads((tmp_path / "out/rounds.json").read_text())
    assert told["options"]["sampler"] == "policy" and told["format"] == "burnish.rounds/1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "options.seed was 0, is 1"),
        ({"labels": "soft"}, "options.labels was 'hard', is 'soft'"),
        ({"fingerprint": {"model": "b"}}, "model was 'a', is 'b'"),
        ({"eval_prompts": PROMPTS[:3]}, "eval_prompts was '.*', is '.*'"),
    ],
)
def test_u2_2_rounds_of_another_run_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny_rounds(tmp_path / "out", tokenizer, fingerprint={"model": "a"})
    before = contents(tmp_path)
    with pytest.raises(ResumeMismatchError, match=f"holds rounds of another run: {message}"):
        tiny_rounds(tmp_path / "out", tokenizer, **{"fingerprint": {"model": "a"}, **changes})
    assert contents(tmp_path) == before
    tiny_rounds(tmp_path / "out", tokenizer, overwrite=True, **{"fingerprint": {"model": "a"}, **changes})
    assert contents(tmp_path) != before


def test_a_directory_of_something_else_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already and holds no rounds"):
        tiny_rounds(tmp_path, tokenizer)
    with pytest.raises(OutputError, match="exists already and holds no rounds"):
        tiny_rounds(tmp_path / "notes.txt", tokenizer)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_reward_that_is_no_number_names_the_prompt_and_keeps_the_samples(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def broken(prompts: Any, completions: Any) -> list[float]:
        return [float("nan") if at == 5 else 0.0 for at in range(len(prompts))]

    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer, reward=broken)
    with pytest.raises(DataError, match="the reward of prompt 3, completion 2 is nan"):
        rounds.run(1)
    drawn = (tmp_path / "out/reference/samples.jsonl").read_bytes()
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer)
    rounds.run(1)
    assert (tmp_path / "out/reference/samples.jsonl").read_bytes() == drawn


def test_pairs_of_equal_completions_are_counted_and_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rounds, fit = tiny_rounds(tmp_path / "some", tokenizer, max_new_tokens=1, temperature=0.4, num_features=0)
    line = rounds.run(1)[1]
    equal = sum(len(set(map(tuple, row["branch_ids"]))) == 1
                for row in lines_of(tmp_path / "some/round-000/samples.jsonl"))  # fmt: skip
    assert 0 < equal < 12 and line["equal_pairs"] == equal and line["pairs"] == 12
    assert len(fit.calls[0][0]) == 12 - equal
    rounds, _ = tiny_rounds(tmp_path / "all", tokenizer, temperature=0.0, num_features=0)
    with pytest.raises(DataError, match=r"round 0: all 12 pairs are of equal completions.*raise temperature"):
        rounds.run(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "polcy"}, "sampler='polcy' is unknown: choose one of policy"),
        ({"sampler": ("design", "x")}, "sampler='x' is unknown"),
        ({"labels": "hrd"}, "labels='hrd' is unknown: choose one of hard"),
        ({"label_scale": 0.0}, "label_scale=0.0: expected a number above 0"),
        ({"prompts_per_round": 0}, "prompts_per_round=0: expected 1 or more"),
        ({"samples_per_prompt": 1}, "samples_per_prompt=1: expected 2 or more"),
        ({"num_features": -1}, "num_features=-1: expected 0 or more"),
        ({"eval_prompts": 0}, "eval_prompts=0: expected 1 or more"),
        ({"sampler": "design", "num_features": 0}, "sampler='design' needs features"),
        ({"sampler": "hybrid", "labels": "scores"}, "labels='scores' choose completions themselves"),
        ({"reward_scale": -1.0}, "reward_scale=-1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoundOptions(**options)


def test_bad_calls(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels='hard' needs a reward"):
        tiny_rounds(tmp_path / "out", tokenizer, reward=None)
    with pytest.raises(DataError, match=r"prompts row 1: the prompt with max_new_tokens=63 is longer than .* 64"):
        tiny_rounds(tmp_path / "out", tokenizer, max_new_tokens=63)
    policy = Policy(tiny_causal(), tokenizer)
    with pytest.raises(ValueError, match="no prompt: give one or more"):
        OnPolicyRounds(tmp_path / "out", policy, TinyFit(policy), [], reward=vowels)
    rounds, _ = tiny_rounds(tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match="rounds=0: expected 1 or more"):
        rounds.run(0)
    shutil.rmtree(tmp_path / "out")
