"""Evaluate models under one setting: quality, divergence from the first model, tasks, size and speed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash
from torch import Tensor

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_config, load_model, load_tokenizer
from burnish.data import TokenBlocks, bundled_text, token_blocks
from burnish.data.vocabulary import shared_vocab_size
from burnish.evaluate.divergence import forward_kl, top1_agreement
from burnish.evaluate.estimate import mean_per_token
from burnish.evaluate.harness import answer, load_tasks
from burnish.evaluate.measure import Speed, speeds
from burnish.evaluate.perplexity import negative_log_likelihood, perplexity, predicted
from burnish.evaluate.result import Comparison, EvaluateResult, Row
from burnish.evaluate.tasks import TaskResult, Tasks, task_results
from burnish.runs import Progress, choose_device, environment

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
NEW_TOKENS = 32
LONGEST_REQUEST = 2048
Model = str | os.PathLike[str]


def evaluate(
    model: Model | None = None,
    *,
    before: Model | None = None,
    after: Model | Sequence[Model] | None = None,
    dataset: str | os.PathLike[str] | None = None,
    split: str = "test",
    num_samples: int = 64,
    max_length: int = 512,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    speed: bool = True,
    batch_sizes: Sequence[int] | None = None,
    tasks: Sequence[str] = (),
    task_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Quality, size, memory and speed of one model, or of several beside their divergence from the one before.

    All models are in memory at the same time: each batch passes once through every one of them, the model before
    included, however many there are after it.

    Args:
        model: directory or hub name, for one row.
        before: directory or hub name of the reference; together with `after` and without `model`.
        after: one or several to compare with it.
        dataset: as in `burnish.data.load_texts`, read in order; None for the bundled held-out text, whose documents
            are sorted by domain and therefore shuffled.
        split: split of a Hub data set.
        num_samples: blocks of text.
        max_length: tokens in a block.
        batch_size: blocks, and task requests, at a time.
        dtype: of weights and computation of all models; `auto` is that of the first model's config.
        device: `cpu`, `cuda`, `cuda:N`; `auto` is CUDA where there is any.
        seed: order of the bundled documents, and choice of the tasks' examples.
        speed: also measure speed and memory: prompts of the first blocks, then up to 32 new tokens, greedily.
        batch_sizes: prompts at a time for speed, each measured on its own; `batch_size` by default.
        tasks: names of lm-evaluation-harness tasks, groups, tags or patterns; needs the extra `eval`. All models see
            the same requests, through the first model's tokenizer.
        task_dir: directory with task files of your own.
        num_fewshot: examples before each question; None for the tasks' own number.
        limit: documents of each task; None for all.
        apply_chat_template: wrap the tasks' prompts in the first model's chat template.
        trust_remote_code: run code that lies beside the models.
        revision: of `model` or `before`.
        progress: where to report; None reports nothing.

    Raises:
        ValueError: an option that is out of range.
        CheckpointError: a model that is missing, corrupt, or lacks weights or a tokenizer.
        UnsupportedModelError: models of different vocabularies, or of a type that transformers does not know.
        DataError: text that cannot be used, or a task's data that cannot be loaded.
        BurnishError: tasks, and lm-eval is not installed.
    """
    paths = [os.fspath(name) for name in _models(model, before, after)]
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    batch_sizes = (batch_size,) if batch_sizes is None else tuple(batch_sizes)
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise ValueError(f"batch_sizes={list(batch_sizes)}: choose different numbers, each at least 1")
    if not tasks and (task_dir is not None or num_fewshot is not None or limit is not None or apply_chat_template):
        raise ValueError("task_dir, num_fewshot, limit and apply_chat_template are about tasks: name some with tasks")
    target = choose_device(device)
    progress = progress or Progress(quiet=True)
    checkpoints = [Checkpoint.open(path, revision if i == 0 else None) for i, path in enumerate(paths)]
    configs = [load_config(checkpoint, trust_remote_code=trust_remote_code) for checkpoint in checkpoints]
    tokenizers = [load_tokenizer(checkpoint, trust_remote_code=trust_remote_code) for checkpoint in checkpoints]
    sizes = [config.vocab_size for config in configs]
    vocab_size = shared_vocab_size(paths, [tokenizer.get_vocab() for tokenizer in tokenizers], sizes)
    if vocab_size < max(sizes):
        warnings.warn(f"the models have {sizes} logits: only the first {vocab_size} are compared", stacklevel=2)
    for path, config in zip(paths, configs, strict=True):
        longest = getattr(config, "max_position_embeddings", max_length)
        if max_length > longest:
            raise ValueError(f"max_length={max_length} but {path} has {longest} positions: choose 2..{longest}")
    dtype = _dtype(dtype, configs[0])
    tokenizer = tokenizers[0]
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError(f"apply_chat_template: the tokenizer of {paths[0]} has no chat template")
    asked = load_tasks(tasks, task_dir=task_dir, num_fewshot=num_fewshot, limit=limit, seed=seed) if tasks else None
    tokenizer_hash = _hash(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab())
    blocks = token_blocks(
        tokenizer,
        bundled_text("heldout") if dataset is None else dataset,
        num_samples=num_samples,
        max_length=max_length,
        seed=seed,
        split=split,
        shuffle=dataset is None,
    )
    models = []
    for checkpoint in checkpoints:
        progress.say(f"loading {checkpoint.name}")
        models.append(
            load_model(checkpoint, dtype=getattr(torch, dtype), device=target, trust_remote_code=trust_remote_code)
        )
    measured: list[list[Speed]] = []
    if speed:
        progress.say("measuring speed and memory")
        prompt, new_tokens = _prompt(blocks, max(batch_sizes))
        measured = [speeds(models, prompt[:size].to(target), new_tokens=new_tokens) for size in batch_sizes]
    totals = _totals(models, blocks, batch_size, vocab_size, progress)
    longest = min(getattr(config, "max_position_embeddings", LONGEST_REQUEST) for config in configs)
    scores: tuple[TaskResult, ...] = ()
    if asked is not None:
        scores = _ask(asked, paths, models, tokenizer, batch_size, longest, apply_chat_template, progress)
    return EvaluateResult(
        rows=tuple(_row(i, checkpoints[i], totals, tuple(each[i] for each in measured)) for i in range(len(models))),
        dataset=None if dataset is None else os.fspath(dataset),
        split=split,
        sources=blocks.sources,
        fingerprint=blocks.fingerprint,
        tokenizer_hash=tokenizer_hash,
        chat_template_hash=tokenizer.chat_template and _hash(tokenizer.chat_template),
        num_samples=len(blocks.input_ids),
        max_length=max_length,
        num_tokens=blocks.num_tokens,
        vocab_size=vocab_size,
        batch_size=batch_size,
        dtype=dtype,
        device=str(target),
        seed=seed,
        environment=environment(),
        tasks=scores,
    )


