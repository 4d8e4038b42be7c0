"""Understand a request to align before the work starts: all checks that need only headers, configs, data and flags."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from burnish.align.objectives import Bound, objective
from burnish.align.options import RoundOptions
from burnish.align.reference import ReferenceLogps, reference_settings
from burnish.align.reward import FUNCTION, load_reward
from burnish.align.sample import require_drawing
from burnish.align.trees import Layout
from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_config, load_tokenizer
from burnish.data.preferences import (
    Counts,
    Preference,
    encode_preferences,
    load_completions,
    load_pairs_or_prompts,
    load_prompts,
    load_unpaired,
)
from burnish.data.vocabulary import shared_vocab_size
from burnish.errors import DataError
from burnish.optim.training import choose_schedule
from burnish.runs import choose_device, ranks
from burnish.training.adapters import LORA_OPTIONS, Lora, chosen_lora, lora_defaults
from burnish.training.base import outlined, require_trainable, trained_dtype
from burnish.training.options import (
    EVALUATIONS,
    forward_dtype,
    refuse_without_effect,
    require_in_range,
    require_length,
    rows_per_step,
    steps_of,
    training_bytes,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Mode = Literal["offline", "online", "rounds"]
"""Completions are in the data; or the policy draws them in each step; or in each round."""

DRAWING = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p")
SHAPING = ("reward_scale", "reward_clip", "missing_end_penalty")
LABELLING = ("labels", "label_scale")
OF_ROUNDS = ("sampler", "accumulate", "warm_start", "prompts_per_round", "num_features", "eval_prompts")
ONLINE_LABELS = ("hard", "soft", "sampled", "best-worst")
LENGTH = 1024
"""Tokens of a prompt with a completion, where nothing is said and the model has as many positions."""
COUNTS = ("batch_size", "gradient_accumulation", "eval_samples", "steps", "eval_every", "checkpoint_every")
LR = {False: 1e-6, True: 1e-5}
"""For all weights of a model, and for LoRA."""
EPOCHS, MAX_GRAD_NORM = 1.0, 1.0


@dataclass(frozen=True)
class Rows:
    """Preferences as they are trained on.

    Attributes:
        data: encoded, see `encode_preferences`.
        read: as they were read, by the column `row` of `data`.
        counts: what was read.
    """

    data: Dataset
    read: list[Preference]
    counts: Counts

    @property
    def kept(self) -> list[Preference]:
        """Those that are trained on."""
        return [self.read[row] for row in self.data["row"]]


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no weights.

    Attributes:
        source: the model that is read.
        tokenizer: of it.
        objective: with its options.
        mode: where completions come from.
        rows, evaluation, retained: what is trained and evaluated on, and what unlearning is to keep.
        guide: the reference, where it is not the model itself.
        stored: the reference's log-probabilities, where a file has them already.
        sampling: how completions are drawn and labelled.
        device: where.
        load: type that the weights are loaded in.
        precision: of the forward pass.
        lora: adapters, or None where all weights are trained.
        steps, eval_every, checkpoint_every: in optimizer steps; of a round, where there are rounds.
        options: as given, with what was left out filled in.
        notes: what is worth knowing.
        forecast: bytes, and numbers of weights.
    """

    source: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    objective: Bound
    mode: Mode
    rows: Rows
    evaluation: Rows | None
    retained: Rows | None
    guide: Checkpoint | None
    stored: ReferenceLogps | None
    sampling: RoundOptions
    device: torch.device
    load: str
    precision: str
    lora: Lora | None
    steps: int
    eval_every: int
    checkpoint_every: int
    options: dict[str, Any]
    notes: list[str]
    forecast: dict[str, int]

    @property
    def rows_per_step(self) -> int:
        """Of all processes."""
        return rows_per_step(self.options)

    @property
    def pad(self) -> int:
        """Id of the token that fills up a batch."""
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    def warmup_steps(self, steps: int) -> int:
        """Of so many steps those over which the learning rate grows."""
        return math.ceil(float(self.options["warmup"]) * steps)

    @property
    def settings(self) -> dict[str, Any]:
        """What stored log-probabilities of the reference depend on besides its weights."""
        return reference_settings(self.tokenizer, max_length=self.options["max_length"], dtype=self.precision)


