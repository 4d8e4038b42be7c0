"""Reading checkpoints: the same values as `safetensors`, only the bytes that are asked for, and named refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.checkpoint import Checkpoint, dtype_name
from burnish.checkpoint.source import COPY_BYTES, INDEX_FILE
from burnish.errors import CheckpointError

Save = Callable[..., Path]


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "scalar": torch.tensor(3.5),
        "matrix": torch.randn(6, 4, generator=generator),
        "experts": torch.randn(5, 4, 3, generator=generator).bfloat16(),
        "half": torch.randn(7, generator=generator).half(),
        "ids": torch.arange(10).view(2, 5),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "packed": torch.randint(0, 256, (2, 3), dtype=torch.uint8, generator=generator),
    }


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a checkpoint: `save({"name": tensor})` as one file, or sharded by `save(first, second)`."""

    def write(*shards: dict[str, torch.Tensor]) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "any"}')
        if len(shards) == 1:
            save_file(shards[0], directory / "model.safetensors")
            return directory
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, directory / file)
            weight_map |= dict.fromkeys(shard, file)
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory

    return write


def edit_index(directory: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_is_what_the_safetensors_library_loads(sharded: bool, save: Save) -> None:
    tensors = values()
    names = list(tensors)
    shards = [{name: tensors[name] for name in part} for part in ((names[::2], names[1::2]) if sharded else (names,))]
    directory = save(*shards)
    checkpoint = Checkpoint.open(directory)
    loaded = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert checkpoint.tensors.keys() == loaded.keys() == tensors.keys()
    for name, expected in loaded.items():
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
        assert checkpoint.info(name).dtype == dtype_name(expected.dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.nbytes == checkpoint.bytes_read == total
    assert checkpoint.config == {"model_type": "any"}


def test_u1_4_a_slice_reads_its_own_bytes_and_no_others(save: Save) -> None:
    experts = values()["experts"]
    checkpoint = Checkpoint.open(save({"before": torch.ones(3), "experts": experts, "zafter": torch.ones(3)}))
    cases = [
        ({"index": 2}, experts[2], 4 * 3 * 2),
        ({"index": 0, "rows": slice(1, 3)}, experts[0, 1:3], 2 * 3 * 2),
        ({"index": 4, "rows": slice(3, 4)}, experts[4, 3:4], 3 * 2),
        ({"rows": slice(1, 4)}, experts[1:4], 3 * 4 * 3 * 2),
        ({"rows": slice(3, 99)}, experts[3:], 2 * 4 * 3 * 2),
        ({"rows": slice(2, 2)}, experts[2:2], 0),
    ]
    for arguments, expected, num_bytes in cases:
        before = checkpoint.bytes_read
        assert torch.equal(checkpoint.read("experts", **arguments), expected), arguments
        assert checkpoint.bytes_read - before == num_bytes, arguments


def test_u1_4_bytes_outside_the_slice_are_not_even_looked_at(save: Save) -> None:
    experts = values()["experts"]
    experts[3] = torch.nan
    checkpoint = Checkpoint.open(save({"experts": experts}))
    assert torch.equal(checkpoint.read("experts", 2), experts[2])
    with pytest.raises(CheckpointError, match="NaN"):
        checkpoint.read("experts", 3)


@pytest.mark.parametrize("index", [-1, 5, 100])
def test_a_slice_that_does_not_exist_is_refused_and_not_read_from_the_next_tensor(index: int, save: Save) -> None:
    checkpoint = Checkpoint.open(save({"experts": values()["experts"], "next": torch.ones(1000)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor experts has 5 slices: .* {index}$"):
        checkpoint.read("experts", index)
    assert checkpoint.bytes_read == 0


def test_chunks_are_the_bytes_of_the_tensor_in_pieces(save: Save) -> None:
    large = torch.arange(COPY_BYTES // 4 * 2 + 5, dtype=torch.int32)
    tensors = {**values(), "large": large}
    checkpoint = Checkpoint.open(save(tensors))
    for name, tensor in tensors.items():
        pieces = [bytes(piece) for piece in checkpoint.chunks(name)]
        assert b"".join(pieces) == tensor.view(-1).view(torch.uint8).numpy().tobytes()
    assert [len(piece) for piece in checkpoint.chunks("large")] == [COPY_BYTES, COPY_BYTES, 20]
    assert checkpoint.bytes_read == checkpoint.nbytes + large.nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 17, -1])
def test_a_value_that_is_not_finite_is_refused_with_file_and_tensor(
    value: float, dtype: torch.dtype, position: int, save: Save
) -> None:
    weight = torch.ones(5, 8, dtype=dtype)
    weight.view(-1)[position] = value
    checkpoint = Checkpoint.open(save({"fine": torch.ones(2), "weight": weight}))
    for read in (checkpoint.read, lambda name: list(checkpoint.chunks(name))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor weight has NaN or infinite values"):
            read("weight")
        read("fine")


def test_a_file_that_shrinks_while_it_is_read_is_refused(save: Save) -> None:
    directory = save({"weight": torch.ones(100)})
    checkpoint = Checkpoint.open(directory)
    with (directory / "model.safetensors").open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated while reading tensor weight"):
        checkpoint.read("weight")
    with pytest.raises(CheckpointError, match="truncated while reading tensor weight"):
        list(checkpoint.chunks("weight"))


def test_a_missing_tensor_is_named(save: Save) -> None:
    with pytest.raises(CheckpointError, match="tensor lm_head is missing"):
        Checkpoint.open(save({"weight": torch.ones(1)})).info("lm_head")


def test_an_index_that_names_a_missing_file_is_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor b is said to be in model-00002.*does not exist"):
        Checkpoint.open(directory)


def test_u4_1_a_tensor_of_the_index_that_no_shard_has_is_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    edit_index(directory, lambda weight_map: weight_map.update(c="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor c is missing"):
        Checkpoint.open(directory)


def test_u4_1_a_tensor_that_the_index_does_not_list_is_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1), "extra": torch.ones(1)}, {"b": torch.ones(1)})
    edit_index(directory, lambda weight_map: weight_map.pop("extra"))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor extra .* nowhere"):
        Checkpoint.open(directory)


def test_u4_1_a_tensor_in_another_file_than_the_index_says_is_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1), "c": torch.ones(1)}, {"b": torch.ones(1)})
    edit_index(directory, lambda weight_map: weight_map.update(c="model-00002-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"tensor c lies here, but .* has it in model-00002"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "null", '{"weight_map": []}', '{"weight_map": "text"}', '{"weight_map": {"a": 3}}', "\udc80"],
)
def test_an_index_without_a_weight_map_is_refused(content: str, save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    (directory / INDEX_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index\.json: no valid weight_map"):
        Checkpoint.open(directory)


def test_one_file_of_any_name_is_enough_and_the_standard_name_wins(save: Save) -> None:
    directory = save({"a": torch.ones(1)})
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    assert Checkpoint.open(directory).info("a").file.name == "model.safetensors"
    (directory / "model.safetensors").unlink()
    assert Checkpoint.open(directory).info("a").file.name == "other.safetensors"


def test_weights_that_cannot_be_told_apart_are_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    (directory / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"safetensors found: model-00001.*, model-00002"):
        Checkpoint.open(directory)
    for file in directory.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safetensors found: none"):
        Checkpoint.open(directory)


def test_a_directory_without_a_config_is_refused(save: Save) -> None:
    directory = save({"a": torch.ones(1)})
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read .*not a Hugging Face checkpoint"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(("content", "reason"), [("{", "not valid JSON"), ("[1]", "expected a JSON object")])
def test_a_broken_config_is_refused(content: str, reason: str, save: Save) -> None:
    directory = save({"a": torch.ones(1)})
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {reason}"):
        Checkpoint.open(directory)


def test_a_path_that_is_no_directory_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    file = tmp_path / "file"
    file.write_text("no directory")
    for name in (str(file), str(tmp_path / "gone"), "./gone", "../gone", "~/gone", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no such directory$") as error:
            Checkpoint.open(name)
        assert str(error.value).startswith(name)


def test_other_files_are_all_but_weights_and_hidden_ones(save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    for name in ("tokenizer.json", "chat_template.jinja", "code/modeling.py", "odd.xyz", ".gitattributes",
                 ".cache/x.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "original/weights.pth",
                 "nested/model.safetensors", "quant.gguf"):  # fmt: skip
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    assert [str(file) for file in Checkpoint.open(directory).other_files()] == [
        "chat_template.jinja", "code/modeling.py", "config.json", "odd.xyz", "tokenizer.json"
    ]  # fmt: skip


def test_u2_2_fingerprint_sees_every_file_and_reads_no_weight(save: Save) -> None:
    directory = save({"a": torch.ones(1)}, {"b": torch.ones(1)})
    (directory / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(directory)
    first = checkpoint.fingerprint()
    assert checkpoint.bytes_read == 0
    assert first == Checkpoint.open(directory).fingerprint()
    assert set(first) == {"config.json", "tokenizer.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))}

    def changed() -> set[str]:
        now = Checkpoint.open(directory).fingerprint()
        return {name for name in first.keys() | now.keys() if first.get(name) != now.get(name)}

    (directory / "tokenizer.json").write_text("{ }")
    assert changed() == {"tokenizer.json"}
    save_file({"b": torch.zeros(1)}, directory / "model-00002-of-00002.safetensors")
    assert changed() == {"tokenizer.json", "model-00002-of-00002.safetensors"}
    (directory / "added.txt").write_text("")
    assert changed() == {"tokenizer.json", "model-00002-of-00002.safetensors", "added.txt"}


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, with `HF_HUB_OFFLINE=1` as the library reads it at import."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def fill_cache(cache: Path, directory: Path, name: str, revision: str = "main") -> Path:
    """Put a directory into a hub cache: blobs, a snapshot of links to them, and a ref to the snapshot."""
    root = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / revision).write_text(commit)
    for number, file in enumerate(sorted(directory.iterdir())):
        blob = root / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def test_u11_3_a_hub_name_that_is_not_cached_is_one_line_with_the_command_that_fetches_it(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open("some-org/some-model")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("some-org/some-model: no such directory")
    assert "config.json" in message
    assert message.endswith("hf download some-org/some-model")


def test_u11_1_a_cached_hub_name_opens_offline(offline_hub: Path, save: Save) -> None:
    tensors = values()
    snapshot = fill_cache(offline_hub, save(tensors), "some-org/some-model")
    checkpoint = Checkpoint.open("some-org/some-model")
    assert (checkpoint.name, checkpoint.path) == ("some-org/some-model", snapshot)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert [str(file) for file in checkpoint.other_files()] == ["config.json"]


def test_u11_1_a_revision_is_looked_up_in_the_cache(offline_hub: Path, save: Save) -> None:
    snapshot = fill_cache(offline_hub, save({"a": torch.ones(1)}), "some-org/some-model", revision="v2")
    assert Checkpoint.open("some-org/some-model", "v2").path == snapshot
    with pytest.raises(CheckpointError, match=r"hf download some-org/some-model --revision v3$"):
        Checkpoint.open("some-org/some-model", "v3")


def test_u11_3_a_file_that_is_missing_in_the_cache_is_named_with_the_command_that_fetches_it(
    offline_hub: Path, save: Save
) -> None:
    snapshot = fill_cache(offline_hub, save({"a": torch.ones(1)}, {"b": torch.ones(1)}), "some-org/some-model")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, .*hf download some-org/some-model$"):
        Checkpoint.open("some-org/some-model")
    with pytest.raises(CheckpointError, match=r"does not exist$"):
        Checkpoint.open(snapshot)


def test_a_name_that_is_neither_directory_nor_hub_name_is_refused(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and not a hub name"):
        Checkpoint.open("not a name!")
