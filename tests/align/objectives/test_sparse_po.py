"""SparsePO: DPO and TDPO1 as limits, both kinds of masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.align.objectives import TokenMask, activation_mask, dpo, sparse_po

BETA = 0.3
TOKENS = {"chosen": 4, "rejected": 7}


def inputs(seed: int = 0, vocab: int = 5, batch: int = 3) -> dict[str, Tensor]:
    """Real next-token distributions of two models, random answers, masks of ones; the last token is padding."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for side, tokens in TOKENS.items():
        logits = torch.randn(2, batch, tokens, vocab, generator=generator, dtype=torch.float64)
        log_pi, log_ref = logits.log_softmax(-1)
        answer = torch.randint(vocab, (batch, tokens, 1), generator=generator)
        found[f"{side}_token_logps"] = log_pi.gather(-1, answer).squeeze(-1)
        found[f"ref_{side}_token_logps"] = log_ref.gather(-1, answer).squeeze(-1)
        found[f"{side}_token_kl"] = (log_ref.exp() * (log_ref - log_pi)).sum(-1)
        mask = torch.ones(batch, tokens, dtype=torch.float64)
        mask[:, -1] = 0
        found[f"{side}_reward_mask"] = found[f"{side}_kl_mask"] = mask
    return found


def sums(found: dict[str, Tensor]) -> list[Tensor]:
    names = ("chosen_token_logps", "rejected_token_logps", "ref_chosen_token_logps", "ref_rejected_token_logps")
    return [found[name][:, :-1].sum(1) for name in names]


def test_masks_of_ones_without_kl_are_dpo() -> None:
    found = inputs()
    off = {name: 0 * found[name] for name in found if name.endswith("kl_mask")}
    assert torch.allclose(sparse_po(**found | off, beta=BETA), dpo(*sums(found), beta=BETA), rtol=1e-12)


def test_masks_of_ones_are_tdpo1() -> None:
    found = inputs()
    chosen, rejected, ref_chosen, ref_rejected = sums(found)
    u = (chosen - ref_chosen) - (rejected - ref_rejected)
    delta = found["rejected_token_kl"][:, :-1].sum(1) - found["chosen_token_kl"][:, :-1].sum(1)
    assert torch.allclose(sparse_po(**found, beta=BETA), -logsigmoid(BETA * (u - delta)), rtol=1e-12)


def test_a_token_whose_masks_are_zero_does_not_matter_and_the_norms_are_added() -> None:
    found = inputs()
    moved = dict(found)
    for side in TOKENS:
        for name in (f"{side}_token_logps", f"ref_{side}_token_logps", f"{side}_token_kl"):
            moved[name] = found[name].clone()
            moved[name][:, -1] += 100
    plain = sparse_po(**found)
    assert torch.equal(sparse_po(**moved), plain)
    found["chosen_kl_mask"] = 2 * found["chosen_kl_mask"]
    heavier = sparse_po(**found, reward_mask_l1=0.01, kl_mask_l1=0.1) - sparse_po(**found)
    assert heavier.tolist() == pytest.approx([0.01 * (3 + 6) + 0.1 * (6 + 6)] * 3, rel=1e-9)


def test_activation_masks_are_scaled_over_the_answer_and_averaged() -> None:
    first = torch.tensor([[[9.0, 9.0], [1.0, 3.0], [3.0, 3.0], [6.0, 6.0], [-50.0, 0.0]]])  # means 9 2 3 6 -25
    second = torch.tensor([[[0.0], [4.0], [0.0], [1.0], [0.0]]])
    mask = activation_mask([first, second], torch.tensor([[0, 1, 1, 1, 0]]))
    assert mask[0].tolist() == pytest.approx([0, 0.5, 0.125, 0.625, 0])


def test_activation_masks_equal_those_with_z_scores_and_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    counted = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    found = activation_mask([activation], counted)
    assert not found.requires_grad
    for row, mask in enumerate(counted.bool()):
        mean = activation.detach()[row, mask].mean(-1)
        z = (mean - mean.mean()) / mean.std()
        assert torch.allclose(found[row, mask], (z - z.min()) / (z.max() - z.min()), atol=1e-12)
        assert found[row, ~mask].abs().max() == 0


def test_an_answer_without_variation_counts_as_a_whole() -> None:
    assert activation_mask([torch.ones(1, 3, 2)], torch.tensor([[1, 1, 0]])).tolist() == [[1, 1, 0]]


def test_the_learned_mask_is_its_formula() -> None:
    torch.manual_seed(0)
    mask = TokenMask(3, 6).double().eval()
    states = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(3)]
    for weight in (mask.mixer.weight.data, *(layer.bias.data for layer in mask.layers)):
        weight.abs_()
    found = mask(states)
    for b in range(2):
        for t in range(4):
            total = torch.zeros((), dtype=torch.float64)
            for number, layer in enumerate(mask.layers):
                h = states[number][b, t]
                normed = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
                total += mask.mixer.weight[0, number] * (layer.weight[0] @ normed + layer.bias[0]).clamp(min=0)
            assert found[b, t].item() == pytest.approx(total.clamp(min=0).item(), abs=1e-12)
    assert found.shape == (2, 4) and found.max() > 0
    with torch.no_grad():
        mask.mixer.weight.neg_()
    assert mask(states).abs().max() == 0
    with pytest.raises(ValueError, match="zip"):
        mask(states[:2])
