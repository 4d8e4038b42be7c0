"""The streamed pass against the whole model: same hidden states, same routing, and sums recomputed naively."""

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

from burnish.densify.observe import Calibration, observe
from burnish.densify.prepare import Subject
from burnish.densify.statistics import RoutingStatistics
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import BurnishError
from burnish.families import RouterRule, describe_student
from tests.conftest import FAMILIES, VOCABULARY, TinyModel


def calibration(sequences: int = 5, length: int = 16, padded: bool = False) -> Calibration:
    ids = torch.randint(4, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, 9:] = False
        mask[4, 3:] = False
    return Calibration(ids, mask)


def streamed(
    directory: Path, work: Path, data: Calibration, *, batch_size: int = 2, rule: RouterRule | None = None,
    outputs: bool = True, advance: Any = lambda batches: None, device: str = "cpu",
) -> RoutingStatistics:  # fmt: skip
    subject = Subject.open(directory)
    student = describe_student(subject.teacher, subject.family, subject.config, subject.shape.top_k)
    teacher = StreamedTeacher(
        subject.teacher, subject.family, subject.config, student.storage,
        device=torch.device(device), dtype=torch.float32,
    )  # fmt: skip
    return observe(
        teacher, rule or subject.rule, data, outputs=outputs, weights=False, batch_size=batch_size, work=work,
        advance=advance,
    )  # fmt: skip


