"""The door to lm-evaluation-harness: tasks by name, asked of loaded models, without a word on any stream."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import BurnishError, DataError
from burnish.evaluate.tasks import Answers, Tasks, fingerprint
from burnish.runs import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tasks(
    names: Sequence[str],
    *,
    task_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """Find tasks by name and load their data, before any model is loaded.

    Args:
        names: tasks, groups, tags or patterns such as `mmlu_*`.
        task_dir: directory of more task files; those that come with lm-eval are indexed only for names not in it.
        num_fewshot: examples before each question, except in tasks that fix it at 0; None for the tasks' own number.
        limit: documents of each task.
        seed: of the choice of examples.

    Raises:
        ValueError: an unknown name, or an option that is out of range.
        DataError: a task's data cannot be loaded.
        BurnishError: lm-eval is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: choose at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot}: choose at least 0")
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ValueError(f"task_dir={os.fspath(task_dir)}: no such directory")
    manager_class = _require_lm_eval()
    with _quietly(seed):
        manager = manager_class(include_path=task_dir and os.fspath(task_dir), include_defaults=task_dir is None)
        if task_dir is not None and not all(manager.match_tasks([name]) for name in names):
            manager = manager_class(include_path=os.fspath(task_dir))
        found: dict[str, None] = {}
        for name in names:
            matches = manager.match_tasks([name])
            if not matches:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
                hint = f"nearest: {', '.join(near)}" if near else "give --task-dir for tasks of your own"
                raise ValueError(f"tasks: {name!r} is not a task of lm-eval or of {task_dir or 'a task_dir'}; {hint}")
            found |= dict.fromkeys(matches)
        try:
            loaded: dict[str, Any] = manager.load(list(found))
        except Exception as error:  # whatever a task's data set or its own Python code raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"tasks {', '.join(found)}: cannot be loaded ({reason})") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"task {name} runs code that the model wrote: burnish does not")
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
    return Tasks(loaded, limit, seed)


def answer(
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    apply_chat_template: bool,
    name: str,
    progress: Progress,
) -> dict[str, Answers]:
    """Ask a model all questions of all tasks.

    Args:
        tasks: as loaded; asked anew in the same way for each model.
        model: in evaluation mode, on its device.
        tokenizer: of the model; the same for all models that are compared.
        batch_size: requests at a time.
        max_length: tokens of a request; what is longer loses its beginning, and a warning says so.
        apply_chat_template: wrap the prompts in the tokenizer's chat template.
        name: of the model, for progress and warnings.
        progress: where to report.

    Returns:
        Answers by task.
    """
    from lm_eval.evaluator import evaluate

    with _quietly(tasks.seed, model.device) as (stream, messages):
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=tasks.seed)  # each model would otherwise draw its own examples
        wrapped = _wrapped(model, tokenizer, batch_size, max_length, progress, stream)
        found = evaluate(
            wrapped,
            tasks.loaded,
            limit=tasks.limit,
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    cut = sum("truncat" in message.lower() for message in messages)
    if cut:
        warnings.warn(
            f"{name}: {cut} requests were longer than {max_length} tokens and lost their beginning", stacklevel=3
        )
    return {task: _answers(samples) for task, samples in found["samples"].items()}


def _answers(samples: Sequence[dict[str, Any]]) -> Answers:
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return Answers(values, fingerprint([sample["prompt_hash"] + sample["target_hash"] for sample in samples]))


def _require_lm_eval() -> Any:
    environment = dict(os.environ)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BurnishError(f"tasks need lm-eval ({error}): pip install 'burnish[eval]'") from None
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]  # set while importing, to switch on faster downloads
    return TaskManager


def _wrapped(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    progress: Progress,
    stream: Any,
) -> Any:
    """The model as lm-eval wants it, without lm-eval's bars and with ours."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):  # type: ignore[misc]
        """Reports each kind of request as one task, on the stream that lm-eval does not see."""

        def _report(self, kind: str, requests: list[Any]) -> Any:
            with contextlib.redirect_stderr(stream), progress.task("ask", total=len(requests), unit=kind) as advance:
                self.set_cache_hook(_Count(advance))
                return getattr(super(), kind)(requests, disable_tqdm=True)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._report("loglikelihood", requests)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
        ) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._report("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._report("generate_until", requests)

    # lm-eval chooses a padding token and writes it into the tokenizer.
    return Reporting(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=max_length)


@dataclass(frozen=True)
class _Count:
    """lm-eval's hook for finished requests, which it means for a cache."""

    advance: Callable[[int], None]

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self.advance(1)


class _Messages(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _quietly(seed: int, device: torch.device | None = None) -> Iterator[tuple[Any, list[str]]]:
    """No line of lm-eval or `datasets` on any stream, no count of downloads, and the global random states as before.

    Tasks may draw from the global generators, and sampled answers from the device's, so these are seeded inside.
    Yields the true standard error and the list of lm-eval's warnings.
    """
    import datasets
    import numpy as np

    on_cuda = device is not None and device.type == "cuda"
    logger, handler, stream = logging.getLogger("lm_eval"), _Messages(), sys.stderr
    propagate, bars = logger.propagate, datasets.are_progress_bars_disabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    logger.addHandler(handler)
    logger.propagate = False
    datasets.disable_progress_bars()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request to a counting server even for local files
    try:
        with (
            torch.random.fork_rng(devices=[device] if on_cuda else []),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield stream, handler.messages
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        logger.removeHandler(handler)
        logger.propagate = propagate
        if not bars:
            datasets.enable_progress_bars()
