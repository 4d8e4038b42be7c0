"""Blocks and their turns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from burnish.optim.blocks import BlockSchedule, derived_seed, embedding_tensors, partition


class Decoder(nn.Module):
    """Embedding, two layers, a norm and a head, named as decoders name them."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, 4)
        self.model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2)])
        self.model.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 11, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def split(model: nn.Module, **options: object) -> list[tuple[str, list[str], int]]:
    names, tensors = zip(*model.named_parameters(), strict=True)
    found = partition(names, tensors, embeddings=embedding_tensors(model), **options)  # type: ignore[arg-type]
    return [(block.name, [names[index] for index in block.tensors], block.size) for block in found]


LAYER_NAMES = [
    f"model.layers.{layer}.{part}.{kind}" for layer in (0, 1) for part in (0, 1) for kind in ("weight", "bias")
]


def test_a_layer_is_a_block_and_the_rest_stays_frozen() -> None:
    assert split(Decoder()) == [
        ("model.layers.0", LAYER_NAMES[:4], 58),
        ("model.layers.1", LAYER_NAMES[4:], 58),
    ]


def test_embedding_and_head_are_blocks_when_asked_for() -> None:
    found = split(Decoder(), include_embedding=True, include_head=True)
    assert [name for name, *_ in found] == ["model.layers.0", "model.layers.1", "embedding", "head"]
    assert found[2][1] == ["model.embed_tokens.weight"]
    assert found[3][1] == ["model.norm.weight", "model.norm.bias", "lm_head.weight"]


def test_a_tied_head_is_the_embedding() -> None:
    assert split(Decoder(tied=True), include_head=True)[-1][1] == ["model.norm.weight", "model.norm.bias"]


def test_names_tell_embeddings_where_there_is_no_model() -> None:
    names = ["wte.weight", "model.embed_tokens.weight", "h.0.weight", "h.1.weight", "ln_f.weight"]
    found = partition(names, [torch.zeros(2) for _ in range(5)], include_head=True)
    assert [block.name for block in found] == ["h.0", "h.1", "head"]


def test_the_outermost_number_is_the_layer() -> None:
    """Experts and adapters are numbered or named inside of a layer."""
    names = ["m.layers.3.mlp.experts.7.w", "m.layers.3.q.lora_A.default.weight", "m.layers.10.w", "0.weight"]
    assert [b.name for b in partition(names, [torch.zeros(1)] * 4)] == ["m.layers.3", "m.layers.10", "0"]


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 8), (30, [2, 3, 2, 1]), (58, [4, 4]), (10**6, [8])])
def test_blocks_by_size_hold_whole_consecutive_tensors(size: int, expected: list[int]) -> None:
    found = split(Decoder(), blocks=size)
    assert [len(names) for _, names, _ in found] == expected
    assert [name for _, names, _ in found for name in names] == LAYER_NAMES
    assert all(elements >= size for *_, elements in found[:-1])


def test_blocks_by_pattern() -> None:
    found = split(Decoder(), blocks=["model.layers.1.*", ["lm_head.weight", "*norm*"]])
    assert [names for _, names, _ in found] == [
        LAYER_NAMES[4:],
        ["model.norm.weight", "model.norm.bias", "lm_head.weight"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, r"blocks=0: expected 1 element or more"),
        ({"blocks": ["layers.0.*"]}, r"blocks\[0\]: 'layers.0.\*' matches no tensor, such as 'model.embed_tokens"),
        ({"blocks": ["model.layers.*", "*.0.0.weight"]}, r"layers.0.0.weight is in two blocks, by 'model.layers.\*'"),
    ],
)
def test_bad_blocks(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(Decoder(), **options)


def test_a_model_without_layers_needs_blocks() -> None:
    with pytest.raises(ValueError, match="give blocks a size in elements, or name patterns"):
        split(nn.Linear(3, 2))


def test_every_block_once_in_a_block_epoch_and_interval_steps_each() -> None:
    """Oracle 2 of the method."""
    schedule = BlockSchedule(5, "random", interval=3, seed=4)
    turns = [schedule.block(step) for step in range(5 * 3 * 4)]
    for epoch in range(4):
        part = turns[epoch * 15 : (epoch + 1) * 15]
        assert Counter(part) == dict.fromkeys(range(5), 3)
        assert all(len(set(part[start : start + 3])) == 1 for start in range(0, 15, 3))
        assert part[::3] == schedule.permutation(epoch)[::-1]
    assert len({tuple(schedule.permutation(epoch)) for epoch in range(4)}) > 1
    assert turns != [BlockSchedule(5, "random", 3, seed=5).block(step) for step in range(60)]


def test_ascending_and_descending() -> None:
    assert [BlockSchedule(3, "ascending", 1).block(step) for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [BlockSchedule(3, "descending", 2).block(step) for step in range(7)] == [2, 2, 1, 1, 0, 0, 2]


def test_one_block_has_one_turn() -> None:
    schedule = BlockSchedule(1, "random", 2)
    assert {schedule.turn(step) for step in range(9)} == {0} and {schedule.block(step) for step in range(9)} == {0}
    assert [BlockSchedule(2, "ascending", 2).turn(step) for step in range(5)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"order": "acending"}, "order='acending': choose one of"), ({"interval": 0}, "interval=0")],
)
def test_bad_schedule(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSchedule(3, **options)  # type: ignore[arg-type]


def test_derived_seeds_differ_and_stay() -> None:
    seeds = [derived_seed(seed, step) for seed in range(50) for step in range(50)]
    assert len(set(seeds)) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)


def test_blocks_follow_the_model_not_the_groups() -> None:
    """Groups list matrices first; a layer of one-dimensional tensors stays where it is."""
    names = ["enc.0.w", "enc.2.w", "dec.0.w", "enc.1.b", "enc.10.b", "enc.0.b"]
    found = partition(names, [torch.zeros(1) for _ in names])
    assert [block.name for block in found] == ["enc.0", "enc.1", "enc.2", "enc.10", "dec.0"]
    assert found[0].tensors == (0, 5)
