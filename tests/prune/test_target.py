"""Sizes: counts against the classes themselves, the search for a number of parameters, and what cannot be."""

from __future__ import annotations

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
from burnish.prune.target import exact_sizes, parse_count, sizes_for, step_of

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


BIG, LLAMA = model_of(QWEN3_32B), model_of(LLAMA_7B)


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


@pytest.mark.parametrize("parameters", ["16B", "8B", "3_441_113_088", "1B", "300M", "100M"])
def test_found_sizes_fit_and_one_more_step_of_the_feed_forward_would_not(parameters: str) -> None:
    wanted = parse_count(parameters)
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


def test_heads_with_keys_of_their_own_shrink_with_them_where_the_class_allows_it() -> None:
    sizes = sizes_for(LLAMA, parse_count("3B"))
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


def test_numbers_of_parameters() -> None:
    counts = {"1.5B": 1_500_000_000, "350m": 350_000_000, "1_246_592": 1_246_592, 7: 7, " 2 K ": 2000, "0.0015M": 1500}
    assert {text: parse_count(text) for text in counts} == counts
    for text in ("", "B", "-1B", "0", "1.5", "1e9", "1.5GB", "0.0001K"):
        with pytest.raises(ValueError, match=r"expected a number such as 1\.5B"):
            parse_count(text)


def test_steps_divide_the_size() -> None:
    assert [step_of(size, largest=256, parts=8) for size in (5120, 4096, 2880, 128, 7)] == [256, 256, 64, 16, 1]
