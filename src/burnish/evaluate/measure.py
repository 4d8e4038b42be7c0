"""Size, speed and memory of models."""

from __future__ import annotations

import inspect
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """What greedy generation with a KV cache took.

    Attributes:
        batch_size: sequences at a time.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens decoded after each prompt, one at a time.
        prefill_ms: until the first new token can be chosen, in milliseconds; median over repeats.
        prefill_tokens_per_second: prompt tokens of the whole batch per second, from that median.
        decode_ms_per_token: one decoding step of the whole batch, in milliseconds; median over repeats of their mean.
        decode_tokens_per_second: new tokens of the whole batch per second, from that median.
        peak_memory_bytes: the model's weights and buffers plus what one such generation adds to them. On CUDA the
            addition is exact (`torch.cuda.max_memory_allocated`); on a CPU it is the growth of resident memory,
            sampled every 5 ms after a warm-up, which misses what the allocator had kept.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    prefill_tokens_per_second: float
    decode_ms_per_token: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


@torch.inference_mode()
def speeds(models: Sequence[PreTrainedModel], prompt: Tensor, *, new_tokens: int, repeats: int = 5) -> list[Speed]:
    """Speed and memory of each model, after a warm-up; the repeats alternate between models, so that all meet the same
    disturbances.

    Args:
        models: on the prompt's device, in evaluation mode.
        prompt: Tensor `[batch, seq]`, int64, without padding.
        new_tokens: tokens to decode after the prompt.
        repeats: timed generations of each model.
    """
    peaks = []
    for model in models:
        _generate(model, prompt, new_tokens)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        peaks.append(weights + _memory_added(partial(_generate, model, prompt, new_tokens), prompt.device))
    seconds = [[_generate(model, prompt, new_tokens) for model in models] for _ in range(repeats)]
    return [
        _speed(prompt, new_tokens, [statistics.median(part) for part in zip(*timed, strict=True)], peak)
        for timed, peak in zip(zip(*seconds, strict=True), peaks, strict=True)
    ]


def _speed(prompt: Tensor, new_tokens: int, seconds: Sequence[float], peak: int) -> Speed:
    """From the seconds of the prefill and those of all decoding steps together."""
    prefill, decode = seconds
    batch_size, prompt_tokens = prompt.shape
    return Speed(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_ms=1000 * prefill,
        prefill_tokens_per_second=prompt.numel() / prefill,
        decode_ms_per_token=1000 * decode / max(new_tokens, 1),
        decode_tokens_per_second=batch_size * new_tokens / decode,
        peak_memory_bytes=peak,
    )


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of decoding `new_tokens` tokens."""
    keep_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, **keep_last)
    prefilled = _now(prompt.device)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)  # [batch, 1]
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return prefilled - start, _now(prompt.device) - prefilled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory_added(run: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - before
