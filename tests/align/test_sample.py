"""Drawn completions follow the model's distribution, and nothing but prompt and seed decides what is drawn."""

from __future__ import annotations

import builtins
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from burnish.align.sample import VLLMSampler, draw, end_tokens, sample, text_of
from burnish.data import bundled_model
from burnish.errors import BurnishError
from tests.align.tiny_policy import tiny_causal, tiny_tokenizer, with_adapters

PROMPTS = [[1, 40, 41], [1, 50], [1, 60, 61, 62, 63, 64], [1, 70]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model() -> Any:
    return tiny_causal()


def test_the_inverse_of_the_distribution_function_gives_each_token_its_share() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits[:, [0, 7, 29]] = -torch.inf
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row in logits:
        drawn = draw(row.expand(count, -1), uniforms).bincount(minlength=30)
        assert (drawn - count * row.softmax(-1)).abs().max() <= 1
        assert (drawn[[0, 7, 29]] == 0).all()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits[:1].expand(2, -1), ends).tolist() == [1, 28]  # the first and the last that can be drawn


def test_rare_tokens_behind_likely_ones_have_their_share() -> None:
    """In float32 the distribution function would reach 1 before them."""
    logits = torch.tensor([[20.0, 0.0, 0.0]])  # 2e-9 each
    uniforms = 1 - torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64) * 1e-9
    assert draw(logits.expand(3, -1), uniforms).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.6), (2.0, 0.8)])
def test_first_tokens_follow_the_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float, top_p: float
) -> None:
    prompt, count = [1, 40, 41], 4000
    drawn = sample(model, [prompt], tokenizer=tokenizer, num_samples=count, max_new_tokens=1, temperature=temperature,
                   top_p=top_p, batch_size=1000)  # fmt: skip
    found = torch.tensor([branch[0] for branch in drawn[0]]).bincount(minlength=model.config.vocab_size)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    ranked, order = expected.sort(descending=True)
    kept = order[ranked.cumsum(0) - ranked < top_p]  # as many as it takes to reach top_p
    assert found.sum() == found[kept].sum()
    shares = expected[kept] / expected[kept].sum()
    rare = shares * count < 5
    observed = torch.cat([found[kept][~rare], found[kept][rare].sum()[None]])
    wanted = torch.cat([shares[~rare], shares[rare].sum()[None]]) * count
    filled = wanted > 0
    assert chisquare(observed[filled], wanted[filled]).pvalue > 0.01


def test_later_tokens_follow_the_model_too(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Mean log-probability of three tokens is minus their entropy, by enumeration of the last given the first two."""
    prompt, count = [1, 50], 3000
    drawn = sample(model, [prompt], tokenizer=tokenizer, num_samples=count, max_new_tokens=3, batch_size=1000)[0]
    whole = torch.tensor([branch for branch in drawn if len(branch) == 3])
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt).expand(len(whole), -1), whole], 1)
        logps = model(ids).logits.double().log_softmax(-1)[:, len(prompt) + 1]  # of the third token
    entropy = -(logps.exp() * logps).sum(-1)
    gap = logps.gather(1, whole[:, 2:])[:, 0] + entropy  # mean zero, whatever came before
    assert abs(gap.mean()) < 3 * gap.std() / len(gap) ** 0.5
    assert (logps.mean(1) + entropy).abs().min() > 0.1  # a uniform draw would be seen


def test_temperature_zero_is_greedy_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = sample(model, PROMPTS, tokenizer=tokenizer, num_samples=1, max_new_tokens=12, temperature=0.0)
    for prompt, (branch,) in zip(PROMPTS, drawn, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert branch == alone.tolist()


def test_u12_1_order_and_size_of_batches_change_nothing() -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    prompts = [tokenizer(text)["input_ids"] for text in ("The king", "A little girl went to the", "It was", "I")]
    options = {"tokenizer": tokenizer, "num_samples": 3, "max_new_tokens": 20}
    drawn = sample(model, prompts, **options)
    for batch_size in (1, 5):
        assert sample(model, prompts, batch_size=batch_size, **options) == drawn
    assert sample(model, prompts[::-1], **options) == drawn[::-1]
    assert sample(model, prompts[2:], **options) == drawn[2:]


def test_seeds_prompts_and_numbers_have_draws_of_their_own(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 8}
    drawn = sample(model, PROMPTS, num_samples=3, seed=1, **options)
    assert sample(model, PROMPTS, num_samples=3, seed=1, **options) == drawn
    assert sample(model, PROMPTS, num_samples=3, seed=2, **options) != drawn
    assert [branches[:2] for branches in drawn] == sample(model, PROMPTS, num_samples=2, seed=1, **options)
    twice = sample(model, [PROMPTS[0]] * 3, num_samples=2, seed=1, **options)
    assert twice[0] == drawn[0][:2]
    assert len({tuple(branch) for branches in twice for branch in branches}) == 6


def test_u12_2_nothing_of_the_caller_is_changed(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model.train()
    model.model.layers[0].mlp.eval()
    config, modes = model.generation_config, [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    sample(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=3)
    assert model.generation_config is config and modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_the_models_own_defaults_of_generation_do_not_apply(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = sample(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=10)
    defaults = {"repetition_penalty": 3.0, "top_k": 2, "do_sample": True, "temperature": 0.1, "min_new_tokens": 10}
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    assert sample(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=10) == drawn


def test_the_end_token_is_the_last_and_is_kept(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model.generation_config.eos_token_id = [2, 90]
    assert end_tokens(model, tokenizer) == [2, 90]
    drawn = sample(model, PROMPTS, tokenizer=tokenizer, num_samples=50, max_new_tokens=30)
    lengths = {len(branch) for branches in drawn for branch in branches}
    ends = {branch[-1] for branches in drawn for branch in branches if len(branch) < 30}
    assert ends == {2, 90} and len(lengths) > 5 and max(lengths) == 30
    assert not any({2, 90} & set(branch[:-1]) for branches in drawn for branch in branches)
    assert text_of(tokenizer, [40, 41, 2]) == tokenizer.decode([40, 41])


def test_adapters_off_draws_from_the_reference(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 8}
    reference = sample(model, PROMPTS, **options)
    adapted = with_adapters(model, scale=1.0)
    assert sample(adapted, PROMPTS, **options) != reference
    assert sample(adapted, PROMPTS, adapters=False, **options) == reference
    assert sample(adapted, PROMPTS, **options) == sample(adapted.merge_and_unload(), PROMPTS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: expected 1 or more"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0: expected 0"),
        ({"temperature": float("nan")}, "temperature=nan: expected 0"),
        ({"top_p": 0.0}, "top_p=0.0: expected a probability above 0"),
        ({"max_new_tokens": 60}, "prompt 3 has 6 tokens and max_new_tokens=60, but the model has 64 positions"),
        ({"prompts": [[1], []]}, "prompt 2 has no token"),
        ({"adapters": False}, "LlamaForCausalLM has no adapters to draw without"),
    ],
)
def test_bad_input(model: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str) -> None:
    call = {"prompts": PROMPTS, "tokenizer": tokenizer, "max_new_tokens": 8, **options}
    with pytest.raises(ValueError, match=message):
        sample(model, **call)


def test_no_end_token_at_all_is_refused(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the generation config names an end token"):
        sample(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=8)


def test_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without_vllm(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("vllm"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    with pytest.raises(BurnishError, match="pip install vllm"):
        VLLMSampler(tmp_path)
