"""Where the router is constant and every expert is used, the dense student must equal the teacher: all families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import FAMILIES, TINY, TinyModel, logits_of

from burnish.densify import densify

NUM_EXPERTS = {name: next(v for k, v in tiny.items() if k.endswith("experts") and "shared" not in k)
               for name, tiny in TINY.items()}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_u4_4_constant_router_student_equals_teacher(
    family: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    changes = {"num_experts_per_tok": NUM_EXPERTS[family]}
    if family == "deepseek_v2":
        changes |= {"topk_method": "greedy"}
    teacher = tiny_model(family, constant_router=True, **changes)
    result = densify(teacher, tmp_path / "out", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    expected, got = logits_of(teacher, some_tokens), logits_of(tmp_path / "out", some_tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    for layer in result.plan.layers:
        assert sorted(expert for group in layer.groups for expert in group) == list(range(NUM_EXPERTS[family]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [result.record["output"]["architecture"]]
