"""SparsePO: DPO by token, where masks say which tokens carry the reward and which are held to the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from burnish.align.objectives.option import NonNegative, Positive
from burnish.align.objectives.sequences import logistic


def sparse_po(
    chosen_token_logps: Tensor,
    rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_token_kl: Tensor,
    rejected_token_kl: Tensor,
    chosen_reward_mask: Tensor,
    rejected_reward_mask: Tensor,
    chosen_kl_mask: Tensor,
    rejected_kl_mask: Tensor,
    *,
    beta: Positive = 0.1,
    reward_mask_l1: NonNegative = 0.0,
    kl_mask_l1: NonNegative = 0.0,
) -> Tensor:
    """-ln sigma(beta (u - delta)) and the l1 norms of the masks: Tensor [batch].

    u is the margin of the masked sums of ln(pi/ref), delta the masked KL(ref || pi) of the rejected answer less that of
    the chosen one. Masks of ones make it TDPO1, and without the KL terms DPO.

    Args:
        chosen_token_logps: Tensor `[batch, tokens]`, float: log-probability of each token of the preferred answer.
            Padding has masks of 0 and any finite numbers, in all of these.
        rejected_token_logps: of the other answer; its number of tokens may differ.
        ref_chosen_token_logps: under the reference.
        ref_rejected_token_logps: of the other answer.
        chosen_token_kl: Tensor `[batch, tokens]`: KL(ref || pi) of the next-token distributions, over the vocabulary.
        rejected_token_kl: of the other answer.
        chosen_reward_mask: Tensor `[batch, tokens]`, not negative.
        rejected_reward_mask: of the other answer.
        chosen_kl_mask: Tensor `[batch, tokens]`, not negative; may be the reward mask.
        rejected_kl_mask: of the other answer.
        beta: as in `dpo`.
        reward_mask_l1: strength for sparse reward masks.
        kl_mask_l1: strength for sparse KL masks.

    Source: arXiv 2410.05102 and its code.
    """
    chosen = chosen_reward_mask * (chosen_token_logps - ref_chosen_token_logps) + chosen_kl_mask * chosen_token_kl
    rejected = (
        rejected_reward_mask * (rejected_token_logps - ref_rejected_token_logps) + rejected_kl_mask * rejected_token_kl
    )
    preference = logistic(beta * (chosen.sum(-1) - rejected.sum(-1)))
    reward_norm = chosen_reward_mask.sum(-1) + rejected_reward_mask.sum(-1)
    kl_norm = chosen_kl_mask.sum(-1) + rejected_kl_mask.sum(-1)
    return preference + reward_mask_l1 * reward_norm + kl_mask_l1 * kl_norm


def activation_mask(activations: Sequence[Tensor], completion_mask: Tensor) -> Tensor:
    """MaPO: how active the reference is at each token of an answer, from 0 to 1: Tensor [batch, tokens], no gradient.

    Of each activation the mean over its units, brought to [0, 1] over the tokens of the answer, and averaged over the
    activations. An answer on whose tokens an activation does not vary has ones there (ours; the code divides by 0).

    Args:
        activations: Tensors `[batch, tokens, units]`, float, of any numbers of units.
        completion_mask: Tensor `[batch, tokens]`: 1 on tokens of the answer.

    Source: arXiv 2410.05102 and its code, whose z-scores before the rescaling cancel.
    """
    counted = completion_mask.bool()
    total = torch.zeros(counted.shape, dtype=activations[0].dtype, device=counted.device)
    for activation in activations:
        mean = activation.detach().mean(-1)
        low = mean.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
        span = mean.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True) - low
        total += torch.where(span > 0, (mean - low) / span, 1.0)
    return (total / len(activations)).masked_fill(~counted, 0.0)


class TokenMask(nn.Module):
    """A learned mask: hidden states of the reference at every layer -> how much each token counts.

    One layer norm for all, then for each layer a unit with a ReLU, and a mixture of those with another ReLU. Reward and
    KL may share one, or have one each. Where the last ReLU starts closed for all tokens it stays so: draw again.

    Args:
        num_layers: hidden states given, without that of the embedding; 1 takes the last layer alone.
        hidden_size: of the reference.
        dropout: of both stages.

    Source: arXiv 2410.05102 and its code ("simple_all").
    """

    def __init__(self, num_layers: int, hidden_size: int, *, dropout: float = 0.01) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(num_layers))
        self.mixer = nn.Linear(num_layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Tensor `[batch, tokens]`, not negative.

        Args:
            hidden_states: a Tensor `[batch, tokens, hidden]` for each layer, at the positions that predict.
        """
        seen = [
            self.dropout(layer(self.norm(hidden)).relu())
            for layer, hidden in zip(self.layers, hidden_states, strict=True)
        ]
        mixed: Tensor = self.dropout(self.mixer(torch.cat(seen, dim=-1)).relu())
        return mixed.squeeze(-1)
