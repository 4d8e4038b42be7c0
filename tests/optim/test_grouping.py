"""Every number of a tensor is in one block, with its neighbours of the same neuron; written out by loops here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.optim.grouping import Grouping, group_coordinates


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def chunks(neurons: list[list[int]], size: int) -> list[list[int]]:
    return [neuron[start : start + size] for neuron in neurons for start in range(0, len(neuron), size)]


def neurons_by_loops(shape: tuple[int, ...], rule: str, *, kernel: bool, transposed: bool) -> list[list[int]]:
    """Positions, in the tensor as it is stored, of the weights of each neuron, in the order of their chunks."""
    at = numbered(shape)
    if rule == "fixed":
        return [at.flatten().tolist()]
    if rule == "diagonal":
        return [[number] for number in at.flatten().tolist()]
    if kernel:
        ahead, behind, *space = shape
        if rule == "filter":
            return [at[o, i].flatten().tolist() for o in range(ahead) for i in range(behind)]
        if (rule == "output") != transposed:
            return [at[o].flatten().tolist() for o in range(ahead)]
        places = itertools.product(range(behind), *(range(length) for length in space))
        return [[int(at[(o, *place)]) for o in range(ahead)] for place in places]
    *stack, rows, columns = shape
    found = []
    for index in itertools.product(*(range(length) for length in stack)):
        if (rule == "output") != transposed:
            found += [[int(at[(*index, o, i)]) for i in range(columns)] for o in range(rows)]
        else:
            found += [[int(at[(*index, o, i)]) for o in range(rows)] for i in range(columns)]
    return found


@pytest.mark.parametrize("rule", ["input", "output", "filter", "fixed", "diagonal"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((6, 4), False), ((5, 7), False), ((3, 5, 4), False), ((3, 5, 4), True), ((4, 3, 2, 3), True), ((1, 6), False)],
)
def test_blocks_are_chunks_of_neurons(
    rule: str, transposed: bool, size: int, shape: tuple[int, ...], kernel: bool
) -> None:
    if rule == "filter" and not kernel:
        with pytest.raises(ValueError, match="is no kernel: choose input, output or auto"):
            group_coordinates(shape, rule, size, kernel=kernel)
        return
    grouping = group_coordinates(shape, rule, size, remainder="smaller", kernel=kernel, transposed=transposed)
    neurons = neurons_by_loops(shape, rule, kernel=kernel, transposed=transposed)
    expected = chunks(neurons, len(neurons[0]) if rule == "filter" else size)
    found = [block.tolist() for part in grouping.gather(numbered(shape)) for block in part]
    assert sorted(found) == sorted(expected)
    longest = [block for block in expected if len(block) == grouping.block]
    assert found[: len(longest)] == longest, "whole blocks come first, in the order of their neurons"


def test_the_trap_of_the_paper_s_code_is_refused_or_cut() -> None:
    """Its chunks of 3 of 5 outputs went on into the next input: [9, 12, 1] has numbers of two columns."""
    with pytest.raises(ValueError, match=r"block_size=3 does not divide the 5 weights of one input of fc \[5, 3\]"):
        group_coordinates((5, 3), "input", 3, name="fc")
    parts = group_coordinates((5, 3), "input", 3, remainder="smaller").gather(numbered((5, 3)))
    assert parts[0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert parts[1].tolist() == [[9, 12], [10, 13], [11, 14]]


@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    rule=st.sampled_from(["auto", "input", "output", "fixed", "diagonal"]),
    size=st.integers(1, 9),
    kernel=st.booleans(),
    transposed=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_number_is_in_one_block_and_comes_back(
    shape: tuple[int, ...], rule: str, size: int, kernel: bool, transposed: bool
) -> None:
    grouping = group_coordinates(shape, rule, size, remainder="smaller", kernel=kernel, transposed=transposed)
    tensor = numbered(shape)
    parts = grouping.gather(tensor)
    assert sorted(number for part in parts for number in part.flatten().tolist()) == list(range(math.prod(shape)))
    assert [tuple(part.shape) for part in parts] == list(grouping.parts)
    assert torch.equal(grouping.scatter(parts), tensor)
    assert grouping.numbers(lambda length: length) == math.prod(shape)
    assert grouping.numbers(lambda length: 2) == 2 * sum(len(part) for part in parts)


def test_transposed_storage_has_the_blocks_of_the_transposed_tensor() -> None:
    stored = group_coordinates((4, 6), "input", 3, transposed=True).gather(numbered((6, 4)).T)
    assert torch.equal(stored[0], group_coordinates((6, 4), "input", 3).gather(numbered((6, 4)))[0])


@pytest.mark.parametrize(
    ("shape", "kernel", "rule", "block"),
    [
        ((8, 6), False, "input", 4),
        ((2, 8, 6), False, "input", 4),
        ((8, 6, 5), True, "filter", 5),
        ((8, 6, 3, 3), True, "filter", 9),
        ((8, 6, 5, 5), True, "filter", 25),
        ((8, 6, 1, 1), True, "diagonal", 1),
        ((8, 6, 7, 7), True, "diagonal", 1),
        ((8,), False, "diagonal", 1),
        ((), False, "diagonal", 1),
        ((3, 6), False, "input", 3),
    ],
)
def test_automatic_grouping(shape: tuple[int, ...], kernel: bool, rule: str, block: int) -> None:
    """Matrices by input, slices of kernels whole up to 32 numbers, the others alone; a short neuron is a block."""
    found = group_coordinates(shape, "auto", 4, kernel=kernel)
    assert found == group_coordinates(shape, rule, 4, kernel=kernel) and found.block == block


def test_a_large_slice_is_a_block_when_asked_for() -> None:
    assert group_coordinates((2, 3, 7, 7), "filter", 4).block == 49


def test_vectors_have_no_neurons_but_can_be_cut() -> None:
    assert {group_coordinates((6,), rule, 3).block for rule in ("input", "output", "filter", "diagonal")} == {1}
    assert group_coordinates((6,), "fixed", 3).parts == ((2, 3),)
    assert group_coordinates((2, 3), "fixed", 6) == Grouping((2, 3), (0, 1), 6, 6)


def test_parts_of_a_flat_tensor_are_views() -> None:
    grouping = group_coordinates((5, 2), "input", 3, remainder="smaller")
    flat = torch.zeros(26)
    whole, rest = grouping.split(flat, lambda size: size**2)
    assert whole.shape == (2, 9) and rest.shape == (2, 4)
    whole.fill_(1.0)
    rest.fill_(2.0)
    assert flat.tolist() == [1.0] * 18 + [2.0] * 8


@pytest.mark.parametrize(
    ("shape", "rule", "size", "message"),
    [
        ((64, 32), "input", 10, "block_size=10 does not divide the 64 weights of one input of .* choose 8 or 16, or"
         " pass remainder='smaller'"),
        ((64, 30), "output", 7, "block_size=7 does not divide the 30 weights of one output of .* choose 6 or 10"),
        ((7, 1), "fixed", 4, "block_size=4 does not divide the 7 numbers of .* choose 1 or 7"),
        ((4096, 2), "input", 2048, "block_size=2048: .* of that size: choose at most 1024"),
        ((1, 2, 40, 40), "filter", 4, "block_size=1600: .* of that size: choose at most 1024"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, ...], rule: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        group_coordinates(shape, rule, size)
    assert "\n" not in str(caught.value)
