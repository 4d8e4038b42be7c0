"""A policy beside its reference: what is seen of each, and weights that come back bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from burnish.align.policy import Policy
from burnish.align.sample import sample
from burnish.errors import CheckpointError
from tests.align.tiny_policy import contents, tiny_causal, tiny_tokenizer, with_adapters

TREES = [
    {"prompt_ids": [1, 40, 41, 42], "branch_ids": [[50, 51, 2], [60], [61, 62]]},
    {"prompt_ids": [1], "branch_ids": [[70, 71, 72, 73, 74, 2]]},
    {"prompt_ids": [1, 45], "branch_ids": [[70, 71], [72]]},
]
KINDS = ["whole", "adapters"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def logps_by_hand(model: Any) -> list[list[float]]:
    found = []
    for tree in TREES:
        found.append([])
        for branch in tree["branch_ids"]:
            ids = torch.tensor([[*tree["prompt_ids"], *branch]])
            with torch.no_grad():
                logps = model(ids).logits[0, len(tree["prompt_ids"]) - 1 : -1].log_softmax(-1)
            found[-1].append(float(logps.gather(1, torch.tensor(branch)[:, None]).sum()))
    return found


def changed(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def build(kind: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Policy:
    model = tiny_causal()
    return Policy(with_adapters(model, 0.5) if kind == "adapters" else model, tokenizer, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_log_probabilities_are_sums_over_the_tokens_of_a_completion(
    kind: str, batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = build(kind, tokenizer, batch_size=batch_size)
    changed(policy)
    for of_reference, model in ((False, policy.model), (True, tiny_causal())):
        found = policy.logps(TREES, of_reference=of_reference)
        for ours, expected in zip(found, logps_by_hand(model), strict=True):
            assert ours == pytest.approx(expected, abs=1e-4)
    assert policy.logps(TREES) != policy.logps(TREES, of_reference=True)


def test_the_mean_log_ratio_of_drawn_completions_is_the_divergence(tokenizer: PreTrainedTokenizerBase) -> None:
    """Completions of one token, so that KL and entropy can be summed over the vocabulary."""
    policy = build("whole", tokenizer, reference=tiny_causal(seed=1), batch_size=2000)
    prompt, count = [1, 40, 41], 4000
    (drawn,) = policy.sample([prompt], num_samples=count, max_new_tokens=1, temperature=1.0, top_p=1.0, seed=0)
    tree = [{"prompt_ids": prompt, "branch_ids": drawn}]
    logps = torch.tensor(policy.logps(tree)[0])
    ratios = logps - torch.tensor(policy.logps(tree, of_reference=True)[0])
    with torch.no_grad():
        p, q = (model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
                for model in (policy.model, tiny_causal(seed=1)))  # fmt: skip
    assert abs(ratios.mean() - (p.exp() * (p - q)).sum()) < 3 * ratios.std() / count**0.5
    assert abs(-logps.mean() + (p.exp() * p).sum()) < 3 * logps.std() / count**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_when_the_policy_is_trained(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = build(kind, tokenizer)
    options: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    prompts = [tree["prompt_ids"] for tree in TREES]
    expected = sample(tiny_causal(), prompts, tokenizer=tokenizer, **options)
    states = policy.reference_states(TREES)
    changed(policy)
    assert policy.sample(prompts, of_reference=True, **options) == expected != policy.sample(prompts, **options)
    assert all(torch.equal(a, b) for a, b in zip(states, policy.reference_states(TREES), strict=True))


def test_another_model_may_be_the_reference(tokenizer: PreTrainedTokenizerBase) -> None:
    guide = tiny_causal(seed=5)
    policy = build("adapters", tokenizer, reference=guide)
    found = policy.logps(TREES, of_reference=True)
    assert found[0] == pytest.approx(logps_by_hand(guide)[0], abs=1e-4)
    assert not any(parameter.requires_grad for parameter in guide.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_bit_by_bit(kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = build(kind, tokenizer)
    first = copy.deepcopy(policy.model.state_dict())
    changed(policy)
    second = copy.deepcopy(policy.model.state_dict())
    policy.save(tmp_path / "a")
    policy.save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / ("adapter_model.safetensors" if kind == "adapters" else "tokenizer.json")).exists()
    for directory, state in ((None, first), (tmp_path / "a", second), (None, first)):
        policy.restore(directory)
        now = policy.model.state_dict()
        assert all(torch.equal(now[name], state[name]) for name in state)


def test_adapters_are_written_as_peft_reads_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    import peft

    policy = build("adapters", tokenizer)
    changed(policy)
    policy.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = peft.PeftModel.from_pretrained(tiny_causal(), tmp_path)
    assert policy.logps(TREES)[0] == pytest.approx(logps_by_hand(loaded)[0], abs=1e-4)


def test_weights_of_another_model_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    Policy(tiny_causal(num_hidden_layers=2), tokenizer).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\..* is there or in the model, not in both"):
        build("whole", tokenizer).restore(tmp_path)
    with pytest.raises(ValueError, match="batch_size=0"):
        build("whole", tokenizer, batch_size=0)


def test_an_engine_draws_with_the_weights_that_were_restored(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    asked: list[Path | None] = []

    def engine(weights: Path | None) -> Any:
        asked.append(weights)
        return lambda prompts, **options: [[[weights is not None]]] * len(prompts)

    policy = build("whole", tokenizer, engine=engine)
    options: dict[str, Any] = {"num_samples": 1, "max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert policy.sample([[1]], **options) == [[[False]]]
    policy.save(tmp_path)
    policy.restore(tmp_path)
    assert asked == [None, tmp_path] and policy.sample([[1]], **options) == [[[True]]]
    assert policy.sample([[1]], of_reference=True, **options) == sample(tiny_causal(), [[1]], tokenizer=tokenizer,
                                                                       **options)  # fmt: skip