def naive(directory: Path, data: Calibration) -> dict[int, dict[str, torch.Tensor]]:
    """The same sums by the definitions, expert by expert, from the whole model in transformers."""
    from transformers import AutoModelForCausalLM

    subject = Subject.open(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    seen: dict[int, tuple[Any, ...]] = {}
    live = data.attention_mask.flatten()
    result = {}
    handles = []
    for layer in subject.shape.moe_layers:
        block = model.get_submodule(subject.family.block.format(layer=layer))
        experts = block.experts
        handles.append(
            experts.register_forward_pre_hook(lambda m, args, layer=layer: seen.__setitem__(layer, (m, *args[:3])))
        )
    with torch.no_grad():
        model(data.input_ids, attention_mask=data.attention_mask.long())
    for handle in handles:
        handle.remove()
    for layer, (experts, hidden, indices, weights) in seen.items():
        hidden, indices, weights = hidden.reshape(-1, hidden.shape[-1])[live], indices[live], weights[live]
        tokens, num_experts = len(hidden), subject.shape.num_experts
        outputs = []
        with torch.no_grad():
            for expert in range(num_experts):
                only = torch.full((tokens, 1), expert)
                outputs.append(experts(hidden, only, torch.ones(tokens, 1)).double())
        gates = torch.zeros(tokens, num_experts, dtype=torch.float64)
        for token in range(tokens):
            for index, weight in zip(indices[token], weights[token], strict=True):
                gates[token, index] = float(weight)
        block_output = sum(gates[:, e : e + 1] * outputs[e] for e in range(num_experts))
        chosen = torch.zeros(tokens, num_experts, dtype=torch.bool).scatter(1, indices, True)
        result[layer] = {
            "num_tokens": torch.tensor(tokens),
            "counts": chosen.sum(0),
            "gate_sum": gates.sum(0),
            "gram": torch.tensor([[float((a * b).sum()) for b in outputs] for a in outputs]).double(),
            "cross": torch.stack([(f * block_output).sum() for f in outputs]),
            "output_energy": block_output.square().sum(),
            "routed_norm_sum": torch.stack([(f.norm(dim=1) * chosen[:, e]).sum() for e, f in enumerate(outputs)]),
            "gated_norm_sum": torch.stack([(f.norm(dim=1) * gates[:, e]).sum() for e, f in enumerate(outputs)]),
        }
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_sums_equal_those_of_the_whole_model(
    family: str, padded: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    data = calibration(padded=padded)
    directory = tiny_model(family)
    found, expected = streamed(directory, tmp_path, data), naive(directory, data)
    assert found.layers.keys() == expected.keys()
    assert found.num_tokens == int(data.attention_mask.sum())
    for layer, sums in expected.items():
        for name, value in sums.items():
            torch.testing.assert_close(
                found.layers[layer].tensors()[name], value.to(found.layers[layer].tensors()[name].dtype),
                atol=2e-4, rtol=2e-4, msg=lambda text, where=f"{layer}.{name}": f"{where}: {text}",
            )  # fmt: skip


def test_shared_expert_gate_is_averaged(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory, data = tiny_model("qwen2_moe"), calibration(padded=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    gates: list[torch.Tensor] = []
    model.model.layers[0].mlp.shared_expert_gate.register_forward_hook(lambda m, a, out: gates.append(out.sigmoid()))
    with torch.no_grad():
        model(data.input_ids, attention_mask=data.attention_mask.long())
    expected = gates[0].flatten()[data.attention_mask.flatten()].double().sum()
    found = streamed(directory, tmp_path, data).layers[0].shared_gate_sum
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_batch_size_changes_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, data = tiny_model("qwen3_moe"), calibration(padded=True)
    one = streamed(directory, tmp_path / "1", data, batch_size=1)
    five = streamed(directory, tmp_path / "5", data, batch_size=5)
    for layer in one.layers:
        for name, value in one.layers[layer].tensors().items():
            torch.testing.assert_close(value, five.layers[layer].tensors()[name], atol=1e-5, rtol=1e-5)


def test_router_only_statistics_run_no_other_expert(tiny_model: TinyModel, tmp_path: Path) -> None:
    found = streamed(tiny_model("mixtral"), tmp_path, calibration(), outputs=False)
    assert all(stats.gram is None for stats in found.layers.values())


def test_u2_1_finished_layers_are_not_redone(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, data = tiny_model("qwen3_moe"), calibration()
    steps: list[int] = []

    def stop_in_the_second_layer(batches: int) -> None:
        steps.append(batches)
        if sum(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(directory, tmp_path / "a", data, advance=stop_in_the_second_layer)
    steps.clear()
    resumed = streamed(directory, tmp_path / "a", data, advance=steps.append)
    assert steps[0] == 3 and sum(steps) == 9  # 3 batches of layer 0 are reported as done at once
    assert len(steps) == 1 + 6
    whole = streamed(directory, tmp_path / "b", data)
    for layer in whole.layers:
        for name, value in whole.layers[layer].tensors().items():
            assert torch.equal(value, resumed.layers[layer].tensors()[name]), name


def test_a_rule_that_does_not_describe_the_model_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(BurnishError, match="router rule does not describe this model"):
        streamed(tiny_model("qwen3_moe"), tmp_path, calibration(), rule=RouterRule(2, renormalize=False))


def test_streaming_keeps_no_layer_in_memory(tiny_model: TinyModel) -> None:
    subject = Subject.open(tiny_model("qwen3_moe"))
    student = describe_student(subject.teacher, subject.family, subject.config, 2)
    teacher = StreamedTeacher(
        subject.teacher, subject.family, subject.config, student.storage,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    with teacher.layer(1) as layer:
        assert all(parameter.device.type == "cpu" for parameter in layer.parameters())
        assert all(p.device.type == "meta" for p in teacher.layers[0].parameters())
    assert all(parameter.device.type == "meta" for parameter in teacher.layers[1].parameters())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_ranks_decide_the_same_plan_as_one(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    arguments = ["densify", str(tiny_model("qwen3_moe")), "--dataset", str(text_file), "--num-samples", "7"]
    arguments += ["--max-length", "32", "--batch-size", "2", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = "import sys; from burnish.cli.main import run; run(sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "one")],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "two")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for port in [free_port()]
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    one, two = (RoutingStatistics.load(tmp_path / n / "statistics" / "routing.safetensors") for n in ("one", "two"))
    for layer in one.layers:
        for name, value in one.layers[layer].tensors().items():
            torch.testing.assert_close(value, two.layers[layer].tensors()[name], atol=1e-4, rtol=1e-5)
    groups = [
        [layer["groups"] for layer in json.loads((tmp_path / name / "plan.json").read_text())["layers"]]
        for name in ("one", "two")
    ]
    assert groups[0] == groups[1]
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_sees_what_the_cpu_sees(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory, data = tiny_model(family), calibration(padded=True)
    cpu = streamed(directory, tmp_path / "cpu", data)
    gpu = streamed(directory, tmp_path / "gpu", data, device="cuda")
    for layer, stats in cpu.layers.items():
        for name, value in stats.tensors().items():
            torch.testing.assert_close(gpu.layers[layer].tensors()[name], value, atol=1e-2, rtol=1e-3)
