"""What rounds see of a policy: completions of prompts, their rewards, log-probabilities and features, as rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from burnish.align.assess import Observed, stacked
from burnish.align.features import Projection, principal_directions
from burnish.align.options import RoundOptions
from burnish.align.pairs import Row
from burnish.align.policy import Policy
from burnish.align.reward import Reward, rewards_of
from burnish.align.sample import text_of
from burnish.data.examples import Messages
from burnish.data.preferences import Preference, encode_pair
from burnish.errors import DataError


class Prompt(NamedTuple):
    """A prompt, and its tokens."""

    content: str | Messages
    ids: list[int]


def encoded_prompts(
    policy: Policy, prompts: Sequence[str | Messages | Preference], max_new_tokens: int
) -> list[Prompt]:
    """Prompts in the policy's tokens.

    Raises:
        DataError: one leaves no room for a completion in the model's context; names it.
        ValueError: there is none.
    """
    if not prompts:
        raise ValueError("no prompt: give one or more")
    room = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    found = []
    for number, prompt in enumerate(prompts, start=1):
        row = prompt if isinstance(prompt, Preference) else Preference("prompts", number, "prompt", prompt, ())
        branches = encode_pair(policy.tokenizer, row, room)
        if branches is None or len(branches.prompt_ids) + max_new_tokens > room:
            raise DataError(
                f"{row.source} row {row.row}: the prompt with max_new_tokens={max_new_tokens} is longer than the"
                f" model's {room} positions: shorten it, or leave it out"
            )
        found.append(Prompt(row.prompt, branches.prompt_ids))
    return found


class Observer:
    """Draws completions and scores them.

    Args:
        policy: what is looked at.
        reward: of completions, or None.
        options: how completions are drawn, and what is made of rewards.
        projection: file of the directions of the features; written by `fit_projection`.
    """

    def __init__(self, policy: Policy, reward: Reward | None, options: RoundOptions, projection: Path) -> None:
        self.policy, self.reward, self.options, self.projection = policy, reward, options, projection

    def drawn(self, prompts: Sequence[Prompt], *, num_samples: int, seed: int, of_reference: bool) -> list[Row]:
        """A row for each prompt: `prompt`, `prompt_ids`; and of each completion `branch_ids`, `texts`, `ended`."""
        completions = self.policy.sample(
            [prompt.ids for prompt in prompts],
            num_samples=num_samples,
            seed=seed,
            of_reference=of_reference,
            **self.options.drawing,
        )
        return [
            {
                "prompt": prompt.content,
                "prompt_ids": prompt.ids,
                "branch_ids": branches,
                "texts": [text_of(self.policy.tokenizer, branch) for branch in branches],
                "ended": [branch[-1] in self.policy.ends for branch in branches],
            }
            for prompt, branches in zip(prompts, completions, strict=True)
        ]

    def scored(self, samples: Sequence[Row]) -> list[Row]:
        """A row for each prompt: of each completion `ref_logps`, `rewards` where there is a reward, and `features`.

        Raises:
            DataError: a reward is not a finite number; names prompt and completion.
        """
        columns: dict[str, list[Any]] = {"ref_logps": self.policy.logps(samples, of_reference=True)}
        if self.reward is not None:
            columns["rewards"] = self._rewards(self.reward, samples)
        if self.options.num_features:
            projection = Projection.load(self.projection)
            columns["features"] = [projection(states).tolist() for states in self.policy.reference_states(samples)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def fit_projection(self, samples: Sequence[Row]) -> None:
        """Choose the directions of the features, unless that was done, or none are asked for."""
        if self.options.num_features and not self.projection.exists():
            states = self.policy.reference_states(samples)
            principal_directions(states, self.options.num_features).save(self.projection)

    def _rewards(self, reward: Reward, samples: Sequence[Row]) -> list[list[float]]:
        places = [(at, number) for at, row in enumerate(samples) for number in range(len(row["texts"]))]
        raw = rewards_of(
            reward,
            [samples[at]["prompt"] for at, _ in places],
            [samples[at]["texts"][number] for at, number in places],
            names=[f"prompt {at + 1}, completion {number + 1}" for at, number in places],
        )
        ended = torch.tensor([samples[at]["ended"][number] for at, number in places])
        shaped = torch.split(self.options.shaping(raw, ended), [len(row["texts"]) for row in samples])
        return [values.tolist() for values in shaped]


def as_observed(samples: Sequence[Row], scores: Sequence[Row]) -> Observed:
    """Rows with `logps` as the tensors that `assess` takes."""
    lengths = [[len(branch) for branch in row["branch_ids"]] for row in samples]
    logps, ref_logps = stacked(scores, "logps"), stacked(scores, "ref_logps")
    assert logps is not None and ref_logps is not None
    return Observed(
        lengths=torch.tensor(lengths),
        ended=torch.tensor([row["ended"] for row in samples]),
        logps=logps,
        ref_logps=ref_logps,
        rewards=stacked(scores, "rewards"),
        features=stacked(scores, "features"),
    )
