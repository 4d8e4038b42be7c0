"""How on-policy rounds sample, label and fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from burnish.align.reward import Shaping

Sampling = Literal["policy", "reference", "design", "hybrid"]
Labels = Literal["hard", "soft", "sampled", "best-worst", "ask", "scores"]


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How rounds sample, label and fit.

    Attributes:
        sampler: which pairs are labelled. "policy" and "reference" draw completions and pair them as they come;
            "design" draws completions from the policy and of all their pairs labels as many as there are prompts, drawn
            from the G-optimal design over their features; "hybrid" takes half of each. A tuple names one for each
            round, the last for all that follow: ("design", "policy") is the scheme of two rounds.
        labels: "hard" (the larger reward), "soft" (the Bradley-Terry probability), "sampled" (0 or 1 drawn from it),
            "best-worst" (one hard pair a prompt, of the largest and the smallest reward), "ask" (people, by a file), or
            "scores" (no pairs: all completions with their rewards).
        label_scale: of rewards, for "soft" and "sampled".
        accumulate: fit to the rows of all rounds so far; else to those of this one.
        warm_start: fit from the policy as it is; else from the weights at the start.
        prompts_per_round: in a random order, the next ones for each round; None is all of them.
        samples_per_prompt: completions that are drawn.
        max_new_tokens, temperature, top_p: of a completion.
        reward_scale, reward_clip, missing_end_penalty: see `Shaping`.
        num_features: directions of the features that design and coverage see; 0 leaves both out.
        eval_prompts: how many prompts the policy is assessed on, where none are given for that.
        seed: of all draws.
    """

    sampler: Sampling | tuple[Sampling, ...] = "policy"
    labels: Labels = "hard"
    label_scale: float = 1.0
    accumulate: bool = False
    warm_start: bool = True
    prompts_per_round: int | None = None
    samples_per_prompt: int = 2
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    reward_scale: float = 1.0
    reward_clip: tuple[float, float] | None = None
    missing_end_penalty: float = 0.0
    num_features: int = 16
    eval_prompts: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.samplers:
            if name not in get_args(Sampling):
                raise ValueError(f"sampler={name!r} is unknown: choose one of {', '.join(get_args(Sampling))}")
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels={self.labels!r} is unknown: choose one of {', '.join(get_args(Labels))}")
        if not 0 < self.label_scale < float("inf"):
            raise ValueError(f"label_scale={self.label_scale}: expected a number above 0")
        if self.prompts_per_round is not None and self.prompts_per_round < 1:
            raise ValueError(f"prompts_per_round={self.prompts_per_round}: expected 1 or more")
        if self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: expected 2 or more, to be compared")
        if self.num_features < 0:
            raise ValueError(f"num_features={self.num_features}: expected 0 or more")
        if self.eval_prompts < 1:
            raise ValueError(f"eval_prompts={self.eval_prompts}: expected 1 or more")
        designed = {"design", "hybrid"} & set(self.samplers)
        if designed and self.num_features == 0:
            raise ValueError(f"sampler={min(designed)!r} needs features: set num_features to 1 or more")
        if designed and self.labels in ("best-worst", "scores"):
            raise ValueError(f"labels={self.labels!r} choose completions themselves: not by sampler={min(designed)!r}")
        self.shaping  # noqa: B018 (checks its options)

    @property
    def samplers(self) -> tuple[str, ...]:
        """The sampler of each round, the last one for all that follow."""
        return (self.sampler,) if isinstance(self.sampler, str) else self.sampler

    def sampler_of(self, number: int) -> str:
        """The sampler of a round, counted from 0."""
        return self.samplers[min(number, len(self.samplers) - 1)]

    @property
    def shaping(self) -> Shaping:
        """What is made of rewards."""
        return Shaping(self.reward_scale, self.reward_clip, self.missing_end_penalty)

    @property
    def drawing(self) -> dict[str, Any]:
        """How a completion is drawn."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