def prepare(options: dict[str, Any]) -> Job:
    """Check a request; nothing is written and no weight is read."""
    bound = chosen_objective(options)
    if options["layout"] not in ("auto", *get_args(Layout)):
        raise ValueError(f"layout={options['layout']!r}: choose auto, {', '.join(get_args(Layout))}")
    if options["rounds"] < 0:
        raise ValueError(f"rounds={options['rounds']}: expected 0 (completions of the data) or more")
    if options["rounds"] and ranks.world_size() > 1:
        raise ValueError(f"rounds={options['rounds']} run in one process: start without torchrun")
    options = options | {"schedule": choose_schedule(options["optimizer"], options["schedule"])}
    if options["dataset"] is None:
        raise ValueError("give a dataset: rows with `prompt`, `chosen` and `rejected`; see the documentation of align")
    load_data = _loader(bound, options["rounds"])
    source, trust = Checkpoint.open(options["model"]), bool(options["trust_remote_code"])
    config, tokenizer = load_config(source, trust_remote_code=trust), load_tokenizer(source, trust_remote_code=trust)
    if options["max_length"] is None:
        options |= {"max_length": min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)}
    require_length(source.name, config, options["max_length"])
    _require_place(options["reference_logps"])
    found = list(load_data(options["dataset"], split=options["split"]))
    mode = _mode(bound, options["rounds"], found[0])
    _refuse_without_effect(options, bound, mode)
    options = _filled(options, bound, mode)
    require_in_range(options, counts=[name for name in COUNTS if options[name] is not None])
    _require_rewards(options, bound, mode, found[0])
    sampling = _sampling(options, bound, mode)
    lora = chosen_lora(options)
    device = choose_device(options["device"])
    precision = forward_dtype(options["dtype"], device)
    require_trainable(source, lora, merge=options["merge"])
    guide = _guide(options, source, config, tokenizer)
    load = trained_dtype(options["dtype"], device, lora)
    forecast = _forecast(source, config, lora, load, guide, options, mode=mode, bound=bound)
    rows = _encoded(found, tokenizer, options, mode, bound)
    evaluation = _evaluation(options, bound, tokenizer, mode)
    retained = _retained(options, tokenizer)
    steps = steps_of(options, _rows_of_a_fit(mode, sampling, len(rows.data)))
    job = Job(
        source=source,
        tokenizer=tokenizer,
        objective=bound,
        mode=mode,
        rows=rows,
        evaluation=evaluation,
        retained=retained,
        guide=guide,
        stored=None,
        sampling=sampling,
        device=device,
        load=load,
        precision=precision,
        lora=lora,
        steps=steps,
        eval_every=options["eval_every"] or max(1, steps // EVALUATIONS),
        checkpoint_every=options["checkpoint_every"] or max(1, steps // EVALUATIONS),
        options=options,
        notes=[f"trained on {rows.counts}"] + ([f"evaluated on {evaluation.counts}"] if evaluation else []),
        forecast=forecast,
    )
    return _with_stored(job)


def chosen_objective(options: dict[str, Any]) -> Bound:
    """The objective that the options name, with its own: `beta`, `gamma`, `kl`, and `options`.

    Raises:
        ValueError: it is unknown, or an option is unknown, out of range or there twice.
    """
    given = {name: options[name] for name in ("beta", "gamma", "kl") if options[name] is not None}
    more = dict(options["options"] or {})
    for name in given.keys() & more.keys():
        raise ValueError(f"{name}={given[name]} and {name}={more[name]} in options: give one of them")
    return objective(options["objective"], **given, **more)


def _require_place(reference_logps: str | os.PathLike[str] | None) -> None:
    """A file that is to be written at last has to have a directory."""
    if reference_logps is not None and not (place := Path(reference_logps).absolute().parent).is_dir():
        raise ValueError(f"reference_logps={os.fspath(reference_logps)!r}: {place} is no directory")


def _loader(bound: Bound, rounds: int) -> Callable[..., Any]:
    """What reads the data of an objective."""
    kind = bound.objective.data
    if rounds and kind in ("unpaired", "forget"):
        raise ValueError(f"rounds={rounds}: {bound.name} takes judged completions, rounds give pairs")
    if rounds and kind == "samples":
        raise ValueError(f"rounds={rounds}: {bound.name} learns from what the policy draws now: leave rounds out")
    if rounds or kind == "samples":
        return load_prompts
    return {"unpaired": load_unpaired, "forget": load_completions}.get(kind, load_pairs_or_prompts)


def _mode(bound: Bound, rounds: int, first: Preference) -> Mode:
    if rounds:
        return "rounds"
    return "offline" if first.completions else "online"


def _refuse_without_effect(options: dict[str, Any], bound: Bound, mode: Mode) -> None:
    """An option of another way of training is a mistake, not a wish."""
    of_others: list[tuple[str, tuple[str, ...]]] = []
    drawn, samples = mode != "offline", bound.objective.data == "samples"
    if not options["lora"]:
        of_others.append(("--lora", (*LORA_OPTIONS, "merge")))
    if mode != "rounds":
        of_others.append(("--rounds", OF_ROUNDS))
        if options["warm_start"] is False:
            raise ValueError("warm_start=False has no effect without --rounds: leave it out")
    if not drawn:
        of_others.append(("completions that are drawn (prompts alone, or --rounds)", (*LABELLING, *SHAPING)))
        if not bound.kl:
            of_others.append(("completions that are drawn (prompts alone, --rounds, or --kl)", DRAWING))
    if samples:
        of_others.append(("an objective of pairs", LABELLING))
    if not (drawn or bound.needs_rewards):
        of_others.append(("an objective of rewards, or completions that are drawn", ("reward_model",)))
    if not bound.needs_reference:
        of_others.append(("an objective that needs a reference", ("reference", "reference_logps")))
    if drawn or reads_reference(bound, mode):
        of_others.append(("completions that are all in the data, judged as a whole", ("reference_logps",)))
    retains = any(name.startswith("retain_") for name in bound.inputs)
    if not retains:
        of_others.append(("npo-gd or npo-kl", ("retain_dataset",)))
    refuse_without_effect(options, of_others)
    if retains and options["retain_dataset"] is None:
        raise ValueError(f"{bound.name} needs --retain-dataset: rows of what is to be kept")


def reads_reference(bound: Bound, mode: Mode) -> bool:
    """Whether a pass of the reference is needed while training: for what is drawn, and for its distributions of tokens;
    all else of it can be looked up."""
    of_tokens = {"chosen_token_kl", "retain_kl"} & set(bound.inputs)
    return bound.needs_reference and (mode == "online" or bound.kl > 0 or bool(of_tokens))


def _filled(options: dict[str, Any], bound: Bound, mode: Mode) -> dict[str, Any]:
    """Options with what was left out, as far as it has an effect."""
    lora = bool(options["lora"])
    known: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "lr": LR[lora]}
    if lora:
        known |= lora_defaults(options)
    if options["steps"] is None:
        known["epochs"] = EPOCHS
    samples = bound.objective.data == "samples"
    if mode != "offline" or bound.kl:
        known |= {name: value for name, value in _defaults().items() if name in DRAWING}
        known["samples_per_prompt"] = 4 if samples else 2
    if mode != "offline":
        known |= {"labels": "scores" if samples else "hard"}
    return options | {name: value for name, value in known.items() if options[name] is None}


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(RoundOptions)}


