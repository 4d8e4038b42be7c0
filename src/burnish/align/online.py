"""Completions that the policy draws in each step of training, with their rewards or as labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from burnish.align.labels import reward_labels
from burnish.align.options import RoundOptions
from burnish.align.pairs import choose_pairs, pair_rows, rewards_of_pairs
from burnish.align.reward import Reward, rewards_of
from burnish.align.sample import end_tokens, sample, text_of
from burnish.data.examples import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


class StepSampler:
    """Draws completions of a batch's prompts.

    Args:
        tokenizer: of the policy.
        prompts: as they were read, by the `row` of a row.
        options: how completions are drawn and scored; `labels` says what is made of them: "scores" keeps all with their
            rewards, the others make pairs.
        reward: of completions; None draws them alone, for an estimate of the KL divergence.
        batch_size: completions that are drawn at a time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str | Messages],
        options: RoundOptions,
        reward: Reward | None = None,
        *,
        batch_size: int = 32,
    ) -> None:
        self.tokenizer, self.prompts, self.options, self.reward = tokenizer, prompts, options, reward
        self.batch_size = batch_size

    def __call__(self, policy: PreTrainedModel, rows: list[Row], seed: int) -> list[Row]:
        """The rows with `branch_ids`, and with `rewards` and `label` where there is a reward.

        Args:
            policy: as it is now.
            rows: with `prompt_ids` and `row`.
            seed: of the draws.
        """
        drawn = sample(
            policy,
            [row["prompt_ids"] for row in rows],
            tokenizer=self.tokenizer,
            num_samples=self.options.samples_per_prompt,
            seed=seed,
            batch_size=self.batch_size,
            **self.options.drawing,
        )
        samples = [{**row, "branch_ids": branches} for row, branches in zip(rows, drawn, strict=True)]
        if self.reward is None:
            return samples
        scores = [{"rewards": values} for values in self._rewards(policy, samples)]
        if self.options.labels == "scores":
            return [row | score for row, score in zip(samples, scores, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        pairs, _ = choose_pairs("policy", self.options.labels, scores, self.options.samples_per_prompt, generator)
        first, second = rewards_of_pairs(pairs, scores)
        labels = reward_labels(self.options.labels, first, second, scale=self.options.label_scale, generator=generator)
        return pair_rows(pairs, labels.tolist(), samples, scores)

    def _rewards(self, policy: PreTrainedModel, samples: Sequence[Row]) -> list[list[float]]:
        assert self.reward is not None
        ends = set(end_tokens(policy, self.tokenizer))
        completions = [(self.prompts[row["row"]], branch) for row in samples for branch in row["branch_ids"]]
        found = rewards_of(
            self.reward,
            [prompt for prompt, _ in completions],
            [text_of(self.tokenizer, branch) for _, branch in completions],
        )
        ended = torch.tensor([branch[-1] in ends for _, branch in completions])
        shaped: list[list[float]] = self.options.shaping(found, ended).view(len(samples), -1).tolist()
        return shaped
