"""What lies in a run directory, as typed records; each file is checked as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, FiniteFloat, TypeAdapter, ValidationError

from burnish.errors import BurnishError

RECORD, PLAN, METRICS, EVALUATIONS = "burnish.json", "plan.json", "metrics.jsonl", "evaluation*.json"
SPECTRUM, SUBSPACE = "spectrum.jsonl", "subspace.jsonl"
ROUNDS = "rounds.jsonl"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run started from; `bytes` counts its weight files."""

    name: str
    architecture: str
    parameters: int
    bytes: int
    family: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """The model that a run wrote."""

    architecture: str
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that a student was distilled from; `parameters` is 0 where only its stored logits were there."""

    name: str
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files beside the weights: taken over as they were, rewritten, left behind."""

    copied: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Software and hardware of a run, as `burnish.runs.environment` records them."""

    versions: dict[str, str]
    platform: str
    threads: int | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What was observed: tokens seen, and the size of the record that they were reduced to."""

    num_tokens: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """`burnish.json`: what was asked, what was read and written, what it took."""

    format: Literal["burnish.run/1"]
    verb: Literal["densify", "prune", "distill", "tune", "replay", "align"]
    started: datetime
    finished: datetime
    options: dict[str, Any]
    source: Source
    output: Output
    environment: Surroundings
    seconds: dict[str, FiniteFloat] = field(default_factory=dict)
    command: str | None = None
    peak_rss_bytes: int | None = None
    statistics: Statistics = field(default_factory=Statistics)
    counts: dict[str, int] = field(default_factory=dict)
    files: Files = field(default_factory=Files)
    notes: tuple[str, ...] = ()
    teacher: Teacher | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What was decided for one layer; `scores` has one value per expert, `scales` and `weights` one entry per group.

    `relative_block_error` is the expected squared error of the block's output over its energy.
    """

    layer: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[FiniteFloat, ...], ...]
    scales: tuple[FiniteFloat, ...]
    shared_scale: FiniteFloat = 1.0
    scores: tuple[FiniteFloat, ...] | None = None
    relative_block_error: FiniteFloat | None = None
    effective_rank: FiniteFloat | None = None

    def __post_init__(self) -> None:
        if not len(self.groups) == len(self.scales) == len(self.weights):
            raise ValueError(
                f"{len(self.groups)} groups, {len(self.weights)} weights and {len(self.scales)} scales:"
                " expected one of each per group"
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept experts, ascending."""
        return tuple(sorted(expert for group in self.groups for expert in group))

    @property
    def score_share(self) -> float | None:
        """Part of the layer's total score that the kept experts hold; None where scores are absent or negative."""
        if not self.scores or min(self.scores) < 0 or sum(self.scores) == 0:
            return None
        return sum(self.scores[expert] for expert in self.kept) / sum(self.scores)


