"""An exact laboratory for language models: so few sequences that the whole distribution over them is known.

With 4 tokens and length 3 there are 64 sequences. Their log-probabilities come from a table of logits, one row for each
prefix, or from a transformers model; divergences, entropy and gradients are sums over all of them, without sampling.
Sequences are in lexicographic order everywhere; all have the same length, so that none needs an end.

Source: arXiv 2506.01523 for the objectives that are fitted; the setting is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.align.bandit import counts_of
from burnish.runs.randomness import random_state_kept

PairObjective = Callable[[Mapping[str, Tensor]], Tensor]
"""What `objective(...)` gives: losses of pairs from Tensors named `chosen_logps`, `rejected_logps` and so on."""
Loss = Callable[[Tensor], Tensor]
"""Log-probabilities of all sequences [..., sequences] -> loss of each problem [...]."""


def all_sequences(vocabulary: int, length: int) -> Tensor:
    """Every sequence of tokens 0..vocabulary-1, [vocabulary ** length, length] int64."""
    return torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)


def tree_logps(logits: Tensor, vocabulary: int, length: int) -> Tensor:
    """log of the probability of every sequence, [..., vocabulary ** length].

    Args:
        logits: of the next token after each prefix, [..., prefixes, vocabulary]: the empty prefix, then those of one
            token, of two, up to length - 1.
        vocabulary: number of tokens.
        length: of the sequences.
    """
    logps = logits.new_zeros(*logits.shape[:-2], 1)
    levels = torch.split(logits.log_softmax(-1), [vocabulary**depth for depth in range(length)], -2)
    for level in levels:  # [..., vocabulary ** depth, vocabulary]
        logps = (logps.unsqueeze(-1) + level).flatten(-2)
    return logps


def random_tree(
    generator: torch.Generator, problems: int, *, vocabulary: int = 4, length: int = 3, spread: float = 0.5
) -> Tensor:
    """Logits for `tree_logps`, normal of that standard deviation, [problems, prefixes, vocabulary] float64."""
    prefixes = sum(vocabulary**depth for depth in range(length))
    return spread * torch.randn(problems, prefixes, vocabulary, generator=generator, dtype=torch.float64)


def tiny_llama(vocabulary: int, length: int, *, seed: int, hidden: int = 32, layers: int = 2) -> Any:
    """A random Llama that reads sequences of these tokens after one start token, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary + 1, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length + 1,
        bos_token_id=vocabulary, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with random_state_kept():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).double()


def model_logps(model: Any, vocabulary: int, length: int) -> Tensor:
    """log of the probability of every sequence under a causal model, [vocabulary ** length].

    Args:
        model: a transformers model whose vocabulary begins with these tokens and then has a token to start with.
        vocabulary: the model's distribution is taken over this many tokens.
        length: of the sequences.
    """
    sequences = all_sequences(vocabulary, length).to(model.device)
    start = torch.full((len(sequences), 1), vocabulary, device=model.device)
    logits: Tensor = model(torch.cat([start, sequences[:, :-1]], 1)).logits[..., :vocabulary]
    return logits.log_softmax(-1).gather(-1, sequences.unsqueeze(-1)).squeeze(-1).sum(-1)


def entropy(logps: Tensor) -> Tensor:
    """H(pi) in nats, exact, [...]."""
    return -(logps.exp() * logps).sum(-1)


