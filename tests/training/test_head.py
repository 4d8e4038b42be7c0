"""A head apart from its model gives the model's own logits, for every family's scales and caps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from burnish.errors import UnsupportedModelError
from burnish.training.head import decoder, language_head, require_head
from tests.conftest import FAMILIES, build_model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_head_of_the_decoder_is_the_model(model_type: str, some_tokens: torch.Tensor) -> None:
    model = build_model(model_type)
    with torch.no_grad():
        hidden = decoder(model)(input_ids=some_tokens, use_cache=False).last_hidden_state
        found = language_head(model).logits(hidden)
        expected = model(input_ids=some_tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
    require_head(model, some_tokens)


def soft_capped() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, final_logit_softcapping=2.0, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def test_a_soft_cap_is_part_of_the_head(some_tokens: torch.Tensor) -> None:
    model = soft_capped()
    require_head(model, some_tokens)
    hidden = decoder(model)(input_ids=some_tokens, use_cache=False).last_hidden_state
    head = language_head(model)
    assert head.linear(hidden).abs().max() > 2 > head.logits(hidden).abs().max()


def test_a_model_that_does_more_after_its_decoder_is_refused(
    some_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("granitemoe")
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
    monkeypatch.setattr(model.config, "logits_scaling", 6.0)
    forward = type(model).forward

    def doubled(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UnsupportedModelError, match="cannot be trained in chunks"):
        require_head(model, some_tokens)