def _ask(
    tasks: Tasks,
    paths: Sequence[str],
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    apply_chat_template: bool,
    progress: Progress,
) -> tuple[TaskResult, ...]:
    answers = []
    for path, model in zip(paths, models, strict=True):
        progress.say(f"asking {path}: {', '.join(tasks.loaded['tasks'])}")
        answers.append(
            answer(
                tasks,
                model,
                tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                apply_chat_template=apply_chat_template,
                name=path,
                progress=progress,
            )
        )
    return task_results(tasks, answers, _hash(tokenizer.chat_template) if apply_chat_template else None)


class _Totals(NamedTuple):
    """Sums over the tokens of each block; `n` blocks, `m` models."""

    counts: Tensor  # [n], int64
    nll: Tensor  # [m, n], float64, as the next two
    kl: Tensor
    agreement: Tensor


@torch.inference_mode()
def _totals(
    models: Sequence[PreTrainedModel], blocks: TokenBlocks, batch_size: int, vocab_size: int, progress: Progress
) -> _Totals:
    num_blocks = len(blocks.input_ids)
    nll, kl, agreement = torch.zeros(3, len(models), num_blocks, dtype=torch.float64)
    counts = predicted(blocks.attention_mask).sum(1)
    with progress.task("evaluate", total=num_blocks, unit="blocks") as advance:
        for start in range(0, num_blocks, batch_size):
            rows = slice(start, start + batch_size)
            ids = blocks.input_ids[rows].to(models[0].device)
            mask = blocks.attention_mask[rows].to(ids.device)
            counted = predicted(mask)
            teacher: Tensor | None = None
            # Padding is on the right, where a causal model does not see it: no attention mask is needed.
            for i, model in enumerate(models):
                logits = model(input_ids=ids, use_cache=False).logits[..., :vocab_size]
                nll[i, rows] = negative_log_likelihood(logits, ids, mask)[0].cpu()
                if teacher is None:
                    teacher = logits[:, :-1]
                else:
                    kl[i, rows] = forward_kl(teacher, logits[:, :-1], counted).cpu()
                    agreement[i, rows] = top1_agreement(teacher, logits[:, :-1], counted).double().cpu()
            advance(len(ids))
    return _Totals(counts, nll, kl, agreement)


def _row(i: int, checkpoint: Checkpoint, totals: _Totals, measured: tuple[Speed, ...]) -> Row:
    nll = mean_per_token(totals.nll[i], totals.counts)
    comparison = Comparison(
        forward_kl=mean_per_token(totals.kl[i], totals.counts),
        top1_agreement=mean_per_token(totals.agreement[i], totals.counts),
        nll_difference=mean_per_token(totals.nll[i] - totals.nll[0], totals.counts),
    )
    return Row(
        model=checkpoint.name,
        num_parameters=checkpoint.num_parameters,
        bytes_on_disk=checkpoint.nbytes,
        nll=nll,
        perplexity=perplexity(nll),
        comparison=comparison if i else None,
        speeds=measured,
    )


def _models(model: Model | None, before: Model | None, after: Model | Sequence[Model] | None) -> list[Model]:
    others = [] if after is None else [after] if isinstance(after, str | os.PathLike) else list(after)
    if model is not None and before is None and not others:
        return [model]
    if model is None and before is not None and others:
        return [before, *others]
    raise ValueError("give one model alone, or before and after together")


def _dtype(name: str, config: PretrainedConfig) -> str:
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype={name!r}: choose auto, {', '.join(DTYPES)}")
    return str(config.dtype or "float32").removeprefix("torch.") if name == "auto" else name


def _prompt(blocks: TokenBlocks, batch_size: int) -> tuple[Tensor, int]:
    """The first blocks (again from the first where there are too few) up to the shortest one's padding, and a number of
    new tokens that fits the same length."""
    rows = torch.arange(batch_size) % len(blocks.input_ids)
    length = int(blocks.attention_mask[rows].sum(1).min())
    new_tokens = min(NEW_TOKENS, length // 2)
    return blocks.input_ids[rows, : length - new_tokens], new_tokens


def _hash(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
