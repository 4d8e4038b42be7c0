"""Completions drawn from a causal language model: the same for the same seed, whatever batch they were drawn in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from burnish.errors import BurnishError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Completions = list[list[list[int]]]
"""For each prompt its completions, for each completion its tokens; the end token is the last where it ended."""


class Sampler(Protocol):
    """Draws completions of prompts."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Completions:
        """As `sample`."""


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 2,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    adapters: bool = True,
) -> Completions:
    """Draw completions with `generate` of transformers.

    Every completion has random numbers of its own, which its prompt and `seed` determine: order and size of batches
    change nothing but roundings. The model's own defaults for generation (a top-k, a penalty for repetition, ...) do
    not apply, so that at temperature 1 and `top_p` 1 the draws follow the model's distribution exactly. Global random
    states and the mode of the model are left as they were.

    Args:
        model: a causal language model, or one with adapters of PEFT.
        prompts: their tokens; none is empty.
        tokenizer: its end token ends a completion, as do those that the model's generation config names.
        num_samples: completions of each prompt; a prompt that is there twice gets different ones.
        max_new_tokens: of a completion, its end token included.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens whose probabilities reach this sum are drawn.
        seed: of the draws.
        batch_size: completions that are drawn at a time.
        adapters: False draws with the adapters off: from the reference.

    Raises:
        ValueError: an option is out of range, or a prompt is empty or too long for the model.

    Source: drawing by the inverse of the distribution function, Devroye, Non-Uniform Random Variate Generation (1986),
        section III.2; a stream of uniform numbers for each prompt, ours.
    """
    require_drawing(num_samples, max_new_tokens, temperature, top_p, batch_size)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    _require_prompts(prompts, plain, max_new_tokens)
    ends = end_tokens(plain, tokenizer)
    keys = _keys(prompts, seed)
    rows = sorted(
        ((prompt, number) for prompt in range(len(prompts)) for number in range(num_samples)),
        key=lambda row: len(prompts[row[0]]),
    )
    found: dict[tuple[int, int], list[int]] = {}
    with _ready(plain, ends), _without(model, adapters=adapters):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            streams = {prompt: _stream(keys[prompt], num_samples, max_new_tokens) for prompt, _ in batch}
            uniforms = torch.stack([streams[prompt][number] for prompt, number in batch])
            ids = _generate(plain, [prompts[prompt] for prompt, _ in batch], uniforms, ends, temperature, top_p)
            found |= dict(zip(batch, ids, strict=True))
    return [[found[prompt, number] for number in range(num_samples)] for prompt in range(len(prompts))]


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the distribution function of each row passes a uniform number.

    Args:
        logits: Tensor `[rows, vocab]`; minus infinity is never drawn.
        uniforms: Tensor `[rows]`, float64, in [0, 1).

    Returns:
        Tensor `[rows]`, int64.
    """
    passed = logits.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)  # [rows, vocab]
    levels = (uniforms * passed[:, -1])[:, None]  # the last is 1 up to rounding
    return torch.searchsorted(passed, levels, right=True).squeeze(1)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's, and those of the model's generation config.

    Raises:
        ValueError: there is none.
    """
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = named if isinstance(named, list) else [named]
    found = {token for token in (tokenizer.eos_token_id, *listed) if token is not None}
    if not found:
        raise ValueError("neither the tokenizer nor the generation config names an end token: set eos_token")
    return sorted(found)


def text_of(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> str:
    """A completion as people and rewards read it: without special tokens."""
    text = tokenizer.decode(list(completion), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class VLLMSampler:
    """Draws with vLLM from weights on disk; a new policy is handed over by writing it and making a new sampler.

    Untested here: the test suite has no vLLM. Draws are those of vLLM: they differ from `sample`'s, and they depend on
    its version and device.

    Args:
        model: directory of the whole model, or of the base model.
        adapters: directory of adapters, as PEFT writes them; None has none.
        engine: further options of `vllm.LLM`, such as `gpu_memory_utilization`.

    Raises:
        BurnishError: vLLM is not installed.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, adapters: str | os.PathLike[str] | None = None, **engine: Any
    ) -> None:
        try:
            from vllm import LLM  # type: ignore[import-not-found, unused-ignore]
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise BurnishError("drawing with vLLM needs the package vllm: pip install vllm") from error
        options = {"generation_config": "vllm", "enable_lora": adapters is not None} | engine
        self.engine = LLM(model=os.fspath(model), **options)
        self.adapters = LoRARequest("policy", 1, os.fspath(adapters)) if adapters is not None else None

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Completions:
        """As `sample`."""
        from vllm import SamplingParams

        require_drawing(num_samples, max_new_tokens, temperature, top_p)
        end = self.engine.get_tokenizer().eos_token_id
        settings = [
            SamplingParams(n=num_samples, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=key)
            for key in _keys(prompts, seed)
        ]
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            settings,
            use_tqdm=False,
            lora_request=self.adapters,
        )
        found = []
        for output in outputs:
            branches = [list(branch.token_ids) for branch in output.outputs]
            for ids, branch in zip(branches, output.outputs, strict=True):
                if branch.finish_reason == "stop" and ids[-1:] != [branch.stop_reason or end]:
                    ids.append(branch.stop_reason or end)
            found.append(branches)
        return found


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row only the token that its uniform number of this step draws."""

    def __init__(self, uniforms: Tensor, start: int) -> None:
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw(scores, self.uniforms[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    ends: list[int],
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    pad = ends[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    processors = LogitsProcessorList()
    if temperature > 0:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
        processors.append(_Draws(uniforms.to(device), longest))
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        logits_processor=processors,
        max_new_tokens=uniforms.shape[1],
        do_sample=False,
        use_cache=True,
    )
    return [_ended(row, ends) for row in output[:, longest:].tolist()]


def _ended(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, which is kept."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _keys(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A seed for each prompt from what it says, and from how often it came before: its place does not matter."""
    seen: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        content = torch.tensor(list(prompt), dtype=torch.int64).numpy().tobytes()
        keys.append(xxhash.xxh3_64_intdigest(content, seed=_mixed(seed, seen[content])) >> 1)
        seen[content] += 1
    return keys


def _mixed(seed: int, number: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {number}".encode())


def _stream(key: int, num_samples: int, max_new_tokens: int) -> Tensor:
    """Uniform numbers of one prompt, Tensor `[num_samples, max_new_tokens]`, float64."""
    generator = torch.Generator().manual_seed(key)
    return torch.rand(num_samples, max_new_tokens, dtype=torch.float64, generator=generator)


@contextmanager
def _ready(model: PreTrainedModel, ends: list[int]) -> Iterator[None]:
    """In evaluation mode and with no defaults of generation but the end tokens."""
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    config = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    try:
        yield
    finally:
        model.generation_config = config
        for module, training in modes:
            module.training = training


def _without(model: Any, *, adapters: bool) -> AbstractContextManager[Any]:
    if adapters:
        return nullcontext()
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"{type(model).__name__} has no adapters to draw without: give the reference itself")
    off: AbstractContextManager[Any] = model.disable_adapter()
    return off


def require_drawing(
    num_samples: int, max_new_tokens: int, temperature: float, top_p: float, batch_size: int = 1
) -> None:
    """Refuse options of drawing that are out of range."""
    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a probability above 0, at most 1")


def _require_prompts(prompts: Sequence[Sequence[int]], model: PreTrainedModel, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {number} has no token: open it with the beginning-of-text token")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens={max_new_tokens}, but the model has"
                f" {positions} positions: shorten the prompt, or lower max_new_tokens"
            )
