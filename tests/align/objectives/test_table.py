"""Every row of the table of objectives, and objectives by name."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.align import objectives
from burnish.align.objectives import OBJECTIVES, Objective, dpo, lcpo, mixture, objective
from burnish.align.objectives.option import Positive
from tests.align.objectives.example import of, random_pairs

EACH = pytest.mark.parametrize("name", [*OBJECTIVES, "lcpo:simpo", "lcpo:cpo", "lcpo:ipo", "lcpo:pd"])
PAGE = Path(__file__).parents[3] / "docs" / "methods" / "preferences.md"

RANGES = {"logps": (-1e4, 0), "lengths": (1, 4096), "rewards": (-1e4, 1e4), "labels": (0, 1), "reliability": (0, 1)}
RANGES |= {"similarity": (-1, 1), "kl": (0, 1e3), "mask": (0, 2)}


def drawn(name: str, seed: int, extreme: bool, dtype: torch.dtype) -> Tensor:
    """What an input may be; the extremes are the ends of its range."""
    low, high = next(found for ending, found in RANGES.items() if name.endswith(ending))
    axes = 1 + sum(part in name for part in ("sample", "token", "mask"))
    shape = () if name in ("kl", "retain_kl") else (3, 4, 2)[:axes]
    share = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = share.round() if extreme else share
    takes_gradient = name.endswith("logps") and not name.startswith("ref_")
    return (low + (high - low) * share).to(dtype).requires_grad_(takes_gradient)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 2**20), extreme=st.booleans(), scale=st.sampled_from([1.0, 1e-3]))
@settings(max_examples=25, deadline=None)
def test_losses_and_gradients_are_finite_at_any_size(
    name: str, dtype: torch.dtype, seed: int, extreme: bool, scale: float
) -> None:
    bound = objective(name)
    names = [*bound.inputs, *(("labels", "rejected_lengths") if bound.objective.soft else ())]
    available = {one: drawn(one, seed + place, extreme, dtype) for place, one in enumerate(dict.fromkeys(names))}
    if scale != 1:
        available = {one: (t * scale).detach().requires_grad_(t.requires_grad) for one, t in available.items()}
    loss = bound(available)
    assert loss.dtype == dtype and loss.shape == (3,)
    assert loss.isfinite().all()
    loss.sum().backward()
    for one, tensor in available.items():
        if tensor.requires_grad and tensor.grad is not None:
            assert tensor.grad.dtype == dtype and tensor.grad.isfinite().all(), one


@EACH
def test_gradients_are_those_of_the_values(name: str) -> None:
    row = objective(name).objective
    if row.data == "samples" or row.base is not None:
        pytest.skip("by design the gradient is not that of the value: see test_rkl.py and test_lcpo.py")
    bound = objective(name)
    available = {one: drawn(one, place, False, torch.float64) for place, one in enumerate(bound.inputs)}
    available = {one: t.detach() / 1e3 if one.endswith("logps") else t for one, t in available.items()}
    moving = [one for one in available if one.endswith("logps") and not one.startswith("ref_")]
    fixed = {one: t for one, t in available.items() if one not in moving}
    assert torch.autograd.gradcheck(
        lambda *t: bound({**fixed, **dict(zip(moving, t, strict=True))}),
        [available[one].clone().requires_grad_() for one in moving],
    )


PAIR_REFERENCE = [row.name for row in OBJECTIVES.values() if "ref_chosen_logps" in row.inputs]


@pytest.mark.parametrize("name", PAIR_REFERENCE)
def test_a_constant_in_the_reference_changes_no_loss_of_pairs(name: str) -> None:
    pairs = random_pairs(0)
    moved = pairs | {one: pairs[one] + 3.7 for one in pairs if one.startswith("ref_")}
    bound = objective(name)
    if name == "sigmoid-norm":  # a constant per token, then
        for side in ("chosen", "rejected"):
            moved[f"ref_{side}_logps"] = pairs[f"ref_{side}_logps"] + 0.7 * pairs[f"{side}_lengths"]
    assert torch.allclose(bound(moved), bound(pairs), rtol=1e-10)
    one_side = pairs | {"ref_chosen_logps": pairs["ref_chosen_logps"] + 3.7}
    assert not torch.allclose(bound(one_side), bound(pairs), rtol=1e-3)


@pytest.mark.parametrize("name", [row.name for row in OBJECTIVES.values() if "chosen_rewards" in row.inputs])
def test_a_constant_in_the_rewards_changes_no_loss_of_pairs(name: str) -> None:
    pairs = random_pairs(0)
    moved = pairs | {one: pairs[one] + 3.7 for one in pairs if one.endswith("rewards")}
    assert torch.allclose(objective(name)(moved), objective(name)(pairs), rtol=1e-10)


@pytest.mark.parametrize("name", [row.name for row in OBJECTIVES.values() if row.data in ("pairs", "scored pairs")])
def test_more_probability_of_a_clear_winner_lowers_every_loss_of_pairs(name: str) -> None:
    if name == "sparse-po":
        pytest.skip("by token: see test_sparse_po.py")
    pairs = random_pairs(1)
    pairs |= {"chosen_rewards": torch.full((6,), 5.0).double(), "rejected_rewards": torch.zeros(6).double()}
    for side in ("chosen", "rejected"):
        pairs[f"{side}_logps"] = pairs[f"ref_{side}_logps"].clone().requires_grad_()
    loss = objective(name)(pairs)
    chosen, rejected = torch.autograd.grad(loss.sum(), [pairs["chosen_logps"], pairs["rejected_logps"]])
    assert (chosen < 0).all() and (rejected > 0).all()


def test_the_facts_that_rows_tell_of_themselves() -> None:
    assert OBJECTIVES["dpo"].inputs == ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    assert OBJECTIVES["ipo"].options == {"beta": 0.1, "average": False}
    free = {name for name, row in OBJECTIVES.items() if not row.needs_reference}
    assert free == {"pmle", "pd", "simpo", "orpo", "cpo"}
    rewarded = {name for name, row in OBJECTIVES.items() if row.needs_rewards}
    assert rewarded == {
        "pd", "rkl", "rkl-token", "rlhf", "madpo", "rebel", "reward-distillation", "reward-distillation-ce",
    }  # fmt: skip
    assert {row.name for row in OBJECTIVES.values() if row.data == "samples"} == {"rkl", "rkl-token", "rlhf"}
    scored = {row.name for row in OBJECTIVES.values() if row.data == "scored pairs"}
    assert scored == rewarded - {"rkl", "rkl-token", "rlhf"}


def test_every_loss_of_the_package_has_a_row_and_every_row_its_loss_there() -> None:
    public = {getattr(objectives, name) for name in objectives.__all__ if inspect.isfunction(getattr(objectives, name))}
    others = {"activation_mask", "kto_kl", "lcpo", "margin_weight", "mixture", "objective", "on_policy_kl"}
    others |= {"updated_reliability"}
    losses = {one for one in public if one.__name__ not in others}
    assert losses == {row.loss for row in OBJECTIVES.values() if row.base is None}


def test_labels_make_a_mixture_and_more_than_is_needed_does_no_harm() -> None:
    pairs = random_pairs(0)
    assert torch.equal(objective("dpo", beta=0.2)(pairs), of(dpo, pairs, beta=0.2))
    pairs["labels"] = torch.full((6,), 0.25).double()
    assert torch.equal(objective("dpo", beta=0.2)(pairs), of(mixture(dpo), pairs, beta=0.2))


def test_labels_that_an_objective_reads_itself_are_given_to_it() -> None:
    logps, reference, kl = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.tensor(0.0)
    available = {"logps": logps, "ref_logps": reference, "labels": torch.tensor([1.0, 0.0]), "kl": kl}
    expected = torch.sigmoid(torch.tensor([-0.1, 0.0]))
    assert torch.allclose(objective("kto")(available), expected)


def test_the_weight_of_the_kl_is_told_and_not_used() -> None:
    pairs = random_pairs(0)
    assert objective("pmle").kl == 0 and not objective("pmle").needs_reference
    regularised = objective("pmle", gamma=0.3, kl=0.05)
    assert regularised.kl == 0.05 and regularised.needs_reference
    assert torch.equal(regularised(pairs), objective("pmle", gamma=0.3)(pairs))
    assert objective("pd", kl=0.1).kl == 0.1
    assert objective("dpo").kl == 0


def test_lcpo_of_any_pair_loss() -> None:
    pairs = random_pairs(0)
    bound = objective("lcpo:simpo", beta=2.5, gamma_beta_ratio=0.3)
    assert bound.name == "lcpo:simpo" and not bound.needs_reference
    assert bound.inputs[-1] == "reliability"
    right = bound.label_posterior(pairs)
    assert right is not None and ((right > 0) & (right < 1)).all()
    assert torch.equal(objective("lcpo:dpo")(pairs), objective("lcpo")(pairs))
    assert objective("dpo").label_posterior(pairs) is None
    assert objective("lcpo:pd").objective.data == "scored pairs"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dppo", {}, "objective='dppo' is unknown: nearest is 'dpo'"),
        ("exo_pair", {}, "objective='exo_pair' is unknown: TRL's exo_pair is 'exo' here"),
        ("sigmoid", {}, "objective='sigmoid' is unknown: TRL's sigmoid is 'dpo' here"),
        ("zzzz", {}, "choose one of cdpo, cpo, dpo"),
        ("lcpo:npo", {}, "only lcpo has another inside of it, a pair loss such as lcpo:simpo"),
        ("dpo:simpo", {}, "only lcpo has another inside of it"),
        ("lcpo:lcpo", {}, "only lcpo has another inside of it"),
        ("dpo", {"betta": 0.1}, "dpo has no option 'betta': nearest is 'beta'"),
        ("dpo", {"kl": 0.1}, "dpo has no option 'kl': choose one of beta"),
        ("dpo", {"beta": 0}, r"beta=0: expected a number in \(0, inf\)"),
        ("dpo", {"beta": float("nan")}, r"beta=nan: expected a number in \(0, inf\)"),
        ("dpo", {"beta": float("inf")}, r"beta=inf: expected a number in \(0, inf\)"),
        ("dpo", {"beta": "0.1"}, "beta='0.1': expected a number in"),
        ("dpo", {"beta": None}, "beta=None: expected a number in"),
        ("dpo", {"beta": True}, "beta=True: expected a number in"),
        ("lcpo:dpo", {"beta": -1}, r"beta=-1: expected a number in \(0, inf\)"),
        ("ipo", {"average": 1}, "average=1: expected true or false"),
        ("rdpo", {"label_smoothing": 0.5}, r"label_smoothing=0.5: expected a number in \[0, 0.5\)"),
        ("exo", {"label_smoothing": 0}, r"label_smoothing=0: expected a number in \(0, 0.5\)"),
        ("madpo", {"c_min": 1}, r"c_min=1: expected a number in \(0, 1\)"),
        ("madpo", {"c_max": 1}, r"c_max=1: expected a number in \(1, inf\)"),
        ("pd", {"reward_clip": 0}, r"reward_clip=0: expected a number in \(0, inf\)"),
        ("pmle", {"kl": -0.1}, r"kl=-0.1: expected a number in \[0, inf\)"),
        ("simpo", {"gamma": 1.0, "gamma_beta_ratio": 0.5}, "say the same thing: give one of them"),
        ("simpo", {"gamma": -1.0}, r"gamma=-1.0: expected a number in \[0, inf\)"),
    ],
)
def test_u9_1_what_is_unknown_or_out_of_range_is_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective(name, **options)


def test_options_that_may_be_left_open_may_be_given_as_none() -> None:
    assert objective("pd", reward_clip=None).options["reward_clip"] is None
    assert objective("simpo", gamma=None, gamma_beta_ratio=0.4).options["gamma_beta_ratio"] == 0.4


def test_underscores_are_hyphens() -> None:
    assert objective("sem_dpo").name == "sem-dpo"
    assert objective("reward_distillation_ce").objective is OBJECTIVES["reward-distillation-ce"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="rebel needs chosen_rewards, rejected_rewards: given are chosen_logps, rej"):
        pairs = random_pairs(0)
        objective("rebel")({name: pairs[name] for name in pairs if name.endswith("logps")})


def test_an_objective_of_ones_own() -> None:
    def square(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: Positive = 1.0) -> Tensor:
        return (chosen_logps - rejected_logps - beta).square()

    row = Objective("square", square, "pairs", "(Δ − β)²", "ours")
    pairs = random_pairs(0)
    expected = (pairs["chosen_logps"] - pairs["rejected_logps"] - 2.0).square()
    assert torch.equal(row.bind(beta=2.0)(pairs), expected)
    with pytest.raises(ValueError, match=r"beta=-2.0: expected a number in \(0, inf\)"):
        row.bind(beta=-2.0)


def test_an_objective_and_its_options_can_be_saved() -> None:
    bound = objective("dpo", beta=0.3)
    again = pickle.loads(pickle.dumps(bound))
    pairs = random_pairs(0)
    assert torch.equal(again(pairs), bound(pairs))
    assert all(json.dumps(OBJECTIVES[name].bind().options) for name in OBJECTIVES)


def method_table() -> str:
    """The table of the method page."""
    lines = ["| objective | loss | data | reference | rewards | source | TRL | |", "|---" * 8 + "|"]
    for row in OBJECTIVES.values():
        source = row.paper + (", reconstructed" if row.reconstructed else "")
        needs = ["yes" if needed else "" for needed in (row.needs_reference, row.needs_rewards)]
        peer = f"`{row.peer}`" if row.peer else ""
        cells = (f"`{row.name}`", row.formula, row.data, *needs, source, peer, row.note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def options_table() -> str:
    """Options with their defaults, by objective."""
    lines = ["| objective | options |", "|---|---|"]
    for row in OBJECTIVES.values():
        given = ", ".join(f"`{name}={value!r}`" for name, value in row.options.items())
        lines.append(f"| `{row.name}` | {given} |")
    return "\n".join(lines)


def test_u16_2_the_tables_of_the_method_page_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert method_table() in page
    assert options_table() in page


def test_every_option_is_documented_and_every_formula_has_its_source() -> None:
    for row in OBJECTIVES.values():
        assert "Source:" in (inspect.getdoc(lcpo if row.base else row.loss) or ""), row.name
        text = inspect.getdoc(row.base or row.loss) or ""
        assert all(f"{name}:" in text for name in row.options if name != "kl"), row.name


if __name__ == "__main__":
    print(method_table(), options_table(), sep="\n\n")
