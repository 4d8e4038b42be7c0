"""Preference learning in TRL's trainer: its models, references and arguments; our objectives, without logits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal, get_args

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from burnish.align.objectives import Bound, activation_mask, kto_kl, on_policy_kl
from burnish.align.objectives import objective as named
from burnish.align.reliability import Reliabilities
from burnish.align.trees import (
    Layout,
    all_branch_states,
    branch_lengths,
    branch_sums,
    branch_token_divergences,
    branch_token_logps,
    branch_tokens,
    choose_layout,
    collate,
    shares_prompts,
    tensors_of,
)
from burnish.data.preferences import COMPLETIONS, PAIRS, PROMPTS, UNPAIRED, Counts, encode_preferences
from burnish.runs.randomness import random_state_kept
from burnish.training.head import language_head, require_head
from burnish.training.trainer import TokenTrainer

Rows = list[dict[str, Any]]
Rollout = Callable[[PreTrainedModel, Rows, int], Rows]
"""(policy, rows with `prompt_ids`, seed) -> the rows with `branch_ids` drawn from it, and what else an objective needs:
`rewards`, `label`."""

PROBE_TOKENS = 16
LAYOUTS = {"pairs": PAIRS, "scored pairs": PAIRS, "unpaired": UNPAIRED, "forget": COMPLETIONS, "samples": PROMPTS}
UNUSED = (
    "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha",
    "use_weighting", "discopop_tau", "sync_ref_model", "padding_free", "truncation_mode", "pad_to_multiple_of",
)  # fmt: skip
"""Arguments of TRL that have no effect here."""
COLUMNS = ("prompt_ids", "branch_ids", "label", "rewards", "ref_logps", "similarity", "annotator", "row")


class PreferenceTrainer(TokenTrainer, DPOTrainer):  # type: ignore[misc]
    """Trains on an objective of sequence log-probabilities; logits never exist whole.

    A `trl.DPOTrainer`: models by name, `peft_config`, checkpoints, loggers and the distributed set-ups are its own
    (tried on CPUs: replicas, FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3). What differs: the loss is an objective of
    `burnish.align.objectives`; each pair has a soft label; the reference's log-probabilities are computed once before
    training and no reference model is kept (unless completions are drawn, or distributions of tokens read, while
    training); a prompt is computed once for all its completions where the model allows it; the loss is a mean over the
    rows of an optimizer step, accumulated and distributed ones included; no telemetry is sent and no model card is
    written; a Mixture of Experts gets no router loss.

    Rows are `prompt`, `chosen`, `rejected` as everywhere (see `burnish.data.preferences`), or already encoded:
    `prompt_ids`, `branch_ids` (a list of completions in tokens: chosen and rejected; or one; or several samples), and
    where an objective needs them `label`, `rewards`, `ref_logps`, `similarity`, `annotator`.

    Args:
        model: a causal language model, one with PEFT's adapters, or a name to load.
        objective: name, or an objective with its options.
        args: `DPOConfig`; what chooses its loss or its batches (`UNUSED`) is refused, `precompute_ref_log_probs` is set
            here, and `max_length` is for rows that are not encoded yet.
        train_dataset, eval_dataset: map-style data sets or lists of rows.
        retain_dataset: rows of what unlearning is to keep; each row of `train_dataset` gets one of them, in turn.
        layout: "padded", "shared", "packed" (see `burnish.align.trees`), or "auto": shared where the model proves on
            the first row that it may, and the batch gains by it.
        rollout: draws completions from the policy in each step. Rows that have completions keep them, and the drawn
            ones estimate the KL divergence to the reference; rows without are trained on what was drawn.
        logprob_temperature: logits are divided by it.
        options: as `trl.DPOTrainer`: `ref_model`, `processing_class`, `peft_config`, `callbacks`, `optimizers`, ...

    Examples:
        >>> PreferenceTrainer("Qwen/Qwen3-0.6B", objective("pmle", gamma=0.1), args=DPOConfig("out"),
        ...                   train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | nn.Module,
        objective: str | Bound = "dpo",
        *,
        args: DPOConfig | None = None,
        train_dataset: Dataset | Sequence[Mapping[str, Any]],
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        retain_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        layout: Layout | Literal["auto"] = "auto",
        rollout: Rollout | None = None,
        logprob_temperature: float = 1.0,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        if layout not in ("auto", *get_args(Layout)):
            raise ValueError(f"layout={layout!r}: choose auto, {', '.join(get_args(Layout))}")
        self.objective = named(objective) if isinstance(objective, str) else objective
        self.layout, self.rollout, self.logprob_temperature = layout, rollout, logprob_temperature
        if rollout is None and (self.objective.kl or self.objective.objective.data == "samples"):
            raise ValueError(f"{self.objective.name} needs completions of the policy: give rollout")
        if retain_dataset is None and any(name.startswith("retain_") for name in self.objective.inputs):
            raise ValueError(f"{self.objective.name} needs rows of what is to be kept: give retain_dataset")
        self.counts: dict[str, Counts] = {}
        self._sharing, self._ready = False, False
        self._names: tuple[str, ...] = ()
        self._draws = (-1, False, 0)
        args = args or DPOConfig("aligned")
        _refuse_unused(args)
        # Completions that are drawn, and distributions of tokens, need the reference beside the policy; for all other
        # rows it is looked up.
        beside = rollout is not None or any(name in self.objective.inputs for name in ("chosen_token_kl", "retain_kl"))
        args.precompute_ref_log_probs = not (beside and self.objective.needs_reference)
        if args.data_seed is None:  # otherwise the order follows the global state, which differs between processes
            args.data_seed = args.seed
        with random_state_kept():  # TRL seeds all generators
            super().__init__(
                model,  # type: ignore[arg-type]
                args=args,
                data_collator=self.collate,
                train_dataset=_as_dataset(train_dataset),
                eval_dataset=None if eval_dataset is None else _as_dataset(eval_dataset),
                **options,
            )
        self._make_ready()
        if optimizer_cls_and_kwargs is not None:
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        if args.precompute_ref_log_probs:
            self.ref_model = None
        if retain_dataset is not None:
            kept = self._prepare_dataset(_as_dataset(retain_dataset), self.processing_class, self.args, "retain")
            self.train_dataset: Dataset = _with_retained(self.train_dataset, kept)
            if eval_dataset is not None:
                self.eval_dataset: Dataset = _with_retained(self.eval_dataset, kept)
        self._loss_shifts_labels = False  # labels are of pairs, not of tokens
        self.add_callback(self.reliabilities)

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The objective summed over pairs (prompts, examples), and the sums of what is logged, their number last."""
        drawn = self._drawn(inputs) if "rows" in inputs else None
        batch = inputs if drawn is None or "owners" in inputs else drawn
        values, of_tokens = self._token_values(model, batch)
        logps = _by_tree(values, batch)  # [trees, branches]
        reference = self._reference(model, batch)
        available = self._available(batch, logps, reference) | of_tokens | self._retained(model, batch)
        losses, observed = self.objective(available), _observed(self.objective, available)
        if self.objective.kl:
            samples, sampled_reference = logps, reference
            if drawn is not None and batch is not drawn:
                samples = _by_tree(model(trees=tensors_of(drawn)), drawn)
                sampled_reference = self._reference(model, drawn)
            assert sampled_reference is not None
            losses = losses + self.objective.kl * on_policy_kl(samples, sampled_reference)
            observed["kl"] = (samples.detach() - sampled_reference).mean(1)
        if "annotators" in batch and model.training:
            posteriors = self.accelerator.gather(self.objective.label_posterior(available))
            self.reliabilities.update(self.accelerator.gather(batch["annotators"]), posteriors)
        observed["loss"] = losses.detach()
        self._names = tuple(observed)
        sums = [value.double().sum() for value in observed.values()]
        # Trainer counts the rows that it gave: where more pairs than prompts are drawn, these share a prompt's weight.
        total = losses.sum() * (len(inputs["labels"]) / len(losses))
        return total, torch.stack([*sums, sums[0].new_tensor(float(len(losses)))])

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        """Means per pair (prompt, example), under the names that TRL logs."""
        *found, count = sums
        return {name: value / count for name, value in zip(self._names, found, strict=True)}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows as a batch: a forest, and what belongs to each of its trees and branches."""
        batch: dict[str, Any] = {"labels": torch.tensor([float(row.get("label", 1.0)) for row in rows])}
        if self.rollout is not None:
            batch["rows"] = [{key: row[key] for key in row if key not in ("branch_ids", "ref_logps")} for row in rows]
        if not _has_branches(rows[0]):
            return batch
        layout: Any = self.layout
        if layout == "auto":
            layout = choose_layout(rows) if self._sharing else "padded"
        batch |= collate(rows, layout, pad=self._tokenizer.pad_token_id)
        for name in ("rewards", "ref_logps", "similarity"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        if "retain_prompt_ids" in rows[0]:
            kept = [{"prompt_ids": row["retain_prompt_ids"], "branch_ids": row["retain_branch_ids"]} for row in rows]
            batch["retain"] = collate(kept, "padded", pad=self._tokenizer.pad_token_id)
        if "reliability" in self.objective.inputs:
            batch["annotators"] = self.reliabilities.places([row.get("annotator") for row in rows])
        return batch

    def _drawn(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Completions of the batch's prompts from the policy as it is now."""
        assert self.rollout is not None
        now, training = self.state.global_step, self.model.training
        *before, count = self._draws
        count = count + 1 if before == [now, training] else 0
        self._draws = (now, training, count)
        # Evaluations draw alike at every step, so that they can be compared.
        seed = hash((self.args.seed, now if training else -1, training, count, self.accelerator.process_index))
        whole = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with _evaluating(self.model), random_state_kept(), whole as policy:
            rows = self.rollout(policy, inputs["rows"], seed % 2**63)
        batch = self.collate(rows)
        batch.pop("rows")
        found: dict[str, Any] = self._prepare_inputs(batch)
        return found

    def _available(self, batch: Mapping[str, Any], logps: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """What objectives may ask for, by the names of their arguments; of branches the first, each of two, and all."""
        lengths = branch_lengths(batch).view_as(logps)
        found: dict[str, Tensor] = {}
        for prefix, name, value in (
            ("", "logps", logps),
            ("ref_", "logps", reference),
            ("", "lengths", lengths),
            ("", "rewards", batch.get("rewards")),
        ):
            if value is None:
                continue
            value = value.to(logps.dtype)
            found |= {f"{prefix}{name}": value[:, 0], f"{prefix}sample_{name}": value}
            if value.shape[1] == 2:
                found |= {f"{prefix}chosen_{name}": value[:, 0], f"{prefix}rejected_{name}": value[:, 1]}
        found |= {name: batch[name].to(logps.dtype) for name in ("labels", "similarity") if name in batch}
        if "annotators" in batch:
            found["reliability"] = self.reliabilities.of(batch["annotators"]).to(logps.dtype)
        if "kl" in self.objective.inputs:
            assert reference is not None
            found["kl"] = kto_kl(logps[:, 1], reference[:, 1])
        return found

    def _reference(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """The reference's log-probabilities [trees, branches], looked up or computed."""
        if not self.objective.needs_reference:
            return None
        if "ref_logps" in batch:
            found: Tensor = batch["ref_logps"]
            return found
        return self._computed_reference(model, batch)

    def _computed_reference(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with self._as_reference(model) as reference:
            return _by_tree(reference(trees=tensors_of(batch)), batch)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference: a model of its own, or the policy without its adapters, or, before training, the policy."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                yield self.ref_model
                return
            policy = self.accelerator.unwrap_model(self.model)
            adapter = "ref" if "ref" in getattr(policy, "peft_config", {}) else None
            with use_adapter(policy, adapter) if is_peft_model(policy) else nullcontext(), _evaluating(policy):
                yield model

    def _target(self, model: nn.Module, trees: Mapping[str, Tensor]) -> tuple[Callable[[slice], Tensor], list[Tensor]]:
        """The reference's logits where the tokens of trees are predicted, a few at a time; and its hidden states."""
        with self._as_reference(model) as reference:
            states = reference(trees=trees, states=True)
            logits = language_head(self.accelerator.unwrap_model(reference)).gathered()
        return lambda rows: logits(states[-1][rows]), states

    def _token_values(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probability of each token [tokens], and what objectives of tokens ask for, by branch."""
        trees, wanted = tensors_of(batch), self.objective.inputs
        if "chosen_token_kl" not in wanted:
            values = model(trees=trees)
            named = {"sample_token_logps": values} if "sample_token_logps" in wanted else {}
        else:
            target, states = self._target(model, trees)
            values, divergences = model(trees=trees, target=target)
            with self._as_reference(model) as reference:
                reference_values = reference(trees=trees)
            layers = [branch_tokens(state.float(), trees) for state in states]
            counted = branch_tokens(torch.ones_like(values), trees)
            mask = activation_mask(layers, counted)[counted.bool()]
            pairs = {"token_logps": values, "token_kl": divergences, "reward_mask": mask, "kl_mask": mask}
            named = {f"{side}_{name}": value for name, value in pairs.items() for side in ("chosen", "rejected")}
            named |= {f"ref_{side}_token_logps": reference_values for side in ("chosen", "rejected")}
        found = {}
        for name, value in named.items():
            by_branch = branch_tokens(value, trees)
            by_tree = by_branch.view(len(batch["labels"]), -1, by_branch.shape[1])
            found[name] = by_tree if "sample" in name else by_tree[:, int("rejected" in name)]
        return values, found

    def _retained(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What objectives of unlearning ask of the rows that are to be kept."""
        if "retain" not in batch:
            return {}
        trees = batch["retain"]
        if "retain_kl" in self.objective.inputs:
            _, divergences = model(trees=trees, target=self._target(model, trees)[0])
            return {"retain_kl": divergences.mean()}
        logps = branch_sums(model(trees=trees), trees)
        return {"retain_logps": logps, "retain_lengths": branch_lengths(trees).to(logps.dtype)}

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """Encoded rows; called by TRL's constructor."""
        if "prompt_ids" not in dataset.column_names:
            layout = LAYOUTS[self.objective.objective.data]
            found = (
                row._replace(source=dataset_name, row=number)
                for number, columns in enumerate(dataset, start=1)
                for row in layout.read(columns, f"{dataset_name} row {number}", layout.accepted)
            )
            dataset, self.counts[dataset_name] = encode_preferences(
                processing_class, found, args.max_length or sys.maxsize
            )
        if "kl" in self.objective.inputs:
            dataset = with_mismatched(dataset)
        if dataset_name == "train":
            names = dataset.unique("annotator") if "annotator" in dataset.column_names else ()
            self.reliabilities = Reliabilities(names)
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The rows with `ref_logps`; called by TRL's constructor, whose own cache is not used."""
        self._make_ready()
        known = "ref_logps" in dataset.column_names or not _has_branches(dataset[0])
        if known or not self.objective.needs_reference:
            return dataset
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        )
        model = self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # The weights are in their places, and whole where they are used, only inside an engine.
            if self._precompute_engine is None:
                self._precompute_engine: Any = prepare_deepspeed(model, self.accelerator)
            model = self._precompute_engine
        found = []
        for batch in loader:
            logps = self._computed_reference(model, self._prepare_inputs(batch))
            found.append(self.accelerator.gather_for_metrics(logps).cpu())
        return dataset.add_column("ref_logps", torch.cat(found).tolist())

    def _make_ready(self) -> None:
        """Let the models take trees, and see whether the policy may share prompts."""
        if self._ready:
            return
        self._ready = True
        models = [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        for model in models:
            _take_trees(model, self.logprob_temperature)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        row = self.train_dataset[0]
        branches = row.get("branch_ids") or [row["prompt_ids"][-1:]]
        with _evaluating(self.model), self.accelerator.autocast():
            ids = torch.tensor([(row["prompt_ids"] + branches[0])[:PROBE_TOKENS]], device=self.args.device)
            require_head(self.model, ids)
            tree = {"prompt_ids": row["prompt_ids"], "branch_ids": [branches[0], branches[-1]]}
            self._sharing = shares_prompts(self.model, tree, pad=self._tokenizer.pad_token_id)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: a batch may be prompts alone."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None is written: TRL's would name its own method."""

    def _send_telemetry(self) -> None:
        """None is sent."""


def _refuse_unused(args: DPOConfig) -> None:
    plain = DPOConfig(args.output_dir, use_cpu=args.use_cpu, bf16=False)
    for name in UNUSED:
        value = getattr(args, name)
        if value != getattr(plain, name):
            raise ValueError(
                f"{name}={value!r} of DPOConfig has no effect here: options of the loss are the objective's"
            )


def _take_trees(model: Any, temperature: float) -> None:
    """Let a model's forward take `trees` in place of tokens, and give the log-probability of each of their tokens; with
    `target`, the divergence from it there, too; with `states`, all hidden states there.

    These are computed inside the model's own forward, in which FSDP and ZeRO gather what it uses.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(
        self: Any,
        *args: Any,
        trees: Mapping[str, Tensor] | None = None,
        target: Callable[[slice], Tensor] | None = None,
        states: bool = False,
        **options: Any,
    ) -> Any:
        if trees is None:
            return plain(*args, **options)
        if states:
            return all_branch_states(self, trees)
        if target is not None:
            return branch_token_divergences(self, trees, target, temperature=temperature)
        return branch_token_logps(self, trees, temperature=temperature)

    model.forward = MethodType(forward, model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _as_dataset(rows: Dataset | Sequence[Mapping[str, Any]]) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, Sequence):
        return Dataset.from_list([dict(row) for row in rows])
    raise TypeError(f"{type(rows).__name__}: expected a map-style datasets.Dataset or a list of rows")


def _by_tree(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sums over the tokens of each branch, Tensor `[trees, branches]`."""
    return branch_sums(values, batch).view(len(batch["labels"]), -1)


def with_mismatched(rows: Dataset) -> Dataset:
    """Rows of one completion with that of the nearest row before that has another prompt as a second one, from which
    KTO estimates the KL divergence.

    The pairing belongs to the data, not to a batch, so that rows can be shuffled and looked up.
    """
    branches, prompts = rows["branch_ids"], rows["prompt_ids"]
    if len(branches[0]) > 1:
        return rows
    places = range(len(prompts))
    last = next((place for place in reversed(places) if prompts[place] != prompts[0]), None)
    if last is None:
        raise ValueError("kto: all rows have one prompt, and no completion of another: give rows of 2 prompts or more")
    paired = []
    for place in places:
        if place > 0 and prompts[place - 1] != prompts[place]:
            last = place - 1
        paired.append([branches[place][0], branches[last][0]])
    return rows.remove_columns("branch_ids").add_column("branch_ids", paired)


def _with_retained(rows: Dataset, kept: Dataset) -> Dataset:
    """Each row with one that is to be kept, in turn."""
    turns = [number % len(kept) for number in range(len(rows))]
    return rows.add_column("retain_prompt_ids", kept[turns]["prompt_ids"]).add_column(
        "retain_branch_ids", kept[turns]["branch_ids"]
    )


def _has_branches(row: Mapping[str, Any]) -> bool:
    return bool(row.get("branch_ids"))


def _observed(objective: Bound, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of each tree, Tensors `[trees]`; implicit rewards are log-ratios times the objective's scale."""
    scale = objective.options.get("beta", objective.options.get("gamma", 1.0))
    found = {name: value.detach() for name, value in available.items()}
    if objective.objective.data == "samples":
        logps = found["sample_logps"]
        observed = {"reward": found["sample_rewards"].mean(1), "entropy": -logps.mean(1)}
        kl = {"kl": (logps - found["ref_sample_logps"]).mean(1)} if "ref_sample_logps" in found else {}
        return observed | kl | {"length": found["sample_lengths"].mean(1)}
    if "chosen_logps" not in found or "kl" in objective.inputs:
        ratio = found["logps"] - found.get("ref_logps", 0.0)
        return {"rewards": scale * ratio, "logps": found["logps"]}
    chosen, rejected = (
        scale * (found[f"{side}_logps"] - found.get(f"ref_{side}_logps", 0.0)) for side in ("chosen", "rejected")
    )
    margins = chosen - rejected
    right = torch.where(found["labels"] < 0.5, margins < 0, margins > 0)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": right.to(margins.dtype),
        "logps/chosen": found["chosen_logps"],
        "logps/rejected": found["rejected_logps"],
    }
