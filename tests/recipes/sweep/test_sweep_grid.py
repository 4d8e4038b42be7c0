"""The grid, and which of its plans make the same student."""

from __future__ import annotations

import pytest

from burnish.densify import DensifyPlan, LayerPlan
from burnish.families import MoEShape, RouterRule
from burnish.recipes.sweep.grid import Configuration, distinct, kept_counts, make_grid

SHAPE = MoEShape(num_layers=4, moe_layers=(0, 1, 2, 3), num_experts=16, top_k=4, hidden_size=128, expert_width=128)
RULE = RouterRule(top_k=4)


def plan(**changes: object) -> DensifyPlan:
    layer = {"layer": 0, "groups": [[0], [1, 2]], "weights": [[0.3], [1.0, 3.0]], "scales": [0.5, 0.5], **changes}
    return DensifyPlan(family="x", num_experts=4, top_k=2, layers=[LayerPlan(**layer)])


@pytest.mark.parametrize(
    ("top_k", "num_experts", "expected"),
    [
        (4, 16, (4, 6, 8, 12, 16)),
        (8, 128, (8, 16, 32, 64, 128)),
        (6, 64, (6, 11, 20, 36, 64)),
        (4, 32, (4, 7, 12, 20, 32)),
        (2, 4, (2, 3, 4)),
        (2, 2, (2,)),
        (7, 29, (7, 10, 15, 21, 29)),  # 7 * (29 / 7) is more than 29 in floating point
    ],
)
def test_kept_counts_are_in_equal_ratios_from_top_k_to_all(
    top_k: int, num_experts: int, expected: tuple[int, ...]
) -> None:
    assert kept_counts(top_k, num_experts) == expected


def test_the_default_grid_is_the_papers_350() -> None:
    grid = make_grid(SHAPE, RULE)
    assert len(grid) == len(set(grid)) == 7 * 5 * 2 * 5 == 350
    assert {one.scaling for one in grid} == {"uniform", "score"} and "none" not in {one.grouping for one in grid}


def test_wider_students_come_last_and_by_width() -> None:
    grid = make_grid(SHAPE, RULE, groupings=["none", "router"])
    widths = [one.choice(SHAPE, RULE, 0).num_groups(4) for one in grid]
    assert widths == sorted(widths) and widths[-1] == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["sff"]}, "score 'sff' is unknown: nearest is 'sf'"),
        ({"groupings": ["wieghts"]}, "grouping 'wieghts' is unknown: nearest is 'weights'"),
        ({"scalings": ["unifrom"]}, "nearest is 'uniform'"),
        ({"scalings": ["auto"]}, "scaling 'auto' is unknown"),
        ({"keeps": [3]}, "keep=3 is less than the router's top_k=4"),
        ({"keeps": [17]}, "a layer has 16 experts"),
        ({"keeps": []}, "keeps is empty"),
        ({"scores": []}, "scores is empty"),
        ({"scalings": ["least-squares"]}, "needs blocks of one expert"),
    ],
)
def test_u9_1_what_cannot_be_is_refused(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(SHAPE, RULE, **options)  # type: ignore[arg-type]


def test_labels_tell_configurations_apart() -> None:
    grid = make_grid(SHAPE, RULE, groupings=["weights", "none"])
    assert len({one.label for one in grid}) == len(grid)
    assert Configuration("none", 8, "do-acp", "score").label == "do-acp-none-k8-score"


def test_plans_that_make_the_same_student_share_one_evaluation() -> None:
    plans = [
        plan(),
        plan(weights=[[7.0], [0.25, 0.75]]),  # a group of one has no shares, and shares have no size
        plan(scores=[1.0, 2.0, 3.0, 4.0]),  # for the record only
        plan(weights=[[0.3], [3.0, 1.0]]),
        plan(scales=[0.5, 0.25]),
        plan(shared_scale=0.5),
        plan(groups=[[0], [1, 3]]),
        plan(scales=[0.5, 0.25]),
    ]
    assert distinct(plans) == [0, 0, 0, 3, 4, 5, 6, 4]
