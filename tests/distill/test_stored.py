"""Stored logits: what is kept, what the rest weighs, and that a stored teacher teaches what a live one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.distill import LiveTeacher, StoredTeacher, forward_kl
from burnish.distill.stored import StoredLogits, store
from burnish.errors import CheckpointError, ResumeMismatchError
from tests.conftest import VOCABULARY, logits_of

BLOCKS = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(3))


def stored(
    teacher: Path, directory: Path, best: int, temperature: float = 1.0, block=BLOCKS.__getitem__, **options
) -> StoredLogits:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    return store(
        model, block, len(BLOCKS), directory, best=best, temperature=temperature,
        vocab_size=VOCABULARY, batch_size=2, fingerprint={"teacher": "tiny", "tokens": "five"}, **options,
    )  # fmt: skip


def test_u8_4_best_tokens_and_the_mass_of_the_rest(teacher: Path, tmp_path: Path) -> None:
    found = stored(teacher, tmp_path / "logits", best=7, temperature=2.0)
    probabilities = (logits_of(teacher, BLOCKS) / 2.0).softmax(-1)
    ids, log_p = found.blocks([3, 0])
    best = probabilities[[3, 0]].topk(7)
    assert torch.equal(ids.long(), best.indices)
    assert torch.allclose(log_p[..., :7].exp(), best.values, rtol=4e-3)
    assert torch.allclose(log_p[..., 7].exp(), 1 - best.values.sum(-1), rtol=4e-3)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(2, 12), atol=1e-6)
    assert found.tail_mass == pytest.approx(float(1 - probabilities.topk(7).values.sum(-1).mean()), rel=1e-3)


def test_all_tokens_stored_give_the_divergence_of_the_live_teacher(teacher: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    batch = {"input_ids": BLOCKS[1:3], "row": torch.tensor([1, 2])}
    live = torch.ones(2, 11, dtype=torch.bool)
    logits = torch.randn(22, VOCABULARY, generator=torch.Generator().manual_seed(0))
    whole = forward_kl(*LiveTeacher(model).target(batch, live, states=False).pair(logits, slice(None), 1.0))
    kept = {}
    for best in (VOCABULARY, 16, 2):
        source = StoredTeacher(stored(teacher, tmp_path / str(best), best=best))
        kept[best] = forward_kl(*source.target(batch, live, states=False).pair(logits, slice(None), 1.0))
    assert torch.allclose(kept[VOCABULARY], whole, rtol=2e-2)
    assert kept[2].sum() < kept[16].sum() < whole.sum()  # merging outcomes can only lower it


def test_the_student_is_softened_as_the_stored_teacher_was_and_its_padding_left_out(
    teacher: Path, tmp_path: Path
) -> None:
    """Evaluation asks for temperature 1, which a distribution stored at 2 cannot give: both sides stay at 2."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    batch = {"input_ids": BLOCKS[:1], "row": torch.tensor([0])}
    live = torch.ones(1, 11, dtype=torch.bool)
    logits = 3 * torch.randn(11, VOCABULARY, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.full((11, 16), 5.0)], dim=1)
    expected = forward_kl(*LiveTeacher(model).target(batch, live, states=False).pair(logits, slice(None), 2.0))
    source = StoredTeacher(stored(teacher, tmp_path / "logits", best=VOCABULARY, temperature=2.0))
    for given in (logits, padded):
        found = forward_kl(*source.target(batch, live, states=False).pair(given, slice(None), 1.0))
        assert torch.allclose(found, expected, rtol=1e-2)


def test_an_interrupted_run_keeps_its_finished_files(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.distill.stored.BLOCKS_PER_FILE", 2)
    seen: list[int] = []

    def stop_after_two(blocks: int) -> None:
        seen.append(blocks)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(teacher, tmp_path / "cut", best=4, advance=stop_after_two)
    assert not (tmp_path / "cut").exists()
    rows: list[int] = []
    again = stored(teacher, tmp_path / "cut", best=4, block=lambda row: rows.append(row) or BLOCKS[row])
    assert rows == [4]
    whole = stored(teacher, tmp_path / "whole", best=4)
    for mine, theirs in zip(again.blocks([0, 2, 4]), whole.blocks([0, 2, 4]), strict=True):
        assert torch.equal(mine, theirs)


def test_other_data_and_other_directories_are_refused_by_name(teacher: Path, tmp_path: Path) -> None:
    stored(teacher, tmp_path / "logits", best=4)
    with pytest.raises(ResumeMismatchError, match="tokens was 'five', is 'six'"):
        StoredLogits.open(tmp_path / "logits", {"tokens": "six"})
    with pytest.raises(CheckpointError, match="holds no stored logits"):
        StoredLogits.open(teacher, {})