def _sampling(options: dict[str, Any], bound: Bound, mode: Mode) -> RoundOptions:
    """How completions are drawn, labelled and scored; refuses values out of range."""
    given = {name: options[name] for name in (*DRAWING, *SHAPING, *LABELLING, *OF_ROUNDS) if options[name] is not None}
    for name in ("sampler", "reward_clip"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if mode != "offline":
        samples, labels = bound.objective.data == "samples", given["labels"]
        if labels == "scores" and not samples:
            raise ValueError(f"labels='scores': {bound.name} takes pairs: choose {', '.join(ONLINE_LABELS)} or ask")
        if mode == "online" and not samples and labels not in ONLINE_LABELS:
            raise ValueError(f"labels={labels!r} needs --rounds: in a step choose {', '.join(ONLINE_LABELS)}")
        if samples and options["samples_per_prompt"] < 2:
            raise ValueError(f"samples_per_prompt={options['samples_per_prompt']}: {bound.name} needs 2 or more")
    found = RoundOptions(**given, seed=options["seed"])
    require_drawing(num_samples=found.samples_per_prompt, **found.drawing)
    if (mode != "offline" or bound.kl) and found.max_new_tokens >= options["max_length"]:
        raise ValueError(
            f"max_new_tokens={found.max_new_tokens} leaves no room for a prompt in max_length={options['max_length']}"
        )
    return found


def _guide(
    options: dict[str, Any], source: Checkpoint, config: Any, tokenizer: PreTrainedTokenizerBase
) -> Checkpoint | None:
    """The reference that is not the model itself; it has to know the same tokens."""
    if options["reference"] is None:
        return None
    trust = bool(options["trust_remote_code"])
    guide = Checkpoint.open(options["reference"])
    sizes = [int(load_config(guide, trust_remote_code=trust).vocab_size), int(config.vocab_size)]
    vocabularies = [load_tokenizer(guide, trust_remote_code=trust).get_vocab(), tokenizer.get_vocab()]
    shared_vocab_size([guide.name, source.name], vocabularies, sizes)
    return guide


def _require_rewards(options: dict[str, Any], bound: Bound, mode: Mode, first: Preference) -> None:
    """What gives rewards has to be there; a function is imported, of a reward model the headers are read."""
    reward, asked = options["reward_model"], mode == "rounds" and options["labels"] == "ask"
    if reward is None:
        if mode != "offline" and not asked:
            raise ValueError("completions that are drawn need --reward-model: a model, or module:function")
        if mode == "offline" and bound.needs_rewards and first.scores is None:
            raise ValueError(
                f"{bound.name} needs rewards: give columns `score_chosen` and `score_rejected`, or --reward-model"
            )
    elif callable(reward) or (FUNCTION.fullmatch(os.fspath(reward)) and not Path(reward).exists()):
        load_reward(reward)
    else:
        Checkpoint.open(reward)


def _encoded(
    found: list[Preference], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], mode: Mode, bound: Bound
) -> Rows:
    """Tokens; prompts that completions are drawn for leave room for them."""
    room = options["max_length"]
    if mode != "offline":
        room -= options["max_new_tokens"] - 1
    data, counts = encode_preferences(tokenizer, found, room)
    for name in ("similarity", "annotator"):
        wanted = {"similarity": "similarity", "annotator": "reliability"}[name] in bound.inputs
        if wanted and name not in data.column_names:
            raise DataError(f"{found[0].source}: {bound.name} needs a column {name!r} in every row")
    return Rows(data, found, counts)


