"""The streamed pass against hooks on the whole model, recomputed naively from the definitions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.families.streaming import Calibration, StreamedModel
from burnish.prune import ActivationStatistics
from burnish.prune.layout import DenseModel
from burnish.prune.observe import observe
from tests.conftest import VOCABULARY
from tests.prune.models import DENSE_FAMILIES, save_dense


def calibration(padded: bool = False) -> Calibration:
    ids = torch.randint(4, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, 9:] = False
        mask[4, 3:] = False
    return Calibration(ids, mask)


def streamed(
    directory: Path, work: Path, data: Calibration, *, batch_size: int = 2, device: str = "cpu",
    advance: Any = lambda batches: None,
) -> ActivationStatistics:  # fmt: skip
    model = DenseModel.open(directory)
    stream = StreamedModel(model.checkpoint, model.config, device=torch.device(device), dtype=torch.float32)
    return observe(stream, data, batch_size=batch_size, work=work, advance=advance)


def naive(directory: Path, data: Calibration) -> list[dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):

        def keep(name: str, index: int = index) -> Any:
            return lambda tensor: seen.__setitem__((index, name), tensor.double())

        before, after, neurons, heads = keep("in"), keep("out"), keep("neurons"), keep("head_channels")
        first, second = keep("attention_channels"), keep("feed_forward_channels")
        layer.register_forward_pre_hook(lambda m, a, k=before: k(a[0]))
        layer.register_forward_hook(lambda m, a, o, k=after: k(o[0] if isinstance(o, tuple) else o))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, k=neurons: k(a[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, k=heads: k(a[0]))
        layer.input_layernorm.register_forward_hook(lambda m, a, o, k=first: k(o))
        layer.post_attention_layernorm.register_forward_hook(lambda m, a, o, k=second: k(o))
    with torch.no_grad():
        model(data.input_ids, attention_mask=data.attention_mask.long())
    result = []
    for index in range(len(model.model.layers)):
        sums = {"num_tokens": data.attention_mask.sum(), "num_sequences": torch.tensor(5)}
        for name in ("neurons", "head_channels", "attention_channels", "feed_forward_channels"):
            total = torch.zeros(seen[index, name].shape[-1], dtype=torch.float64)
            for sequence, length in enumerate(data.attention_mask.sum(dim=1).tolist()):
                mean = sum(seen[index, name][sequence, token].abs() for token in range(length)) / length
                total += mean * mean
            sums[name] = total
        before, after = seen[index, "in"], seen[index, "out"]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        sums["cosine_sum"] = cosine[data.attention_mask].sum()
        result.append(sums)
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_streamed_sums_equal_those_of_the_whole_model(family: str, padded: bool, tmp_path: Path) -> None:
    directory, data = save_dense(tmp_path / "model", family), calibration(padded)
    found, expected = streamed(directory, tmp_path / "work", data), naive(directory, data)
    assert list(found.layers) == [0, 1, 2]
    for layer, sums in enumerate(expected):
        assert sums.keys() == found.layers[layer].tensors().keys()
        for name, value in sums.items():
            torch.testing.assert_close(
                found.layers[layer].tensors()[name], value, atol=1e-6, rtol=1e-5,
                msg=lambda text, where=f"{layer}.{name}": f"{where}: {text}",
            )  # fmt: skip


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    directory, data = save_dense(tmp_path / "model", "qwen3"), calibration(padded=True)
    one = streamed(directory, tmp_path / "1", data, batch_size=1)
    five = streamed(directory, tmp_path / "5", data, batch_size=5)
    for layer in one.layers:
        for name, value in one.layers[layer].tensors().items():
            torch.testing.assert_close(value, five.layers[layer].tensors()[name], atol=1e-6, rtol=1e-5)


def test_u2_1_finished_layers_are_not_redone(tmp_path: Path) -> None:
    directory, data, steps = save_dense(tmp_path / "model", "granite"), calibration(), list[int]()

    def stop_in_the_second_layer(batches: int) -> None:
        steps.append(batches)
        if sum(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(directory, tmp_path / "a", data, advance=stop_in_the_second_layer)
    steps.clear()
    resumed = streamed(directory, tmp_path / "a", data, advance=steps.append)
    assert steps == [3] + 6 * [1]  # 3 batches of layer 0 are reported as done at once
    whole = streamed(directory, tmp_path / "b", data)
    for layer in whole.layers:
        for name, value in whole.layers[layer].tensors().items():
            assert torch.equal(value, resumed.layers[layer].tensors()[name]), name


def test_two_ranks_decide_the_same_plan_as_one(text_file: Path, tmp_path: Path) -> None:
    arguments = [
        "prune",
        str(save_dense(tmp_path / "model", "qwen3")),
        "--dataset",
        str(text_file),
        "--num-samples",
        "7",
    ]
    arguments += ["--max-length", "32", "--batch-size", "2", "--json", "--hidden-size", "20", "--layers", "2"]
    code = "import sys; from burnish.cli.main import run; run(sys.argv[1:])"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def start(out: str, **ranks: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | ranks, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for process in [start("one"), *(start("two", RANK=rank, LOCAL_RANK=rank, **torchrun) for rank in "01")]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    one, two = (json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two"))
    assert one.pop("block_influence") == pytest.approx(two.pop("block_influence"), rel=1e-6)
    assert one == two
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_gpu_sees_what_the_cpu_sees(family: str, tmp_path: Path) -> None:
    directory, data = save_dense(tmp_path / "model", family), calibration(padded=True)
    cpu, gpu = (streamed(directory, tmp_path / device, data, device=device) for device in ("cpu", "cuda"))
    for layer, sums in cpu.layers.items():
        for name, value in sums.tensors().items():
            torch.testing.assert_close(gpu.layers[layer].tensors()[name], value, atol=1e-2, rtol=1e-3)
