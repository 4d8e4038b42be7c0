"""Layers that run once: the same bits in every family, fewer layer calls, off where a model is not understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from burnish.tune.prefix import PrefixReuse, prefix_reuse
from burnish.tune.trainer import answer_loss
from tests.conftest import COMMON, FAMILIES, VOCABULARY, build_model
from tests.tune.conftest import build_llama

OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48}, "gemma3_text": {"intermediate_size": 48, "head_dim": 8},
    "phi3": {"intermediate_size": 48}, "gpt_neox": {"intermediate_size": 48}, "mamba": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4},
}  # fmt: skip


def build(model_type: str) -> Any:
    if model_type in FAMILIES:
        return build_model(model_type)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**COMMON, **OTHERS[model_type]})).eval()


def batch() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_evaluations_with_displaced_layers_are_the_plain_ones_bit_for_bit(model_type: str) -> None:
    model, ids = build(model_type), batch()
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    reuse = prefix_reuse(model, ids)
    assert reuse is not None and len(reuse.layers) == 3
    for first in (1, 2):
        moved = list(reuse.layers[first].parameters())
        assert reuse.first_moved(moved) == first

        start = [tensor.clone() for tensor in moved]

        def losses(moved: list[Any] = moved, start: list[Any] = start) -> list[torch.Tensor]:
            found = []
            for distance in (0.1, -0.1, 0.0):
                for tensor, value in zip(moved, start, strict=True):
                    tensor.copy_(value + distance)
                found.append(answer_loss(model, ids, labels)[0])
            return found

        plain = losses()
        with reuse.below(first):
            again = losses()
        assert plain[0] != plain[1]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, plain, strict=True))
    assert "forward" not in vars(reuse.layers[0])  # everything is as it was


@torch.no_grad()
def test_layers_below_run_once() -> None:
    model, ids, calls = build_llama(), batch(), []
    reuse = PrefixReuse(model)
    for number, layer in enumerate(reuse.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    with reuse.below(2):
        for _ in range(3):
            model(ids, use_cache=False)
    assert calls == [0, 1, 2, 2, 2]


def test_what_moves_first() -> None:
    model = build_llama()
    reuse = PrefixReuse(model)
    last, middle = (list(reuse.layers[number].parameters()) for number in (2, 1))
    assert reuse.first_moved([*last, middle[0]]) == 1
    assert reuse.first_moved([*last, model.get_input_embeddings().weight]) == 0
    assert reuse.first_moved([model.model.norm.weight]) == 0


def test_u3_3_a_model_whose_layers_talk_past_their_output_is_not_understood() -> None:
    class Whisper(nn.Module):
        def __init__(self, layer: nn.Module, said: dict[str, Any]) -> None:
            super().__init__()
            self.layer, self.said = layer, said

        def forward(self, hidden: Any, **options: Any) -> Any:
            count = self.said["count"] = self.said.get("count", 0) + 1
            return self.layer(hidden, **options) * count

    model = build_llama()
    said: dict[str, Any] = {}
    for number in range(3):
        model.model.layers[number] = Whisper(model.model.layers[number], said)
    assert prefix_reuse(model, batch()) is None
    model = build_llama()
    model.config.num_hidden_layers = 7  # a list of layers that is not found
    assert prefix_reuse(model, batch()) is None


@torch.no_grad()
def test_a_forward_that_another_library_put_there_runs_and_stays() -> None:
    model, ids, calls = build_llama(), batch(), []
    first = model.model.layers[0]
    whole = first.forward
    first.forward = lambda *args, **options: calls.append(1) or whole(*args, **options)
    wrapped = first.forward
    with PrefixReuse(model).below(2):
        for _ in range(3):
            model(ids)
    assert calls == [1] and first.forward is wrapped
