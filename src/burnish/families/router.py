"""How a Mixture-of-Experts router turns logits into the experts and weights that the model really uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Routing(NamedTuple):
    """Chosen experts and their weights: `indices` [tokens, top_k] int64, `weights` [tokens, top_k] float32."""

    indices: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RouterRule:
    """The routing rule of a family, as its modelling code computes it.

    Attributes:
        top_k: experts per token.
        activation: "softmax" over all experts, or an independent "sigmoid" for each.
        renormalize: the chosen weights are divided by their sum. A softmax over the top-k logits only (Granite,
            GPT-OSS) is the same thing as a renormalised softmax over all of them.
        scaling_factor: multiplies the weights last.
        num_groups: experts are split into this many equal, consecutive groups, of which
        top_k_groups: stay eligible for a token (1 of 1: no group limit).
        group_score: a group ranks by its best expert ("max") or by the sum of its two best ("top2-sum").
        correction_bias: a learned bias is added for the choice, not for the weight.

    Source: transformers 5.23 modelling code of each family; DeepSeek-V2 (arXiv 2405.04434), V3 (arXiv 2412.19437).
    """

    top_k: int
    activation: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: Literal["max", "top2-sum"] = "max"
    correction_bias: bool = False

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether every token's weights sum to one, so that 1/k is their mean."""
        return self.renormalize and self.scaling_factor == 1.0

    @property
    def single_expert_weight(self) -> float:
        """The weight that a router of one row of zeros gives to its only expert."""
        unscaled = 0.5 if self.activation == "sigmoid" and not self.renormalize else 1.0
        return unscaled * self.scaling_factor

    def probabilities(self, logits: Tensor) -> Tensor:
        """Router probabilities before the top-k cut.

        Args:
            logits: [tokens, num_experts], any float dtype.

        Returns:
            [tokens, num_experts] float32 (float64 for float64 logits).
        """
        import torch

        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.softmax(dim=-1) if self.activation == "softmax" else logits.sigmoid()

    def route(self, logits: Tensor, correction_bias: Tensor | None = None) -> Routing:
        """The experts and weights of each token.

        Args:
            logits: [tokens, num_experts].
            correction_bias: [num_experts], required when the rule has one.

        Raises:
            ValueError: a bias is missing or not expected, or experts cannot be split into the groups.
        """
        import torch

        if (correction_bias is not None) != self.correction_bias:
            raise ValueError(f"correction_bias is {'missing' if self.correction_bias else 'not part of this rule'}")
        scores = self.probabilities(logits)
        choice = scores if correction_bias is None else scores + correction_bias
        if self.num_groups > 1:
            choice = choice.masked_fill(~self._eligible(choice), 0.0)
        indices = torch.topk(choice, self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(indices, weights * self.scaling_factor)

    def _eligible(self, choice: Tensor) -> Tensor:
        import torch

        tokens, num_experts = choice.shape
        if num_experts % self.num_groups:
            raise ValueError(f"{num_experts} experts cannot be split into {self.num_groups} groups")
        grouped = choice.view(tokens, self.num_groups, -1)  # [tokens, groups, experts per group]
        best = grouped.topk(2 if self.group_score == "top2-sum" else 1, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(1, best.topk(self.top_k_groups, dim=-1).indices, True)
        return kept.unsqueeze(-1).expand_as(grouped).reshape(tokens, num_experts)
