"""The claims with a language model: every way runs on a tiny one, and verdicts follow from outcomes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from claims import alignment_llm as claims
from tests.align.test_trainer import model_dir  # noqa: F401

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def tiny(model_dir, monkeypatch):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": f"say {number}"}] for number in range(12)]
    monkeypatch.setattr(claims, "model_directory", lambda: model_dir)
    monkeypatch.setattr(claims.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.setattr(claims, "instructions", lambda _: chats)
    monkeypatch.setattr(claims, "sentiment", lambda _: lambda prompts, texts: [text.count("e") for text in texts])
    threads = torch.get_num_threads()
    yield claims.Scale("tiny", steps=3, prompts=2, tokens=4, held_out=4, lr=1e-2, device="cpu")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["PD", "RKL", "REBEL", "RLHF", "PMLE", "DPO"])
def test_every_way_trains_and_is_kept(tiny, tmp_path, name):
    found = claims.outcome_of(name, tmp_path, tiny, 0)
    assert found["kl"] != 0 and 0 <= found["win_rate"] <= 1
    assert claims.outcome_of(name, tmp_path, tiny, 0) == found
    assert [path.name for path in (tmp_path / "alignment" / "tiny").iterdir()] == [f"{name}-0.json"]


def test_rounds_differ_from_the_second_on(tiny, tmp_path):
    on, off = (claims.rounds_of(way, tmp_path, tiny, 0) for way in ("on-policy", "offline"))
    assert len(on) == len(off) == 3
    assert on[0] == off[0] and on[2] != off[2]


def test_rebel_regresses_on_the_policy_that_drew(tiny, tmp_path):
    bench = claims.Bench(tmp_path, tiny, 0)
    rows = claims.regressed_on_itself(bench)(bench.model.eval(), bench.rows(slice(0, 2)), 0)
    now = bench.policy.logps(rows)
    for row, logps in zip(rows, now, strict=True):
        assert row["ref_logps"] == pytest.approx(logps, rel=1e-2)


@pytest.mark.parametrize(
    ("wins", "verdict"),
    [
        ({"PD": 0.7, "RKL": 0.7, "REBEL": 0.72, "RLHF": 0.6, "PMLE": 0.5, "DPO": 0.5}, "reproduced"),
        ({"PD": 0.6, "RKL": 0.7, "REBEL": 0.72, "RLHF": 0.6, "PMLE": 0.5, "DPO": 0.5}, "partly"),
        ({"PD": 0.7, "RKL": 0.5, "REBEL": 0.5, "RLHF": 0.5, "PMLE": 0.5, "DPO": 0.5}, "not reproduced"),
    ],
)
def test_the_order_is_judged_by_wins(monkeypatch, tmp_path, wins, verdict):
    monkeypatch.setattr(claims, "outcome_of",
                        lambda name, *_: {"win_rate": wins[name], "gain": 0.0, "kl": 1.0})  # fmt: skip
    assert claims.order_of_ways(tmp_path, claims.CPU).verdict == verdict


@pytest.mark.parametrize(
    ("kl", "wins", "verdict"),
    [(0.5, 0.49, "reproduced"), (0.5, 0.4, "partly"), (2.0, 0.6, "partly"), (2.0, 0.4, "not reproduced")],
)
def test_pmle_is_judged_by_divergence_and_wins(monkeypatch, tmp_path, kl, wins, verdict):
    outcomes = {"PMLE": {"win_rate": wins, "gain": 0.0, "kl": kl}}
    monkeypatch.setattr(claims, "outcome_of",
                        lambda name, *_: outcomes.get(name, {"win_rate": 0.5, "gain": 0.0, "kl": 1.0}))  # fmt: skip
    assert claims.pmle_stays_near(tmp_path, claims.CPU).verdict == verdict


@pytest.mark.parametrize(
    ("on", "verdict"),
    [([1.0, 2.0, 3.0], "reproduced"), ([1.0, 0.5, 3.0], "partly"), ([1.0, 1.5, 1.9], "not reproduced")],
)
def test_rounds_are_judged_by_their_rewards(monkeypatch, tmp_path, on, verdict):
    rewards = {"on-policy": on, "offline": [1.0, 1.0, 2.0]}
    monkeypatch.setattr(claims, "rounds_of", lambda way, *_: [{"reward": value, "kl": 1.0} for value in rewards[way]])
    assert claims.on_policy_rounds(tmp_path, claims.CPU).verdict == verdict
