"""The log of a zeroth-order run, and its replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from burnish.errors import BurnishError
from burnish.optim import MeZO, MeZOBCD
from burnish.optim import perturbation as drawing
from burnish.optim.perturbation import LowRank, Sparse, Subspace
from burnish.optim.trajectory import Trajectory, fingerprint, replay
from tests.optim.test_mezo import network, objective, same

WAYS: dict[str, tuple[type[MeZO], dict[str, Any]]] = {
    "in place": (MeZO, {"copy": False}),
    "in place, forward, 2 queries, momentum": (
        MeZO,
        {"copy": False, "estimate": "forward", "queries": 2, "update": "momentum"},
    ),
    "copy": (MeZO, {"copy": True}),
    "adam": (MeZO, {"update": "adam", "lr": 1e-3}),
    "leave one out": (MeZO, {"estimate": "leave-one-out", "queries": 3}),
    "low rank": (MeZO, {"perturbation": LowRank(1, interval=7)}),
    "sparse": (MeZO, {"perturbation": Sparse(0.3)}),
    "blocks": (MeZOBCD, {"interval": 5}),
    "blocks in place": (MeZOBCD, {"interval": 5, "copy": False}),
    "blocks by size, adam": (MeZOBCD, {"interval": 5, "blocks": 50, "update": "adam", "lr": 1e-3}),
    "blocks in a subspace, decayed": (
        MeZOBCD,
        {"interval": 5, "perturbation": Subspace(2, 3), "weight_decay": 0.1, "clip": 1.0},
    ),
}


def run(model: nn.Module, file: Path | None, way: str, steps: range, state: Any = None, **more: Any) -> MeZO:
    kind, options = WAYS[way]
    dtype = next(model.parameters()).dtype
    optimizer = kind(model, **{"lr": 1e-2, "seed": 11, "log": file} | options | more)
    if state is not None:
        optimizer.load_state_dict(state)
    for _ in steps:
        optimizer.step(objective(model, dtype))
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_weights_after_1000_steps_are_those_of_a_replay_bit_for_bit(
    way: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(drawing.NOISE_PIECE, "cpu", 50)  # several pieces for the larger tensors
    tuned, base = network(dtype), network(dtype)
    optimizer = run(tuned, tmp_path / "log.jsonl", way, range(1000))
    read = Trajectory.read(tmp_path / "log.jsonl")
    assert len(read.records) == 1000
    replay(base, read)
    assert same(tuned, base) and not same(tuned, network(dtype))
    found = dict(base.named_parameters())
    assert optimizer.fingerprint() == fingerprint((name, found[name]) for name in optimizer.names())


def test_a_replay_goes_on(tmp_path: Path) -> None:
    """The optimizer that a replay gives back takes the same next steps as the run that was logged."""
    for way in ("blocks", "adam"):
        tuned, base = network(), network()
        file = tmp_path / f"{way}.jsonl"
        optimizer = run(tuned, file, way, range(13))
        again = replay(base, Trajectory.read(file))
        for _ in range(9):
            optimizer.step(objective(tuned))
            again.step(objective(base))
        assert same(tuned, base)


def test_accumulation_and_skipped_steps_replay(tmp_path: Path) -> None:
    tuned, base = network(), network()
    optimizer = MeZO(tuned, lr=1e-2, copy=False, nonfinite="skip", log=tmp_path / "log.jsonl")
    for step in range(6):
        optimizer.measure(objective(tuned))
        if step == 3:
            with pytest.warns(UserWarning, match="left out"):
                optimizer.measure(lambda: float("nan"))
        optimizer.measure(objective(tuned))
        optimizer.step()
    read = Trajectory.read(tmp_path / "log.jsonl")
    assert [record.repeats for record in read.records] == [2, 2, 2, 3, 2, 2]
    assert read.records[3].gradients == () and read.records[3].loss is None
    replay(base, read)
    assert same(tuned, base)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_u2_1_a_resumed_run_leaves_the_log_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = network(), network()
    run(whole, tmp_path / "whole.jsonl", "blocks", range(20))
    first = run(broken, tmp_path / "broken.jsonl", "blocks", range(8))
    state = first.state_dict()
    weights = {name: value.clone() for name, value in broken.state_dict().items()}
    for _ in range(5):  # steps after the checkpoint, lost in a crash
        first.step(objective(broken))
    resumed = network()
    resumed.load_state_dict(weights)
    run(resumed, tmp_path / "broken.jsonl", "blocks", range(8, 20), state=state)
    assert same(whole, resumed)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "broken.jsonl").read_bytes()


def test_a_log_is_a_few_numbers_a_step(tmp_path: Path) -> None:
    run(network(), tmp_path / "log.jsonl", "blocks", range(10))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 11 and max(map(len, lines[1:])) < 200
    first = json.loads(lines[1])
    assert set(first) == {"step", "block", "seed", "gradients", "lr", "loss", "repeats"}


def test_the_result_is_compared(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    model = network()
    optimizer = run(model, file, "copy", range(4))
    optimizer.end_log()
    assert Trajectory.read(file).result == optimizer.fingerprint()
    replay(network(), Trajectory.read(file))
    lines = file.read_text().splitlines()
    changed = json.loads(lines[2]) | {"gradients": [0.25]}
    file.write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]]))
    with pytest.raises(BurnishError, match="the replayed weights differ from those that the run ended with"):
        replay(network(), Trajectory.read(file))


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    run(network(), file, "copy", range(2), base="abc")
    read = Trajectory.read(file)
    with pytest.raises(BurnishError, match="these weights are not those that the run began with"):
        replay(network(seed=1), read)
    with pytest.raises(BurnishError, match="these weights are not those"):
        replay(network(torch.bfloat16), read)
    with pytest.raises(BurnishError, match=r"the log moves 0.weight, which this model does not have"):
        replay(nn.Linear(2, 2), read)
    with pytest.raises(BurnishError, match="the log is of base model abc, this one is xyz"):
        replay(network(), read, base="xyz")
    other = network()
    with torch.no_grad():
        other[0].bias[3] += 1e-7
    with pytest.raises(BurnishError, match="these weights are not those"):
        replay(other, read)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [*lines[:3], lines[3][:20]], r"line 4: not a step .*the file is cut or changed"),
        (lambda lines: lines[:2] + lines[3:], r"line 3: step 2, expected 1"),
        (lambda lines: lines[1:], "its first line names no"),
        (lambda lines: ["[]"], "not a step|names no"),
        (lambda lines: [], "empty, a header is expected"),
        (lambda lines: [lines[0], '{"step": 0}'], r"line 2: not a step"),
    ],
)
def test_a_broken_file_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    run(network(), file, "copy", range(4))
    file.write_text("\n".join(edit(file.read_text().splitlines())))
    with pytest.raises(BurnishError, match=message):
        Trajectory.read(file)


def test_missing_file_and_missing_steps(tmp_path: Path) -> None:
    with pytest.raises(BurnishError, match="cannot be read"):
        Trajectory.read(tmp_path / "none.jsonl")
    model = network()
    state = run(model, None, "copy", range(3)).state_dict()
    with pytest.raises(BurnishError, match="holds 0 steps, but the run goes on from step 3"):
        run(model, tmp_path / "log.jsonl", "copy", range(1), state=state)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(BurnishError, match="exists already"):
        run(network(), tmp_path / "log.jsonl", "copy", range(1))


def test_noise_of_another_device_or_torch(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    run(network(), file, "copy", range(2))
    lines = file.read_text().splitlines()
    header = json.loads(lines[0])
    file.write_text("\n".join([json.dumps(header | {"noise": "cuda/33554432"}), *lines[1:]]))
    with pytest.raises(BurnishError, match=r"the log's noise is 'cuda/33554432', here it is 'cpu/131072'"):
        replay(network(), Trajectory.read(file))
    file.write_text("\n".join([json.dumps(header | {"torch": "1.0"}), *lines[1:]]))
    with pytest.warns(UserWarning, match=r"written with torch 1.0"):
        replay(network(), Trajectory.read(file))
