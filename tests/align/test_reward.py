"""Rewards: what a classifier says of a text whatever its batch, functions of the user, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from burnish.align.reward import RewardModel, Shaping, load_reward, python_reward, rewards_of, weighted_sum
from burnish.data import bundled_model
from burnish.errors import BurnishError, CheckpointError, DataError, UnsupportedModelError
from tests.align.tiny_policy import tiny_causal, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first }}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
)  # fmt: skip
PROMPTS = ["a longer prompt of words", "short", "x", "another one"]
COMPLETIONS = [" yes", " no, and many more words", "", " q"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A classifier whose tokenizer pads with its end token, as many do."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def score_of(model: Any, ids: list[int]) -> float:
    """The head on the state of the last token, without any padding."""
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state
        return float(model.score(states[0, -1]))


def test_a_score_is_that_of_the_last_token_whatever_the_batch_and_the_padding(saved: Path) -> None:
    reward = RewardModel.load(str(saved), batch_size=4)
    ids = [reward.tokenizer(p + c + "</s>")["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert {row[-1] for row in ids} == {reward.tokenizer.pad_token_id}  # the trap
    expected = torch.tensor([score_of(reward.model, row) for row in ids])
    ended = [text + "</s>" for text in COMPLETIONS]
    assert torch.allclose(reward(PROMPTS, ended), expected, atol=1e-6)
    assert expected.std() > 0.1
    reward.batch_size = 1
    assert torch.allclose(reward(PROMPTS, ended), expected, atol=1e-6)


def test_a_chat_goes_through_the_reward_models_own_template(saved: Path) -> None:
    reward = RewardModel.load(str(saved))
    reward.tokenizer.chat_template = TEMPLATE
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert reward.text(chat, "yo") == "<s>s:be</s>u:hi</s>a:yo</s>"
    assert reward.text("hi", "yo") == "<s>u:hi</s>a:yo</s>"
    ids = reward.tokenizer("<s>u:hi</s>a:yo</s>", add_special_tokens=False)["input_ids"]
    assert float(reward(["hi"], ["yo"])) == pytest.approx(score_of(reward.model, ids), abs=1e-6)
    assert chat[-1] == {"role": "user", "content": "hi"}


def test_without_a_template_prompt_and_completion_are_joined(saved: Path) -> None:
    reward = RewardModel.load(str(saved))
    assert reward.text("one ", "two") == "one two"
    assert reward.text([{"role": "user", "content": "one"}], "two") == "one\ntwo"


def test_a_text_that_is_too_long_loses_its_beginning(saved: Path) -> None:
    reward = RewardModel.load(str(saved))
    tail = "e" * 60 + "the end"
    long, short = reward(["a" * 40 + tail], [""]), reward([tail[-64:]], [""])
    assert float(long) == pytest.approx(float(short), abs=1e-6)


def test_what_is_no_reward_model_is_refused(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match=r"is no reward model: 1 weights are missing, first score\.weight"):
        RewardModel.load(str(bundled_model()))
    config = LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=2)  # fmt: skip
    directory = tmp_path_factory.mktemp("two")
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tiny_tokenizer(directory)
    with pytest.raises(UnsupportedModelError, match="has 2 outputs, a reward model has 1"):
        RewardModel.load(str(directory))
    model = tiny_causal()
    model.config.num_labels = 3
    with pytest.raises(UnsupportedModelError, match="mine: has 3 outputs"):
        RewardModel(model, AutoTokenizer.from_pretrained(directory), name="mine")


def test_a_function_is_found_in_a_file_and_in_a_module(tmp_path: Path, saved: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Unit:\n    size: float = 1.0\n"
        "def length(prompts, completions):\n    return [Unit().size * len(text) for text in completions]\n"
    )
    assert rewards_of(load_reward(f"{file}:length"), PROMPTS, COMPLETIONS).tolist() == [4, 24, 0, 2]
    assert rewards_of(load_reward("tests.align.tiny_policy:vowels"), ["p"], ["aeb "]).tolist() == [0.5]
    assert load_reward(len) is len
    assert isinstance(load_reward(saved), RewardModel)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing.py:f", "missing.py: no such file: give path/file.py:function"),
        ("no.such.module:f", "no.such.module: no such module"),
        ("tests.align.tiny_policy:vowel", "has no function 'vowel'; it has .*vowels"),
        ("tests.align.tiny_policy:PROMPTS", "has no function 'PROMPTS'"),
    ],
)
def test_a_function_that_is_not_there(place: str, message: str) -> None:
    with pytest.raises(BurnishError, match=message):
        load_reward(place)


def test_rewards_that_are_no_numbers_name_their_prompt() -> None:
    def broken(prompts: Any, completions: Any) -> list[float]:
        return [1.0, math.nan, -math.inf]

    texts = ["a", "b" * 100, "c"]
    with pytest.raises(
        DataError, match=r"reward of row 2 is nan \(2 of 3 are not finite\): prompt 'q', completion 'b+\.\.\.'"
    ):
        rewards_of(broken, ["p", "q", "r"], texts)
    with pytest.raises(DataError, match="reward of prompt 7 is nan"):
        rewards_of(broken, ["p", [{"role": "user", "content": "q"}], "r"], texts, names=["x", "prompt 7", "y"])
    with pytest.raises(DataError, match=r"returned \[3\] numbers for 2 completions"):
        rewards_of(broken, ["p", "q"], texts[:2])
    with pytest.raises(DataError, match=r"returned \[2, 1\] numbers for 2 completions"):
        rewards_of(lambda p, c: torch.zeros(2, 1), ["p", "q"], texts[:2])


def test_shaping_scales_then_clips_then_takes_the_penalty() -> None:
    rewards, ended = torch.tensor([-3.0, 0.25, 1.0, 1.0]), torch.tensor([True, True, True, False])
    shaped = Shaping(scale=2.0, clip=(-1.0, 1.5), missing_end_penalty=0.75)(rewards, ended)
    assert shaped.tolist() == [-1.0, 0.5, 1.5, 0.75]
    assert Shaping()(rewards, ended).tolist() == rewards.tolist()


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": math.nan}, {"clip": (1.0, 1.0)}, {"missing_end_penalty": -1.0}]
)
def test_shaping_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Shaping(**options)


def test_a_weighted_sum_of_rewards() -> None:
    letters = python_reward("tests.align.tiny_policy", "vowels")
    total = weighted_sum([(2.0, letters), (-0.5, lambda prompts, texts: [len(text) for text in texts])])
    assert rewards_of(total, ["p", "p"], ["aa", "bcda"]).tolist() == [2 - 1, 0.5 - 2]
