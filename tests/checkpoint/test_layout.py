"""The plan of the output files: shard sizes, order, and that nothing but names, shapes and sizes decides them."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from burnish.checkpoint import PlannedTensor, plan_shards
from burnish.checkpoint.layout import index_json, natural_key

parts = st.lists(st.sampled_from(["layers", ".", "1", "01", "2", "10", "²", "a", "b.", "_"]), min_size=1, max_size=5)
planned = st.builds(
    PlannedTensor, parts.map("".join), st.sampled_from(["F32", "BF16", "U8"]), st.tuples(st.integers(0, 40))
)
plans = st.lists(planned, min_size=1, max_size=25, unique_by=lambda tensor: tensor.name)


def tensors_of(*sizes: int) -> list[PlannedTensor]:
    return [PlannedTensor(f"layers.{number}", "U8", (size,)) for number, size in enumerate(sizes)]


def sizes_of(*sizes: int, limit: int) -> list[list[int]]:
    return [[tensor.nbytes for tensor in shard.tensors] for shard in plan_shards(tensors_of(*sizes), limit)]


def test_shards_are_filled_up_to_the_limit_and_not_a_byte_more() -> None:
    assert sizes_of(4, 6, 1, limit=10) == [[4, 6], [1]]
    assert sizes_of(4, 7, 1, limit=10) == [[4], [7, 1]]
    assert sizes_of(4, 6, limit=10) == [[4, 6]]


def test_a_tensor_above_the_limit_is_alone_in_its_shard() -> None:
    assert sizes_of(1, 50, 1, 1, limit=10) == [[1], [50], [1, 1]]
    assert sizes_of(50, limit=10) == [[50]]


def test_files_are_named_as_transformers_names_them() -> None:
    assert [shard.file for shard in plan_shards(tensors_of(1, 1), 10)] == ["model.safetensors"]
    assert [shard.file for shard in plan_shards([], 10)] == ["model.safetensors"]
    assert [shard.file for shard in plan_shards(tensors_of(9, 9, 9), 10)] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_layers_are_ordered_as_numbers() -> None:
    names = ["model.layers.10.w", "model.layers.9.w", "model.layers.2.w", "model.embed", "lm_head", "model.layers.2.a"]
    (shard,) = plan_shards([PlannedTensor(name, "U8", (1,)) for name in names], 100)
    assert [tensor.name for tensor in shard.tensors] == [
        "lm_head", "model.embed", "model.layers.2.a", "model.layers.2.w", "model.layers.9.w", "model.layers.10.w"
    ]  # fmt: skip
    assert natural_key("a.2.b") < natural_key("a.10.a") < natural_key("b")


def test_u12_1_names_that_differ_only_in_leading_zeros_have_one_order() -> None:
    one, other = PlannedTensor("layers.1.w", "U8", (1,)), PlannedTensor("layers.01.w", "U8", (1,))
    assert plan_shards([one, other], 100) == plan_shards([other, one], 100)


def test_a_name_planned_twice_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tensor layers\.0 is planned twice"):
        plan_shards([*tensors_of(1, 2), *tensors_of(3)], 100)


@given(plans, st.integers(1, 200), st.randoms(use_true_random=False))
def test_u12_1_plan_does_not_depend_on_the_order_of_the_input(
    tensors: list[PlannedTensor], limit: int, generator: random.Random
) -> None:
    shards = plan_shards(tensors, limit)
    assert plan_shards(generator.sample(tensors, len(tensors)), limit) == shards
    assert sorted((tensor for shard in shards for tensor in shard.tensors), key=lambda t: t.name) == sorted(
        tensors, key=lambda t: t.name
    )
    for shard in shards:
        assert shard.nbytes <= limit or len([t for t in shard.tensors if t.nbytes]) == 1
    for left, right in itertools.pairwise(shards):
        assert left.nbytes + right.tensors[0].nbytes > limit  # no shard was closed too early


@given(plans, st.integers(1, 200))
def test_index_lists_every_tensor_once_with_its_file_and_the_total(tensors: list[PlannedTensor], limit: int) -> None:
    shards = plan_shards(tensors, limit)
    index = index_json(shards)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors)}
    assert index["weight_map"] == {tensor.name: shard.file for shard in shards for tensor in shard.tensors}


def test_headers_are_readable_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = [PlannedTensor(f"layers.{i}.weight", "BF16", (i, 3)) for i in range(12)]
    shards = plan_shards(tensors, 100)
    assert len(shards) > 2
    found = {}
    for shard in shards:
        (tmp_path / shard.file).write_bytes(shard.header() + bytes(shard.nbytes))
        with safe_open(tmp_path / shard.file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        tensor.name: (torch.bfloat16, tensor.shape) for tensor in tensors
    }


def test_u12_1_plan_does_not_depend_on_string_hashing() -> None:
    program = (
        "import json; from burnish.checkpoint import PlannedTensor, plan_shards\n"
        "names = {f'layers.{i}.{part}' for i in range(20) for part in ('gate', 'up', 'down')}\n"
        "shards = plan_shards([PlannedTensor(name, 'F32', (5,)) for name in names], 100)\n"
        "print(json.dumps([list(names), [shard.header().decode('latin1') for shard in shards]]))"
    )
    outputs = []
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(json.loads(done.stdout))
    assert outputs[0][0] != outputs[1][0]  # the sets were iterated in different orders
    assert outputs[0][1] == outputs[1][1]