def _evaluation(options: dict[str, Any], bound: Bound, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> Rows | None:
    if options["eval_dataset"] is None:
        return None
    load = _loader(bound, options["rounds"])
    # The same rows for every seed, so that runs can be compared.
    found = list(load(options["eval_dataset"], split=options["split"], seed=0))[: options["eval_samples"]]
    if bool(found[0].completions) != (mode == "offline"):
        raise DataError(f"{found[0].source}: expected rows of the same kind as in dataset, pairs or prompts")
    return _encoded(found, tokenizer, options, mode, bound)


def _retained(options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    if options["retain_dataset"] is None:
        return None
    found = list(load_completions(options["retain_dataset"], split=options["split"]))
    data, counts = encode_preferences(tokenizer, found, options["max_length"])
    return Rows(data, found, counts)


def _rows_of_a_fit(mode: Mode, sampling: RoundOptions, rows: int) -> int:
    """Rows that one training sees in an epoch; of a round about so many."""
    if mode != "rounds":
        return rows
    prompts = min(sampling.prompts_per_round or rows, rows)
    alone = sampling.labels in ("best-worst", "scores") or {"design", "hybrid"} & set(sampling.samplers)
    return prompts if alone else prompts * (sampling.samples_per_prompt // 2)


def _forecast(
    source: Checkpoint,
    config: Any,
    lora: Lora | None,
    load: str,
    guide: Checkpoint | None,
    options: dict[str, Any],
    *,
    mode: Mode,
    bound: Bound,
) -> dict[str, int]:
    """Numbers of weights, and bytes in memory (but for one forward pass) and on disk."""
    found = outlined(source, config, lora, load, merge=options["merge"], trust=bool(options["trust_remote_code"]))
    width = getattr(torch, load).itemsize
    beside = mode == "rounds" or reads_reference(bound, mode)
    reference = 0
    if bound.needs_reference and (guide is not None or lora is None):
        reference = math.ceil((guide or source).num_parameters * width)
    memory = found.held + 12 * found.trained
    memory = memory + reference if beside else max(memory, reference)
    if mode == "rounds" and lora is None:
        memory += found.held  # the weights at the start
    reward = options["reward_model"]
    if isinstance(reward, str | os.PathLike) and Path(reward).is_dir():
        memory += Checkpoint.open(reward).nbytes if mode != "offline" else 0
    weights = found.written * (options["rounds"] + 1)
    return {
        "trained_weights": found.trained,
        "memory_bytes": memory,
        "disk_bytes": training_bytes(found.trained, weights)["disk_bytes"],
    }


def _with_stored(job: Job) -> Job:
    """The job with what a file of the reference's log-probabilities has; all but its hash of the weights is checked."""
    name = job.options["reference_logps"]
    if name is None or not (file := Path(name)).exists():
        return job
    stored = ReferenceLogps.load(file)
    stored.require_settings(job.settings, file)
    for rows in (job.rows, job.evaluation):
        if rows is not None:
            stored.of(rows.data, file)
    return replace(job, stored=stored)
