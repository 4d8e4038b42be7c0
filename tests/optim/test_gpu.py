"""The same steps on a GPU as on the CPU, compiled and not. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import (
    AMUSE,
    AdamWScheduleFree,
    MeZOBCD,
    Muon,
    NorMuon,
    RAdamScheduleFree,
    SGDScheduleFree,
    orthogonalize,
)
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.orthogonalization import _orthogonalize, iteration
from burnish.optim.perturbation import Subspace
from burnish.optim.trajectory import Trajectory, replay
from tests.optim.test_mezo import network

SHAPES = ((24, 24), (40, 16), (16, 40), (3, 8, 20), (6, 4, 3, 3), (24,))
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "muon": lambda params: Muon(params, lr=0.02, dtype=torch.float32),
    "muon-gram": lambda params: Muon(params, lr=0.02, dtype=torch.float32, orthogonalization="gram"),
    "normuon": lambda params: NorMuon(params, lr=0.02, dtype=torch.float32),
    "amuse": lambda params: AMUSE(params, lr=0.02, warmup_steps=2, weight_decay=0.1, dtype=torch.float32),
    "sgd-schedule-free": lambda params: SGDScheduleFree(params, lr=0.1, weight_decay=0.1),
    "adamw-schedule-free": lambda params: AdamWScheduleFree(params, lr=0.01, weight_decay=0.1),
    "radam-schedule-free": lambda params: RAdamScheduleFree(params, lr=0.01),
}


def _train(name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype)) for shape in SHAPES]
    optimizer: Any = OPTIMIZERS[name](params)
    for _ in range(6):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device, dtype)
        optimizer.step()
    if isinstance(optimizer, AveragedOptimizer):
        optimizer.eval()
    return [parameter.detach().float().cpu() for parameter in params]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_gpu_takes_the_steps_of_the_cpu(name: str, dtype: torch.dtype, bound: float) -> None:
    for ours, expected in zip(_train(name, "cuda", dtype), _train(name, "cpu", dtype), strict=True):
        assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["newton-schulz", "polar-express", "gram"])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_compiled_iteration_equals_the_plain_one_on_a_gpu(method: Any, shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = orthogonalize(matrices, method=method, dtype=torch.float32)
    compiled = orthogonalize(matrices.cuda(), method=method, dtype=torch.float32).cpu()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-3)  # TF32 products


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"interval": 5}, {"interval": 5, "copy": False}, {"perturbation": Subspace(2, 5)}])
def test_a_replay_on_a_gpu_is_the_run_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, base = network(dtype).cuda(), network(dtype).cuda()
    inputs = torch.randn(40, 6, device="cuda", dtype=dtype)
    optimizer = MeZOBCD(tuned, lr=1e-2, log=tmp_path / "log.jsonl", **options)
    state = torch.cuda.get_rng_state()
    for _ in range(30):
        optimizer.step(lambda: tuned(inputs).float().square().mean())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    replay(base, Trajectory.read(tmp_path / "log.jsonl"))
    assert all(torch.equal(*pair) for pair in zip(tuned.parameters(), base.parameters(), strict=True))
    with pytest.raises(ValueError, match="the closure changed the random state"):
        optimizer.step(lambda: torch.rand((), device="cuda"))


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express", "gram"])
def test_the_iteration_can_be_captured_whole(method: Any) -> None:
    captured = torch.compile(_orthogonalize, dynamic=True, backend="aot_eager", fullgraph=True)
    for shape in ((3, 8, 8), (2, 8, 20), (1, 9, 30)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(captured(x, iteration(method), 1e-7), _orthogonalize(x, iteration(method), 1e-7))