@dataclass(frozen=True, kw_only=True)
class DensifyPlan:
    """`plan.json` of densify: which experts of which layer were kept, and how they were put together."""

    format: Literal["burnish.densify.plan/1"]
    num_experts: int
    layers: tuple[Layer, ...]
    score: str | None = None
    grouping: str | None = None
    scaling: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers is empty: expected one entry per converted layer")
        for layer in self.layers:
            if outside := [expert for expert in layer.kept if not 0 <= expert < self.num_experts]:
                raise ValueError(f"layer {layer.layer} keeps expert {outside[0]}: choose 0..{self.num_experts - 1}")
            if layer.scores is not None and len(layer.scores) != self.num_experts:
                raise ValueError(f"layer {layer.layer} has {len(layer.scores)} scores for {self.num_experts} experts")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a dense model that pruning changes."""

    layers: Annotated[int, Field(validation_alias=AliasChoices("num_hidden_layers", "layers"))]
    hidden_size: int
    intermediate_size: int
    heads: Annotated[int, Field(validation_alias=AliasChoices("num_attention_heads", "heads"))]
    kv_heads: Annotated[int, Field(validation_alias=AliasChoices("num_key_value_heads", "kv_heads"))]


def _indices(value: Any) -> Any:
    """Kept layers, written as ranges (`0-5,9`), as numbers, or as one entry with its `layer` for each."""
    if isinstance(value, str):
        ends = [part.partition("-") for part in value.split(",")]
        if not all(first.isdecimal() and (last or first).isdecimal() for first, _, last in ends):
            raise ValueError(f"{value!r}: expected ranges such as 0-5,9")
        return tuple(index for first, _, last in ends for index in range(int(first), int(last or first) + 1))
    if isinstance(value, list | tuple):
        return tuple(entry.get("layer") if isinstance(entry, Mapping) else entry for entry in value)
    return value


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """`plan.json` of prune: which layers stayed, and between which shapes."""

    format: Literal["burnish.prune.plan/1"]
    source: Annotated[Shape, Field(validation_alias=AliasChoices("source_shape", "source"))]
    target: Annotated[Shape, Field(validation_alias=AliasChoices("target_shape", "target"))]
    layers: Annotated[tuple[int, ...], BeforeValidator(_indices)]
    block_influence: tuple[FiniteFloat, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if outside := [layer for layer in self.layers if not 0 <= layer < self.source.layers]:
            raise ValueError(f"layer {outside[0]} is kept, but the source has {self.source.layers} layers")
        if len(self.layers) != self.target.layers:
            raise ValueError(f"{len(self.layers)} layers are kept, but the target has {self.target.layers}")
        if self.block_influence is not None and len(self.block_influence) != self.source.layers:
            raise ValueError(f"{len(self.block_influence)} block influences for {self.source.layers} layers")


PLANS: dict[str, type[DensifyPlan] | type[PrunePlan]] = {
    "burnish.densify.plan/1": DensifyPlan,
    "burnish.prune.plan/1": PrunePlan,
}


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One line of `metrics.jsonl`: of training, or (`eval_*`) of an evaluation during it; a lost number is None.

    `kl`, `nll`, `eval_kl` and `eval_nll` are in nats per token. `divergence` is the distillation loss alone, which is
    the forward KL only where that was trained on. `eval_score` is the mean score of generated answers. Of an alignment
    `margin` is the implicit reward of what is preferred over that of what is not, `accuracy` the share of pairs where
    it is above 0, `reward` the mean of drawn completions, `reference_kl` the KL to the reference, in nats per
    completion.
    """

    step: int
    tokens: int | None = None
    loss: float | None = None
    kl: float | None = None
    divergence: float | None = None
    nll: float | None = None
    eval_kl: float | None = None
    eval_nll: float | None = None
    eval_score: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    reward: float | None = None
    reference_kl: float | None = None
    eval_loss: float | None = None
    eval_margin: float | None = None
    eval_accuracy: float | None = None
    eval_reward: float | None = None
    eval_reference_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSpectrum:
    """One line of `spectrum.jsonl`: what one adapter adds to its weight after so many steps.

    `singular_values` descend and include `scale`; `effective_rank` and `growth_variation` (standard deviation of their
    square roots over the mean) are None where all are zero.
    """

    step: int
    adapter: str
    singular_values: tuple[FiniteFloat, ...]
    effective_rank: FiniteFloat | None
    growth_variation: FiniteFloat | None
    scale: FiniteFloat = 1.0
    dora: bool = False

    def __post_init__(self) -> None:
        if not self.singular_values or min(self.singular_values) < 0:
            raise ValueError(
                f"{len(self.singular_values)} singular values of {self.adapter}: expected some, none below 0"
            )


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One line of `rounds.jsonl`: what was seen of a policy that had so many rounds.

    Means have their standard errors; `coverage` and `reference_coverage` are the largest ratios of the policy's
    variance of features to that of the round before and of the reference. None where it was not measured.
    """

    rounds: int
    rows: int | None = None
    length: FiniteFloat
    ended: FiniteFloat
    kl: FiniteFloat
    kl_error: FiniteFloat | None
    entropy: FiniteFloat
    entropy_error: FiniteFloat | None
    reward: FiniteFloat | None = None
    reward_error: FiniteFloat | None = None
    win_rate: FiniteFloat | None = None
    win_rate_low: FiniteFloat | None = None
    win_rate_high: FiniteFloat | None = None
    coverage: FiniteFloat | None = None
    reference_coverage: FiniteFloat | None = None
    log_det: FiniteFloat | None = None
    pairs_log_det: FiniteFloat | None = None
    equal_pairs: FiniteFloat | None = None
    certainty: FiniteFloat | None = None


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """One line of `subspace.jsonl`: the top of the Hessian's spectrum, and how gradient and update lie to it.

    The alignments are the shares of a vector's length inside the subspace, `bulk_share` the share of the update's
    squared length outside of it; None where the vector is zero.
    """

    step: int
    eigenvalues: tuple[FiniteFloat, ...]
    gradient_alignment: FiniteFloat | None
    update_alignment: FiniteFloat | None
    bulk_share: FiniteFloat | None


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What instruments wrote while a model was trained."""

    spectra: tuple[AdapterSpectrum, ...] = ()
    subspaces: tuple[Subspace, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value and its standard error; None where it was not a finite number."""

    value: FiniteFloat | None
    standard_error: FiniteFloat | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the model before, on the same tokens; divergence and difference in nats per token."""

    forward_kl: Estimate
    top1_agreement: Estimate
    nll_difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What greedy generation with a cache took."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: FiniteFloat
    decode_tokens_per_second: FiniteFloat
    peak_memory_bytes: int

    @property
    def prefill_ms(self) -> float:
        """Milliseconds until the first new token can be chosen."""
        return 1000 * self.batch_size * self.prompt_tokens / self.prefill_tokens_per_second

    @property
    def decode_ms_per_token(self) -> float:
        """Milliseconds of one decoding step of the whole batch."""
        return 1000 * self.batch_size / self.decode_tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one model; `speed` is what the first release wrote in place of `speeds`."""

    model: str
    num_parameters: int
    bytes_on_disk: int
    perplexity: Estimate
    comparison: Comparison | None
    speeds: tuple[Speed, ...] = ()
    speed: Speed | None = None

    def __post_init__(self) -> None:
        if self.speed is not None and not self.speeds:
            object.__setattr__(self, "speeds", (self.speed,))


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task for all models of an evaluation; differences are paired, to the first model."""

    task: str
    version: str | None
    num_fewshot: int
    limit: int | None
    chat_template_hash: str | None
    fingerprint: str
    metric: str
    filter: str
    higher_is_better: bool | None
    num_samples: int
    values: tuple[Estimate, ...]
    differences: tuple[Estimate | None, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluation.json`: models measured under one setting, the one before first."""

    task: Literal["language-modelling"]
    version: Literal[1]
    rows: tuple[Row, ...]
    dataset: str | None
    split: str
    fingerprint: str
    tokenizer_hash: str
    chat_template_hash: str | None
    num_samples: int
    max_length: int
    num_tokens: int
    batch_size: int
    dtype: str
    device: str
    seed: int
    environment: Surroundings
    tasks: tuple[TaskScore, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty: expected one entry per model")
        for task in self.tasks:
            if not len(task.values) == len(task.differences) == len(self.rows):
                raise ValueError(f"task {task.task} has {len(task.values)} values for {len(self.rows)} models")

    @property
    def before(self) -> Row | None:
        """The model that the others are compared with; None where only one was measured."""
        return self.rows[0] if len(self.rows) > 1 else None

    @property
    def after(self) -> tuple[Row, ...]:
        """The models that burnish made."""
        return self.rows[1:] or self.rows


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One model made from another: its record, its plan (where it was decided), its course (where it was trained)."""

    name: str
    record: Record
    plan: DensifyPlan | PrunePlan | None = None
    metrics: tuple[Metrics, ...] = ()
    instruments: Instruments = field(default_factory=Instruments)
    rounds: tuple[RoundLine, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know, from the record and the plan, each once."""
        return tuple(dict.fromkeys((*self.record.notes, *(self.plan.notes if self.plan else ()))))


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that one page shows: one conversion, several of a sweep or the steps of a recipe, and their evaluations."""

    name: str
    conversions: tuple[Conversion, ...]
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def steps(self) -> bool:
        """Whether the conversions follow one another: numbered directories and no verb twice, which would be a fork."""
        verbs = [step.record.verb for step in self.conversions]
        numbered = all(re.match(r"\d+-", step.name) for step in self.conversions)
        return len(verbs) > 1 and numbered and len(set(verbs)) == len(verbs)


T = TypeVar("T")


def _parse(adapter: TypeAdapter[T], text: bytes, place: str) -> T:
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BurnishError(f"{place}: {key}: {message}" if key else f"{place}: {message}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BurnishError(f"{path} cannot be read: {error.strerror}") from None


def read_as(kind: type[T], path: Path) -> T:
    """A JSON file as a record of this kind.

    Raises:
        BurnishError: it cannot be read, or is no such record; names file and key.
    """
    return _parse(TypeAdapter(kind), _bytes(path), str(path))


@dataclass(frozen=True)
class _Named:
    """What a file says that it is."""

    format: str = ""
    verb: str = ""


def _plan(path: Path) -> DensifyPlan | PrunePlan:
    named = read_as(_Named, path).format
    if named not in PLANS:
        raise BurnishError(f"{path}: format: {named!r}, expected one of {', '.join(PLANS)}")
    return read_as(PLANS[named], path)


def _lines(kind: type[T], path: Path) -> tuple[T, ...]:
    """The lines of a file as records of one kind; none where there is no file."""
    if not path.exists():
        return ()
    lines, adapter = enumerate(_bytes(path).splitlines(), start=1), TypeAdapter(kind)
    return tuple(_parse(adapter, line, f"{path} row {row}") for row, line in lines if line.strip())


def read_instruments(directory: Path) -> Instruments:
    """What instruments wrote into a directory, if they did.

    Raises:
        BurnishError: a line is malformed; names file, row and key.
    """
    return Instruments(
        spectra=_lines(AdapterSpectrum, directory / SPECTRUM), subspaces=_lines(Subspace, directory / SUBSPACE)
    )


def read_rounds(file: Path) -> tuple[RoundLine, ...]:
    """The lines that on-policy rounds wrote, if they did.

    Raises:
        BurnishError: a line is malformed; names file, row and key.
    """
    return _lines(RoundLine, file)


def _conversion(directory: Path) -> Conversion:
    record = read_as(Record, directory / RECORD)
    plan = directory / PLAN
    control = record.options.get("init", "experts") != "experts"  # random numbers need no decision
    return Conversion(
        name=directory.resolve().name,
        record=record,
        plan=_plan(plan) if plan.exists() or (record.verb == "densify" and not control) else None,
        metrics=_lines(Metrics, directory / METRICS),
        instruments=read_instruments(directory),
        rounds=read_rounds(directory / "rounds" / ROUNDS),
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts `k4` before `k16`, and `evaluation.json` before `evaluation-tasks.json`."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", path.name.removesuffix(".json"))
    ]


def read_run(directory: Path) -> Run:
    """The run in a directory: its own record, or else those of its subdirectories, and the evaluations beside them.

    Raises:
        BurnishError: a file is missing or malformed; the message names file and key.
    """
    if not directory.is_dir():
        raise BurnishError(f"{directory} is not a directory: give the directory that burnish wrote")
    record = directory / RECORD
    if record.exists() and read_as(_Named, record).verb != "run":
        found = [directory]
    else:
        inside = (path.parent for path in directory.glob(f"*/{RECORD}"))
        found = sorted((path for path in inside if not path.name.startswith(".")), key=_natural)
    if not found:
        raise BurnishError(f"{directory} holds no {RECORD}, nor does any directory in it: nothing to report")
    return Run(
        name=directory.resolve().name,
        conversions=tuple(map(_conversion, found)),
        evaluations={
            path.name: read_as(Evaluation, path) for path in sorted(directory.glob(EVALUATIONS), key=_natural)
        },
    )
