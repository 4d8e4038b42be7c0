"""Sizes: counts against the classes themselves, the search for a number of parameters, and what cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.checkpoint import Checkpoint, TensorInfo
from burnish.checkpoint.tensors import num_bytes
from burnish.families import resolve_config
from burnish.families.outline import class_tensors
from burnish.prune import Sizes
from burnish.prune.cut import describe_student
from burnish.prune.layout import DenseModel
from burnish.prune.target import exact_sizes, sizes_for, step_of

QWEN3_32B = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def model_of(raw: dict[str, Any]) -> DenseModel:
    """A model without weights."""
    shapes = class_tensors(resolve_config(raw))
    tensors = {n: TensorInfo(n, "BF16", s, Path("none"), 0, num_bytes("BF16", s)) for n, s in shapes.items()}
    return DenseModel.understand(Checkpoint("none", Path("none"), raw, tensors))


SMALL_QWEN3 = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 96, "tie_word_embeddings": True,
}  # fmt: skip
BIG, LLAMA, SMALL = model_of(QWEN3_32B), model_of(LLAMA_7B), model_of(SMALL_QWEN3)


def test_the_dense_to_dense_student_of_qwen3_32b_to_the_parameter() -> None:
    assert BIG.num_parameters() == 32_762_123_264
    target = exact_sizes(BIG.sizes, layers=48, hidden_size=2048, intermediate_size=6144, heads=32)
    assert target.kv_heads == 8
    student = describe_student(BIG, target)
    assert BIG.num_parameters(target) == 3_441_113_088 == student.nbytes // 2
    assert {tensor.name: tensor.shape for tensor in student.tensors} == class_tensors(student.config)


def test_a_stored_copy_of_a_tied_head_is_dropped_and_not_counted(tmp_path: Path) -> None:
    tied = model_of({**QWEN3_32B, "tie_word_embeddings": True})
    assert BIG.num_parameters() - tied.num_parameters() == 151936 * 5120


@pytest.mark.parametrize("wanted", [16 * 10**9, 8 * 10**9, 3_441_113_088, 10**9, 3 * 10**8, 10**8])
def test_found_sizes_fit_and_one_more_step_of_the_feed_forward_would_not(wanted: int) -> None:
    sizes = sizes_for(BIG, wanted)
    wider = sizes.model_copy(update={"intermediate_size": sizes.intermediate_size + 64})
    assert BIG.num_parameters(sizes) <= wanted
    assert wider.intermediate_size > BIG.sizes.intermediate_size or BIG.num_parameters(wider) > wanted
    assert BIG.num_parameters(sizes) > 0.97 * wanted or sizes.intermediate_size == BIG.sizes.intermediate_size
    assert sizes.hidden_size % 256 == 0 and sizes.intermediate_size % 64 == 0 and sizes.kv_heads == 8
    assert sizes.heads % 8 == 0
    exact_sizes(BIG.sizes, **sizes.model_dump())


def test_all_dimensions_shrink_together() -> None:
    """Half of every dimension is what the search finds for the count of half of every dimension."""
    half = Sizes(layers=32, hidden_size=2560, intermediate_size=12800, heads=32, kv_heads=8)
    assert sizes_for(BIG, BIG.num_parameters(half)) == half
    assert sizes_for(BIG, BIG.num_parameters()) == BIG.sizes


@pytest.mark.parametrize(
    ("model", "channels", "neurons", "wanted"),
    [
        (BIG, 256, 64, [500_000_000, 2_700_000_000, 9_876_543_210, 21_000_000_000]),
        (SMALL, 4, 1, [*range(8_000, 18_000, 250)]),
    ],
    ids=["big", "small"],
)
def test_the_factor_is_the_largest_that_fits(model: DenseModel, channels: int, neurons: int, wanted: list[int]) -> None:
    """Against a search over a fine grid of factors, and one over all widths."""
    source = model.sizes

    def rounded(count: int, factor: float) -> int:
        return max(1, math.floor(count * factor + 0.5))

    def at(factor: float) -> Sizes:
        return Sizes(
            layers=rounded(source.layers, factor),
            hidden_size=channels * rounded(source.hidden_size // channels, factor),
            intermediate_size=neurons * rounded(source.intermediate_size // neurons, factor),
            heads=source.kv_heads * rounded(source.group, factor),
            kv_heads=source.kv_heads,
        )

    grid = [at(step / 9600) for step in range(9600, 0, -1)]
    for count in wanted:
        best = next(sizes for sizes in grid if model.num_parameters(sizes) <= count)
        widths = range(best.intermediate_size, source.intermediate_size + 1, neurons)
        filled = (best.model_copy(update={"intermediate_size": width}) for width in widths)
        expected = [sizes for sizes in filled if model.num_parameters(sizes) <= count][-1]
        assert sizes_for(model, count) == expected, count


def test_heads_with_keys_of_their_own_shrink_with_them_where_the_class_allows_it() -> None:
    for parameters in range(10**9, 6 * 10**9, 10**8):
        sizes = sizes_for(LLAMA, parameters)
        assert sizes.heads == sizes.kv_heads < 32
        assert sizes.hidden_size % sizes.heads == 0  # transformers has no other Llama
    assert LLAMA.refusal(sizes.model_copy(update={"heads": 7, "kv_heads": 7})) is not None


@settings(deadline=None, max_examples=40)
@given(st.integers(10**8, 32_762_123_264))
def test_more_parameters_never_give_a_smaller_model(wanted: int) -> None:
    less, more = sizes_for(BIG, wanted), sizes_for(BIG, min(2 * wanted, BIG.num_parameters()))
    assert BIG.num_parameters(less) <= wanted and BIG.num_parameters(less) <= BIG.num_parameters(more)
    assert less.layers <= more.layers and less.hidden_size <= more.hidden_size and less.heads <= more.heads


def test_counts_that_cannot_be_reached_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"parameters=32,762,123,265, but the model has 32,762,123,264: choose fewer"):
        sizes_for(BIG, 32_762_123_265)
    smallest = Sizes(layers=1, hidden_size=256, intermediate_size=64, heads=8, kv_heads=8)
    count = BIG.num_parameters(smallest)
    assert sizes_for(BIG, count).hidden_size == 256
    with pytest.raises(ValueError, match=rf"cannot be reached: the smallest sizes \(1 layers.*have {count:,}"):
        sizes_for(BIG, count - 1)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"layers": 65}, r"layers=65, but the model has 64: choose 1\.\.64"),
        ({"hidden_size": 0}, r"hidden_size=0, but the model has 5120: choose 1\.\.5120"),
        ({"intermediate_size": 25601}, "intermediate_size=25601, but the model has 25600"),
        ({"heads": 30}, "heads=30 cannot be shared by 8 key-value heads"),
        (
            {"heads": 64, "kv_heads": 4},
            "heads=64 for kv_heads=4 is 16 a group, but the model has 8: choose heads <= 32",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        exact_sizes(BIG.sizes, **sizes)


def test_steps_divide_the_size() -> None:
    assert [step_of(size, largest=256, parts=8) for size in (5120, 4096, 2880, 128, 7)] == [256, 256, 64, 16, 1]