@dataclass(frozen=True)
class PairCounts:
    """Labelled pairs of sequences, counted by kind.

    Attributes:
        first: [pairs] int64, index of a sequence.
        second: [pairs] int64, larger than first.
        wins: how often the first one won, [..., pairs]; fractions are soft labels.
        losses: how often the second one did, [..., pairs].
    """

    first: Tensor
    second: Tensor
    wins: Tensor
    losses: Tensor

    @classmethod
    def draw(
        cls, log_sampler: Tensor, scores: Tensor, scale: float, count: int, generator: torch.Generator
    ) -> PairCounts:
        """Pairs of two sequences of the sampler, labelled with P(a beats b) = sigma(scale (score(a) - score(b))).

        Args:
            log_sampler: log of the probability of each sequence, [problems, sequences].
            scores: [problems, sequences]; log pi* where the target itself is the preference model (and scale gamma),
                log(pi* / pi0) where it is the optimum of a reward (and scale beta).
            scale: see there.
            count: pairs; two equal sequences may be among them, and say nothing.
            generator: draws pairs and labels.
        """
        exact = cls.exact(log_sampler, scores, scale)
        each = exact.wins + exact.losses
        counts = counts_of(count, each, generator)
        wins = torch.binomial(counts, (exact.wins / each).nan_to_num(0.5), generator=generator)
        return cls(exact.first, exact.second, wins, counts - wins)

    @classmethod
    def exact(cls, log_sampler: Tensor, scores: Tensor, scale: float) -> PairCounts:
        """The same with as many pairs as one likes: wins and losses are their probabilities."""
        first, second = torch.triu_indices(scores.shape[-1], scores.shape[-1], 1)
        sampler = log_sampler.exp()
        each = 2 * sampler[..., first] * sampler[..., second]
        wins = each * torch.sigmoid(scale * (scores[..., first] - scores[..., second]))
        return cls(first, second, wins, each - wins)

    def __add__(self, other: PairCounts) -> PairCounts:
        """Both sets of pairs."""
        return PairCounts(self.first, self.second, self.wins + other.wins, self.losses + other.losses)


def pair_loss(
    objective: PairObjective, pairs: PairCounts, log_reference: Tensor, rewards: Tensor | None = None
) -> Loss:
    """The mean of a pair objective over counted pairs, as a function of the policy.

    Args:
        objective: such as `burnish.align.objectives.objective("dpo", beta=0.5)`.
        pairs: what was labelled; each kind of pair is one pair with a soft label, weighted by its count.
        log_reference: log pi0, [..., sequences]; ignored by objectives that need no reference.
        rewards: of every sequence, [..., sequences], for objectives that need them.
    """
    counts = pairs.wins + pairs.losses
    fixed = {
        "ref_chosen_logps": log_reference[..., pairs.first],
        "ref_rejected_logps": log_reference[..., pairs.second],
        "labels": torch.where(counts > 0, pairs.wins / counts, 0.5),
    }
    if rewards is not None:
        fixed |= {"chosen_rewards": rewards[..., pairs.first], "rejected_rewards": rewards[..., pairs.second]}

    def loss(logps: Tensor) -> Tensor:
        named = {"chosen_logps": logps[..., pairs.first], "rejected_logps": logps[..., pairs.second], **fixed}
        flat = {name: values.expand_as(counts).flatten() for name, values in named.items()}
        return (counts * objective(flat).view_as(counts)).sum(-1) / counts.sum(-1)

    return loss


def reverse_kl_loss(rewards: Tensor, log_reference: Tensor, *, gamma: float, beta: float = 0.0) -> Loss:
    """-E[R] - gamma H(pi) + beta KL(pi || pi0), exact; at gamma = 0 it is the objective of RLHF.

    Args:
        rewards: of every sequence, [..., sequences].
        log_reference: log pi0, [..., sequences].
        gamma: weight of the entropy.
        beta: weight of the KL to the reference.

    Source: arXiv 2506.01523, equation 15.
    """

    def loss(logps: Tensor) -> Tensor:
        return (logps.exp() * (gamma * logps - rewards + beta * (logps - log_reference))).sum(-1)

    return loss


def fit(
    parameters: Iterable[Tensor], logps: Callable[[], Tensor], loss: Loss, *, steps: int = 1500, lr: float = 0.05
) -> Tensor:
    """Minimise the loss of a policy by Adam with a rate that falls linearly to zero; its final log-probabilities.

    Args:
        parameters: are changed.
        logps: the policy's log-probabilities of all sequences now, [..., sequences].
        loss: of each problem; problems share no parameters, so that they are fitted side by side.
        steps: of Adam.
        lr: at the start.
    """
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(logps()).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return logps()
