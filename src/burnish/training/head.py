"""The last step of a language model, apart from the rest: hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.errors import UnsupportedModelError
from burnish.training.gather import whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-2

R = TypeVar("R")
Reader = Callable[[Tensor, Tensor, "Tensor | None"], R]
"""(hidden states [..., hidden], weight [vocab, hidden], bias [vocab] or None) -> anything that holds tensors."""


@dataclass(frozen=True)
class LanguageHead:
    """A model's head: `finish(linear(hidden))` are its logits.

    Attributes:
        linear: the output embedding.
        finish: what the model does to the projected states: a scale, a soft cap, or nothing (`unchanged`).
    """

    linear: nn.Linear
    finish: Callable[[Tensor], Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` of hidden states `[..., hidden]`."""
        return self.finish(self.linear(hidden))

    def read(self, hidden: Tensor, reader: Reader[R]) -> R:
        """What a function makes of hidden states `[..., hidden]`, the weight and the bias.

        It runs inside a call of the head: there FSDP and ZeRO have gathered the weight, and know of its gradient.
        """
        own = vars(self.linear)
        before = own.get("forward")
        own["forward"] = lambda states: reader(states, self.linear.weight, self.linear.bias)
        try:
            found: R = self.linear(hidden)
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before
        return found

    @torch.no_grad()
    def gathered(self) -> Callable[[Tensor], Tensor]:
        """`logits`, with a weight that is gathered now, by all ranks together: each may call it as often as it has to.

        The weight has no gradient.
        """
        weight, bias = whole(self.linear.weight), None if self.linear.bias is None else whole(self.linear.bias)
        return lambda hidden: self.finish(F.linear(hidden, weight, bias))


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The head of a causal language model, as its config describes it; `require_head` proves it."""
    linear = model.get_output_embeddings()
    if not hasattr(linear, "weight"):
        raise UnsupportedModelError(f"{type(model).__name__}: has no output embedding with a weight")
    return LanguageHead(linear, _finish(model.config.get_text_config()))


def unchanged(logits: Tensor) -> Tensor:
    """The logits of a model that does nothing to its projected states."""
    return logits


def _finish(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    scaling = getattr(config, "logits_scaling", None)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    factor = getattr(config, "logit_scale", None)  # Cohere
    if not (scaling or cap or factor):
        return unchanged

    def finish(logits: Tensor) -> Tensor:
        if scaling:
            logits = logits / scaling
        if factor:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


@torch.no_grad()
def require_head(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Hold `language_head` applied to the decoder's output against the model's own logits.

    Args:
        model: in evaluation mode.
        input_ids: Tensor `[batch, seq]`, int64; a few tokens are enough.

    Raises:
        UnsupportedModelError: they differ: the model does more than a projection and a scale after its decoder.
    """
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    hidden = decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    found = language_head(model).logits(hidden).float()
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error < TOLERANCE:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its logits are not its head applied to its last hidden states (they differ by"
            f" {error:.1%}): this model cannot be trained in chunks"
        )


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model before its head."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    assert isinstance(found, nn.Module)
    return found
