"""Controls: the student's shape, the teacher's tensors where they are kept, random ones elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.checkpoint import Checkpoint
from burnish.densify import densify
from burnish.report import write_report
from tests.conftest import FAMILIES, TinyModel, logits_of


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_ffn_keeps_all_but_the_feed_forwards(
    model_type: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    moe = tiny_model(model_type)
    densify(moe, tmp_path / "real", score="sf", dataset=str(text_file), num_samples=2, max_length=16)
    result = densify(moe, tmp_path / "control", init="random-ffn")
    assert result.plan is None and not (tmp_path / "control" / "plan.json").exists()
    real, control = tensors(tmp_path / "real"), tensors(tmp_path / "control")
    assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in control.items()}
    equal = {name for name in real if torch.equal(real[name], control[name])}
    matrices = {name for name in real if name not in equal and "bias" not in name}
    assert matrices and all("proj" in name or "linear" in name for name in matrices)
    assert {name for name in real if "attn" in name or "norm" in name or "embed" in name} <= equal
    for name in matrices:
        assert control[name].float().std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.isfinite(logits_of(tmp_path / "control", some_tokens)).all()


def test_random_keeps_nothing_and_starts_as_the_class_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    moe = tiny_model("qwen3_moe")
    densify(moe, tmp_path / "control", init="random")
    teacher, control = tensors(moe), tensors(tmp_path / "control")
    for name, tensor in control.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert not torch.equal(tensor, teacher.get(name, torch.zeros(())))
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
            assert abs(tensor.mean().item()) < 0.02 * 5 / tensor.numel() ** 0.5
    flat = [tensor.flatten()[:100] for name, tensor in control.items() if "norm" not in name]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)  # no two tensors draw the same numbers


def test_u12_1_same_seed_same_bytes_and_another_seed_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    moe = tiny_model("qwen3_moe")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        densify(moe, tmp_path / name, init="random-ffn", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_control_can_be_reported(tiny_model: TinyModel, tmp_path: Path) -> None:
    densify(tiny_model("qwen3_moe"), tmp_path / "control", init="random-ffn")
    page = write_report(tmp_path / "control").read_text()
    assert "a control: random feed-forwards" in page and "random-ffn" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init": "zeros"}, "init='zeros' is unknown: choose one of experts, random-ffn, random"),
     ({"init": "random", "plan": "plan.json"}, "init='random' uses no experts: leave out plan and statistics")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(
    options: dict[str, str], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        densify(tiny_model("qwen3_moe"), tmp_path / "out", **options)
