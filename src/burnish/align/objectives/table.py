"""The objectives by name: what each needs, its formula and its paper; and an objective with its options settled."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from burnish.align.objectives.cpo import cpo
from burnish.align.objectives.dpo import dpo, hinge, sigmoid_norm
from burnish.align.objectives.exo import exo
from burnish.align.objectives.ipo import ipo
from burnish.align.objectives.kto import kto
from burnish.align.objectives.lcpo import label_posterior, lcpo
from burnish.align.objectives.madpo import madpo
from burnish.align.objectives.noisy_labels import cdpo, rdpo
from burnish.align.objectives.npo import npo, npo_gd, npo_kl
from burnish.align.objectives.option import Range
from burnish.align.objectives.orpo import orpo
from burnish.align.objectives.pairs import input_names, mixture
from burnish.align.objectives.pd import preference_distillation
from burnish.align.objectives.pmle import pmle
from burnish.align.objectives.rebel import rebel, reward_distillation, reward_distillation_ce
from burnish.align.objectives.rkl import rkl, rkl_token, rlhf
from burnish.align.objectives.sem_dpo import sem_dpo
from burnish.align.objectives.simpo import simpo
from burnish.align.objectives.sparse_po import sparse_po

Data = Literal["pairs", "scored pairs", "unpaired", "samples", "forget"]
"""Two answers; two answers with rewards; one with a label; answers of the policy with rewards; one to be forgotten."""

KL_WEIGHT = "kl"
"""Option of objectives whose regulariser is the on-policy KL: a loss of other rows, which a trainer adds."""

KL_RANGE = Range(0, float("inf"), "[)")


@dataclass(frozen=True)
class Objective:
    """One row.

    Attributes:
        name: what a user types.
        loss: a function of Tensors, whose positional names say what it needs, and of keyword-only options; gives the
            loss of each row, Tensor `[batch]`.
        data: kind of rows.
        formula: for people; the letters are explained on the method page.
        paper: where it is from.
        reconstructed: the formula was not read in the paper.
        takes_kl: it has the option `kl`, weight of `on_policy_kl`.
        peer: what TRL calls it.
        base: the pair loss inside of one that infers labels.
        note: for people.
    """

    name: str
    loss: Callable[..., Tensor]
    data: Data
    formula: str
    paper: str
    reconstructed: bool = False
    takes_kl: bool = False
    peer: str = ""
    base: Callable[..., Tensor] | None = None
    note: str = ""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the loss is computed from."""
        return input_names(self.loss)

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """Options with their defaults."""
        parameters = inspect.signature(self.loss).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        return defaults | ({KL_WEIGHT: 0.0} if self.takes_kl else {})

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of a reference are among the inputs."""
        return any(name.startswith("ref_") for name in self.inputs)

    @property
    def needs_rewards(self) -> bool:
        """Whether rewards are among the inputs."""
        return any(name.endswith("rewards") for name in self.inputs)

    @property
    def soft(self) -> Callable[..., Tensor] | None:
        """The loss with soft labels as one more input; None where a row is not two answers."""
        return mixture(self.loss) if self.data in ("pairs", "scored pairs") else None

    def bind(self, **options: Any) -> Bound:
        """This objective with its options settled.

        Raises:
            ValueError: an option is unknown (the nearest is named), out of its range, or excludes another.
        """
        ranges = self._ranges()
        for name, value in options.items():
            if name not in self.options:
                raise ValueError(f"{self.name} has no option {name!r}: {_nearest(name, self.options)}")
            _check(name, value, self.options[name], ranges.get(name))
        bound = Bound(self, {**self.options, **options})
        bound(dict.fromkeys(self.inputs, torch.ones(1, 2)))  # refuses options that exclude each other
        return bound

    def _ranges(self) -> dict[str, Range]:
        hints = typing.get_type_hints(self.loss, include_extras=True)
        found = {name: _range(hint) for name, hint in hints.items()}
        return {name: one for name, one in found.items() if one is not None} | {KL_WEIGHT: KL_RANGE}


@dataclass(frozen=True)
class Bound:
    """An objective with its options settled: call it with the Tensors that are there.

    Attributes:
        objective: the row.
        options: all of them.
    """

    objective: Objective
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What a user types."""
        return self.objective.name

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the loss is computed from."""
        return self.objective.inputs

    @property
    def kl(self) -> float:
        """Weight of `on_policy_kl` beside the loss; whoever sums the losses adds that term."""
        return float(self.options.get(KL_WEIGHT, 0.0))

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of a reference are needed, by the loss or by the KL beside it."""
        return self.objective.needs_reference or self.kl > 0

    @property
    def needs_rewards(self) -> bool:
        """Whether rewards are needed."""
        return self.objective.needs_rewards

    def __call__(self, available: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row: Tensor [batch].

        Pairs with `labels` among the Tensors have soft labels, the probability that the first answer is the better one
        (see `mixture`), unless the objective reads them itself.

        Args:
            available: Tensors by the names in `inputs`; more than those do no harm.

        Raises:
            ValueError: one is missing.
        """
        soft = self.objective.soft if "labels" in available else None
        return self._of(soft or self.objective.loss, available)

    def label_posterior(self, available: Mapping[str, Tensor]) -> Tensor | None:
        """The posterior that each label is right [batch], for `updated_reliability`; None where none is inferred."""
        return None if self.objective.base is None else self._of(label_posterior(self.objective.base), available)

    def _of(self, function: Callable[..., Tensor], available: Mapping[str, Tensor]) -> Tensor:
        names = input_names(function)
        missing = [name for name in names if name not in available]
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}: given are {', '.join(available) or 'none'}")
        own = inspect.signature(function).parameters
        settings = {name: value for name, value in self.options.items() if name in own}
        return function(**{name: available[name] for name in names}, **settings)


_ROWS = (
    Objective(
        "pmle", pmle, "pairs", "−ln σ(γ (ln π(w) − ln π(l)))", "arXiv 2506.01523", takes_kl=True,
        note="no reference; with a soft label it is preference distillation",
    ),
    Objective(
        "pd", preference_distillation, "scored pairs", "CE(σ(s (R(w) − R(l))), σ(γ (ln π(w) − ln π(l))))",
        "arXiv 2506.01523", takes_kl=True, note="preference distillation",
    ),
    Objective(
        "rkl", rkl, "samples", "−E R − γ H(π) + β KL(π, ref)", "arXiv 2506.01523",
        note="exact score-function gradient, leave-one-out baseline",
    ),
    Objective(
        "rkl-token", rkl_token, "samples", "rkl, entropy by token", "arXiv 2506.01523", reconstructed=True,
        note="the entropy bonus of PPO: a token's own entropy alone",
    ),
    Objective("rlhf", rlhf, "samples", "−E R + β KL(π, ref)", "arXiv 2402.14740", note="RLOO; rkl with γ = 0"),
    Objective(
        "dpo", dpo, "pairs", "−ln σ(β Δ)", "arXiv 2305.18290", peer="sigmoid",
        note="with a trained model as the reference: Pre-DPO, arXiv 2504.15843",
    ),
    Objective("cdpo", cdpo, "pairs", "(1 − ε) dpo(Δ) + ε dpo(−Δ)", "E. Mitchell 2023", note="ε: `label_smoothing`"),
    Objective(
        "rdpo", rdpo, "pairs", "((1 − ε) dpo(Δ) − ε dpo(−Δ)) / (1 − 2ε)", "arXiv 2403.00409", peer="robust",
        note="unbiased over flipped labels",
    ),
    Objective(
        "ipo", ipo, "pairs", "(Δ − 1 / (2β))²", "arXiv 2310.12036", peer="ipo", note="`average=True` is TRL's, by token"
    ),
    Objective("hinge", hinge, "pairs", "max(0, 1 − β Δ)", "arXiv 2305.10425", peer="hinge"),
    Objective(
        "exo", exo, "pairs", "KL((q, 1 − q), (1 − ε, ε)), q = σ(β Δ)", "arXiv 2402.00856", peer="exo_pair"
    ),
    Objective(
        "sigmoid-norm", sigmoid_norm, "pairs", "−ln σ(β (h(w) / L(w) − h(l) / L(l)))", "arXiv 2411.15124",
        peer="sigmoid_norm", note="DPO by token",
    ),
    Objective(
        "simpo", simpo, "pairs", "−ln σ(β (p(w) − p(l)) − γ)", "arXiv 2405.14734", peer="simpo",
        note="`gamma_beta_ratio` in the place of γ",
    ),
    Objective(
        "orpo", orpo, "pairs", "−p(w) − β ln σ(logit(p(w)) − logit(p(l)))", "arXiv 2403.07691", peer="orpo",
        note="logit of the probability whose logarithm is p",
    ),
    Objective(
        "cpo", cpo, "pairs", "−ln σ(β (ln π(w) − ln π(l))) − α ln π(w)", "arXiv 2401.08417", peer="cpo",
        note="`average=True` is TRL's α term, by token",
    ),
    Objective(
        "madpo", madpo, "scored pairs", "w(R(w) − R(l)) dpo(Δ)", "arXiv 2510.05342",
        note="weight from the reward margin: far apart counts less",
    ),
    Objective(
        "sem-dpo", sem_dpo, "pairs", "exp(−α (1 − similarity)) dpo(Δ)", "arXiv 2507.20133", reconstructed=True,
        note="needs `similarity` of prompt and chosen answer",
    ),
    Objective(
        "lcpo", lcpo(dpo), "pairs", "−w ln σ(S) − (1 − w) ln σ(−S)", "arXiv 2509.24159", base=dpo,
        note="`lcpo:NAME` infers labels for any pair loss; needs `reliability`",
    ),
    Objective(
        "sparse-po", sparse_po, "pairs", "−ln σ(β (u − δ)), sums over masked tokens", "arXiv 2410.05102",
        note="by token; needs masks",
    ),
    Objective(
        "rebel", rebel, "scored pairs", "(Δ − η (R(w) − R(l)))²", "arXiv 2404.16767",
        note="its reference is the policy that sampled",
    ),
    Objective(
        "reward-distillation", reward_distillation, "scored pairs", "(Δ − (R(w) − R(l)) / β)²", "arXiv 2601.08421",
        reconstructed=True, note="one reference in all rounds",
    ),
    Objective(
        "reward-distillation-ce", reward_distillation_ce, "scored pairs", "CE(σ(R(w) − R(l)), σ(β Δ))",
        "arXiv 2601.08421", reconstructed=True, note="pd with the reference in its logit",
    ),
    Objective("kto", kto, "unpaired", "1 − σ(±β (h − kl))", "arXiv 2402.01306", peer="kto", note="+ desirable, − not"),
    Objective("npo", npo, "forget", "−(2 / β) ln σ(−β h)", "arXiv 2404.05868", note="unlearning"),
    Objective("npo-gd", npo_gd, "forget", "npo − mean ln π per retained token", "arXiv 2404.05868"),
    Objective("npo-kl", npo_kl, "forget", "npo + KL(ref, π) per retained token", "arXiv 2404.05868"),
)  # fmt: skip

OBJECTIVES: dict[str, Objective] = {row.name: row for row in _ROWS}


def objective(name: str, **options: Any) -> Bound:
    """The objective of a name, with its options: `objective("dpo", beta=0.05)`.

    Args:
        name: a key of OBJECTIVES, or `lcpo:NAME` with the name of a pair loss.
        options: of that row; the rest keep their defaults.

    Raises:
        ValueError: the name or an option is unknown, or a value out of its range; says the nearest, or the range.

    Examples:
        >>> bound = objective("rebel", eta=0.5)
        >>> bound.inputs[:2], bound.needs_reference, dict(bound.options)
        (('chosen_logps', 'rejected_logps'), True, {'eta': 0.5})
    """
    return find(name).bind(**options)


def find(name: str) -> Objective:
    """The row of a name; underscores are hyphens.

    Raises:
        ValueError: it is unknown, or what `lcpo:` names is not a pair loss.
    """
    wrapper, _, inner = name.replace("_", "-").partition(":")
    if inner:
        base = find(inner)
        if wrapper != "lcpo" or base.soft is None or base.base is not None:
            raise ValueError(f"objective={name!r}: only lcpo has another inside of it, a pair loss such as lcpo:simpo")
        return dataclasses.replace(
            OBJECTIVES["lcpo"], name=f"lcpo:{base.name}", loss=lcpo(base.loss), base=base.loss, data=base.data
        )
    if wrapper not in OBJECTIVES:
        ours = {row.peer: row.name for row in OBJECTIVES.values()}
        hint = f"TRL's {name} is {ours[name]!r} here" if name in ours else _nearest(wrapper, OBJECTIVES)
        raise ValueError(f"objective={name!r} is unknown: {hint}")
    return OBJECTIVES[wrapper]


def _check(name: str, value: Any, default: Any, allowed: Range | None) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected true or false")
    elif not (value is None and default is None):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (allowed is not None and value not in allowed):
            raise ValueError(f"{name}={value!r}: expected a number" + (f" in {allowed}" if allowed else ""))


def _range(hint: Any) -> Range | None:
    """The range in an annotation; optional ones have it a level down."""
    if typing.get_origin(hint) is typing.Annotated:
        return next((one for one in hint.__metadata__ if isinstance(one, Range)), None)
    return next(filter(None, map(_range, typing.get_args(hint))), None)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, names := sorted(known), n=1)
    return f"nearest is {close[0]!r}" if close else f"choose one of {', '.join(names)}"
