"""The statistics record: exact merging, chunk and order invariance, Gram properties, file round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.densify.statistics import LayerStatistics, RoutingStatistics, add_sums, output_sums, router_sums
from burnish.errors import CheckpointError
from tests.densify.records import gates_of, random_layer


def raw(seed: int = 0, tokens: int = 60, num_experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits, torch.randn(num_experts, tokens, 7, generator=generator, dtype=torch.float64)


def sums(logits: torch.Tensor, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    gates, selected = gates_of(logits.softmax(-1))
    return router_sums(logits, logits.softmax(-1), gates, selected) | output_sums(outputs, gates, selected)


def test_sums_do_not_depend_on_chunks_or_order() -> None:
    logits, outputs = raw()
    whole = sums(logits, outputs)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 59):
        parts = [sums(logits[order[i : i + size]], outputs[:, order[i : i + size]]) for i in range(0, 60, size)]
        for name, value in add_sums(parts).items():
            torch.testing.assert_close(value, whole[name], atol=1e-9, rtol=1e-12)


def test_gram_is_symmetric_positive_and_has_the_squared_norms_on_its_diagonal() -> None:
    logits, outputs = raw()
    gram = sums(logits, outputs)["gram"]
    torch.testing.assert_close(gram, gram.mT)
    assert float(torch.linalg.eigvalsh(gram).min()) > -1e-9
    torch.testing.assert_close(gram.diagonal(), outputs.square().sum(dim=(1, 2)))


def test_cross_moments_and_energy_are_those_of_the_mixture() -> None:
    logits, outputs = raw()
    gates, _ = gates_of(logits.softmax(-1))
    block = torch.einsum("te,eth->th", gates, outputs)
    found = sums(logits, outputs)
    torch.testing.assert_close(found["cross"], (outputs * block).sum(dim=(1, 2)))
    torch.testing.assert_close(found["output_energy"], block.square().sum())


def test_statistics_are_float64_and_counts_int64_whatever_the_model_computes_in() -> None:
    logits, outputs = raw()
    gates, selected = gates_of(logits.softmax(-1))
    found = router_sums(logits.bfloat16(), logits.softmax(-1).bfloat16(), gates.float(), selected)
    found |= output_sums(outputs.bfloat16(), gates.float(), selected)
    for name, value in found.items():
        assert value.dtype == (torch.int64 if name in ("counts", "num_tokens") else torch.float64), name


def test_merging_is_exact_and_equals_one_pass() -> None:
    logits, outputs = raw()
    first = RoutingStatistics({0: LayerStatistics(**sums(logits[:25], outputs[:, :25]))})
    second = RoutingStatistics({0: LayerStatistics(**sums(logits[25:], outputs[:, 25:]))})
    merged, whole = first + second, LayerStatistics(**sums(logits, outputs))
    assert merged.num_tokens == 60
    for name, value in merged.layers[0].tensors().items():
        torch.testing.assert_close(value, whole.tensors()[name], atol=1e-9, rtol=1e-12)
    swapped = second + first
    assert all(torch.equal(a, b) for a, b in zip(
        merged.layers[0].tensors().values(), swapped.layers[0].tensors().values(), strict=True))  # fmt: skip


def test_records_of_different_kinds_do_not_merge() -> None:
    full = random_layer()
    router_only = LayerStatistics(**{k: v for k, v in full.tensors().items() if k not in ("gram", "cross")})
    with pytest.raises(ValueError, match="differ in kind"):
        full + router_only
    with pytest.raises(ValueError, match="different layers"):
        RoutingStatistics({0: full}) + RoutingStatistics({1: full})


def test_file_round_trip_is_exact(tmp_path: Path) -> None:
    stats = RoutingStatistics({2: random_layer(seed=1), 10: random_layer(seed=2)})
    stats.save(tmp_path / "s.safetensors")
    loaded = RoutingStatistics.load(tmp_path / "s.safetensors")
    assert list(loaded.layers) == [2, 10]
    for layer, record in stats.layers.items():
        for name, value in record.tensors().items():
            assert torch.equal(loaded.layers[layer].tensors()[name], value), name


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no routing statistics"):
        RoutingStatistics.load(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        RoutingStatistics.load(tmp_path / "missing.safetensors")


def test_u9_4_unused_experts_are_named() -> None:
    stats = random_layer()
    counts = stats.counts.clone()
    counts[3] = 0
    record = RoutingStatistics({4: LayerStatistics(**stats.tensors() | {"counts": counts})})
    assert (4, 3) in record.unused_experts()
