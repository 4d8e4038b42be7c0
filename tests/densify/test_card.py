"""Model card: front matter that a hub can read, licence carried over, no path of this machine."""

from __future__ import annotations

from pathlib import Path

import yaml

from burnish.checkpoint.card import front_matter_of
from burnish.densify import densify
from tests.conftest import TinyModel


def test_card_states_the_recipe_and_keeps_the_licence(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    import shutil

    teacher = tmp_path / "My-MoE"
    shutil.copytree(tiny_model("deepseek_v2"), teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags:\n- secret\n---\n# Old card\n")
    result = densify(teacher, tmp_path / "o", score="cp", dataset=str(text_file), num_samples=2, max_length=32)
    card = (tmp_path / "o" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["language"] == "en"
    assert front["base_model"] == "My-MoE" and front["library_name"] == "transformers"
    assert "score: cp" in card and "scaling: conditional" in card and "64 tokens" in card
    assert f"{result.record['output']['parameters']:,}" in card
    assert str(tmp_path) not in card
    assert "first_k_dense_replace" in card  # why the class is not a plain dense one
    assert result.record["files"]["changed"] == ["README.md", "config.json"]


def test_front_matter_of_other_shapes_is_empty() -> None:
    assert front_matter_of("# no front matter\nlicense: mit\n") == {}
    assert front_matter_of("---\nlicense:\n- mit\n---\n") == {}
