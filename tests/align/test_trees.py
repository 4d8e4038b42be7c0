"""Layouts of a batch of trees: all give the log-probabilities that plain logits give (U8.2)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.align.trees import (
    all_branch_states,
    branch_lengths,
    branch_logps,
    branch_states,
    choose_layout,
    collate,
    shares_prompts,
)

TREES = [
    {"prompt_ids": [5, 6, 7, 8], "branch_ids": [[9, 10, 2], [11, 2]]},
    {"prompt_ids": [3], "branch_ids": [[4, 4, 4, 4, 4, 2], [1]]},
    {"prompt_ids": [12, 13, 14, 15, 16, 17, 18], "branch_ids": [[5, 2], [5, 2]]},
]


def model_of(kind="llama", seed=0, **options):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return model if "moe" in kind else model.double()  # the kernel of experts takes no float64


def plain_logps(model, trees, temperature=1.0):
    found = []
    for tree in trees:
        for branch in tree["branch_ids"]:
            ids = torch.tensor([tree["prompt_ids"] + branch])
            logps = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
            start = len(tree["prompt_ids"])
            found.append(sum(logps[start + place - 1, token] for place, token in enumerate(branch)))
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["padded", "shared", "packed"])
def test_u8_2_every_layout_gives_the_plain_log_probabilities_and_gradients(layout, attention):
    model = model_of(attn_implementation=attention)
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    wanted = plain_logps(model, TREES)
    (wanted * upstream).sum().backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters()}
    model.zero_grad()
    found = branch_logps(model, collate(TREES, layout, pad=0))
    (found * upstream).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)  # norms are float32


def test_the_temperature_divides_logits():
    model = model_of()
    found = branch_logps(model, collate(TREES, "padded", pad=0), temperature=0.7)
    torch.testing.assert_close(found, plain_logps(model, TREES, 0.7))


def test_branches_of_a_shared_prompt_do_not_see_each_other():
    model = model_of()
    other = [{**TREES[0], "branch_ids": [[9, 10, 2], [50, 51, 52, 2]]}]
    first, second = (branch_logps(model, collate(trees, "shared", pad=0))[0] for trees in (TREES[:1], other))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("branches", [1, 3])
def test_a_tree_has_any_number_of_branches(branches):
    model = model_of()
    trees = [{"prompt_ids": [5, 6], "branch_ids": [[7 + place, 2] for place in range(branches)]}] * 2
    wanted = plain_logps(model, trees)
    for layout in ("padded", "shared", "packed"):
        torch.testing.assert_close(branch_logps(model, collate(trees, layout, pad=0)), wanted)


def test_lengths_count_the_tokens_of_branches_only():
    for layout in ("padded", "shared", "packed"):
        batch = collate(TREES, layout, pad=0)
        assert branch_lengths(batch).tolist() == [3, 2, 6, 1, 2, 2]
        assert len(branch_states(model_of(), batch)) == 16


def test_states_of_every_layer_are_those_that_predict_each_token():
    model = model_of()
    states = all_branch_states(model, collate(TREES, "shared", pad=0))
    output = model(
        input_ids=torch.tensor([TREES[0]["prompt_ids"] + TREES[0]["branch_ids"][1]]), output_hidden_states=True
    )
    for found, wanted in zip(states, output.hidden_states[1:], strict=True):
        torch.testing.assert_close(found[3:5], wanted[0, 3:5], rtol=1e-5, atol=1e-6)


def test_a_shared_row_holds_its_prompt_once():
    assert collate(TREES[:1], "shared", pad=0)["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 2, 11, 2]]
    assert collate(TREES[:1], "shared", pad=0)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5]]
    assert collate(TREES[:1], "packed", pad=0)["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 2, 5, 6, 7, 8, 11, 2]]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without a token"):
        collate([{"prompt_ids": [], "branch_ids": [[1], [2]]}], "padded", pad=0)


def test_sharing_is_chosen_where_it_saves_a_tenth():
    long = {"prompt_ids": [1] * 10, "branch_ids": [[2] * 2, [3] * 2]}
    short = {"prompt_ids": [1], "branch_ids": [[2] * 9, [3] * 9]}
    assert choose_layout([long]) == "shared"
    assert choose_layout([short]) == "padded"
    assert choose_layout([long, short]) == "shared"  # 2 rows of 19 in place of 4 of 12: 38 <= 43.2
    assert choose_layout([long, {"prompt_ids": [1], "branch_ids": [[2] * 11, [3] * 11]}]) == "padded"  # 46 of 48


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "olmo2", "granite"])
def test_models_with_full_attention_share_prompts(kind, attention):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in kind else {}
    assert shares_prompts(model_of(kind, attn_implementation=attention, **options), TREES[0], pad=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 40}),
        ("gemma2", {"sliding_window": 40, "head_dim": 8}),
    ],
)
def test_models_with_windows_do_not_share_prompts_even_if_the_first_row_is_short(kind, options):
    assert not shares_prompts(model_of(kind, **options), TREES[0], pad=0)


def test_a_model_that_ignores_the_mask_is_found_out():
    model = model_of()
    inner = model.model.forward
    model.model.forward = lambda attention_mask=None, **options: inner(**options)
    assert not shares_prompts(model, TREES[0], pad=0)
