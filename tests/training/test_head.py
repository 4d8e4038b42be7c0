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


def test_a_reader_runs_in_a_call_of_the_head(some_tokens: torch.Tensor) -> None:
    model = build_model("granitemoe")
    head, calls = language_head(model), []
    hidden = decoder(model)(input_ids=some_tokens, use_cache=False).last_hidden_state
    head.linear.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    found = head.read(
        hidden, lambda states, weight, bias: head.finish(torch.nn.functional.linear(states, weight, bias))
    )
    assert len(calls) == 1 and calls[0][0] is hidden
    assert torch.equal(found, head.logits(hidden)) and "forward" not in vars(head.linear)
    with torch.no_grad():
        assert torch.equal(head.gathered()(hidden), head.logits(hidden))


def test_a_head_with_a_forward_of_its_own_keeps_it(some_tokens: torch.Tensor) -> None:
    head = language_head(soft_capped())
    own = head.linear.forward
    head.linear.forward = own
    with pytest.raises(ZeroDivisionError):
        head.read(torch.zeros(2, 32), lambda states, weight, bias: 1 / 0)
    assert vars(head.linear)["forward"] is own
