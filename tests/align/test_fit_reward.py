"""A learned reward: the maximum of the Bradley-Terry likelihood, and a rule that it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from burnish.align.fit_reward import fit_reward_model, head_of
from burnish.align.reward import RewardModel
from burnish.data.preferences import Preference
from burnish.errors import TrainingError
from tests.align.tiny_policy import tiny_causal, tiny_tokenizer

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pads with its end token, which half of the texts below hold."""
    directory = tmp_path_factory.mktemp("model")
    tiny_causal(num_hidden_layers=2).save_pretrained(directory)
    tokenizer = tiny_tokenizer(directory)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    return str(directory)


def pairs(count: int, *, label: float | None = None, seed: int = 0) -> list[Preference]:
    """The text with more of the letter a is preferred; labels of one half where both have as many."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        texts = []
        for _ in range(2):
            length = int(torch.randint(2, 9, (), generator=generator))
            picks = torch.randint(len(LETTERS), (length,), generator=generator).tolist()
            texts.append("".join(LETTERS[pick] for pick in picks) + ("</s>" if row % 2 else ""))
        difference = texts[0].count("a") - texts[1].count("a")
        found = 0.5 + 0.5 * (difference > 0) - 0.5 * (difference < 0)
        rows.append(Preference("made", row + 1, "pair", "say ", tuple(texts), label=found if label is None else label))
    return rows


def last_states(reward: RewardModel, rows: list[Preference]) -> torch.Tensor:
    """The state under the head, one text at a time, [pairs, 2, hidden]."""
    found = []
    with torch.no_grad():
        for row in rows:
            for text in row.completions:
                ids = torch.tensor([reward.tokenizer(row.prompt + text)["input_ids"]])  # type: ignore[operator]
                found.append(reward.model.model(ids).last_hidden_state[0, -1])
    return torch.stack(found).view(len(rows), 2, -1)


def test_a_head_alone_comes_to_the_maximum_of_the_likelihood(model: str) -> None:
    """Logistic regression on differences of states, whose optimum is found here by Newton's method."""
    rows = pairs(400)
    reward = fit_reward_model(model, rows, epochs=60, lr=3e-2, batch_size=400, frozen=True)
    states = last_states(reward, rows).double()
    z = states[:, 0] - states[:, 1]
    labels = torch.tensor([row.label for row in rows], dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(z @ weight, labels)

    weight = torch.zeros(z.shape[1], dtype=torch.float64)
    for _ in range(30):
        gradient, hessian = torch.func.grad(loss)(weight), torch.func.hessian(loss)(weight)
        weight = weight - torch.linalg.solve(hessian + 1e-9 * torch.eye(len(weight)).double(), gradient)
    found = head_of(reward.model).weight[0].detach().double()
    start, ours, best = (float(loss(value)) for value in (0 * weight, found, weight))
    assert start == pytest.approx(0.693147, abs=1e-6)
    assert ours - best < 0.02 * (start - best) and start - best > 0.04
    plain = tiny_causal(num_hidden_layers=2).model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in reward.model.model.state_dict().items())


def test_a_rule_is_found_and_kept_on_disk(model: str, tmp_path: Path) -> None:
    out = tmp_path / "reward"
    reward = fit_reward_model(model, pairs(600), epochs=6, lr=1e-2, out=out)
    held_out = [row for row in pairs(300, seed=1) if row.label != 0.5]
    first, second = (
        reward([row.prompt for row in held_out], [row.completions[at] for row in held_out]) for at in (0, 1)
    )
    right = ((first > second) == torch.tensor([row.label == 1 for row in held_out])).double().mean()
    assert right > 0.9
    loaded = RewardModel.load(str(out))
    assert torch.allclose(loaded(["say "] * 3, ["aab", "b", "ca</s>"]), reward(["say "] * 3, ["aab", "b", "ca</s>"]))


def test_u12_1_one_seed_one_reward_and_swapped_labels_turn_it(model: str) -> None:
    texts = ["a", "bb", "cab"]

    def rewards(label: float, seed: int = 0) -> torch.Tensor:
        state = torch.get_rng_state()
        found = fit_reward_model(model, pairs(40, label=label), lr=1e-2, frozen=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return found(["say "] * 3, texts)

    assert torch.equal(rewards(1.0), rewards(1.0))
    assert not torch.equal(rewards(1.0), rewards(1.0, seed=1))
    assert torch.allclose(rewards(1.0), -rewards(0.0), atol=1e-5)  # the loss is odd in the head, which starts at zero
    assert (
        torch.allclose(rewards(0.5), torch.zeros(3), atol=1e-4) or rewards(0.5).abs().max() < rewards(1.0).abs().max()
    )


def test_what_cannot_be_learned_from(model: str) -> None:
    with pytest.raises(ValueError, match="no pair: expected pairs of two completions"):
        fit_reward_model(model, [])
    single: Any = pairs(2)[1]._replace(completions=("a",))
    with pytest.raises(ValueError, match="made row 2 has 1 completions: expected pairs"):
        fit_reward_model(model, [pairs(1)[0], single])
    with pytest.raises(TrainingError, match="the loss is nan in step"):
        fit_reward_model(model, pairs(4, label=float("nan")))
