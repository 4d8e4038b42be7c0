"""The record: merging two is exact, and a file gives back what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.errors import CheckpointError
from burnish.prune import ActivationStatistics, LayerStatistics
from burnish.prune.statistics import cosine_sum, magnitude_squares


def layer(sequences: slice = slice(None), hidden: int = 8) -> LayerStatistics:
    generator = torch.Generator().manual_seed(0)
    sizes = {"neurons": 12, "head_channels": 16, "attention_channels": hidden, "feed_forward_channels": hidden}
    live = (torch.rand(6, 10, generator=generator) > 0.2)[sequences]
    seen = {name: torch.randn(6, 10, size, generator=generator)[sequences] for name, size in sizes.items()}
    return LayerStatistics(
        num_sequences=live.any(dim=1).sum(),
        num_tokens=live.sum(),
        cosine_sum=cosine_sum(seen["attention_channels"], seen["feed_forward_channels"], live),
        **{name: magnitude_squares(activations, live) for name, activations in seen.items()},
    )


def test_merging_equals_one_pass_and_does_not_depend_on_the_order() -> None:
    first, second = (ActivationStatistics({3: layer(part)}) for part in (slice(0, 2), slice(2, 6)))
    merged, swapped, whole = first + second, second + first, layer()
    assert merged.num_tokens == int(whole.num_tokens) and int(merged.layers[3].num_sequences) == 6
    for name, value in merged.layers[3].tensors().items():
        assert torch.equal(value, swapped.layers[3].tensors()[name]), name
        torch.testing.assert_close(value, whole.tensors()[name], rtol=1e-14, atol=1e-14)


def test_sums_are_float64_and_counts_int64() -> None:
    for name, value in layer().tensors().items():
        assert value.dtype == (torch.int64 if name.startswith("num_") else torch.float64), name


def test_records_of_other_sizes_or_layers_do_not_merge() -> None:
    with pytest.raises(ValueError, match="differ in kind"):
        layer() + layer(hidden=1)
    with pytest.raises(ValueError, match="different layers"):
        ActivationStatistics({0: layer()}) + ActivationStatistics({1: layer()})


def test_file_round_trip_is_exact_over_one_file_or_several(tmp_path: Path) -> None:
    whole = ActivationStatistics({2: layer(), 10: layer(slice(0, 3))})
    whole.save(tmp_path / "s.safetensors")
    for index, sums in whole.layers.items():
        ActivationStatistics({index: sums}).save(tmp_path / f"{index}.safetensors")
    for files in (["s"], ["10", "2"]):
        loaded = ActivationStatistics.load(*(tmp_path / f"{name}.safetensors" for name in files))
        assert list(loaded.layers) == [2, 10]
        for index, sums in whole.layers.items():
            for name, value in sums.tensors().items():
                assert torch.equal(loaded.layers[index].tensors()[name], value), name


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: holds no activation statistics"):
        ActivationStatistics.load(tmp_path / "x.safetensors")
