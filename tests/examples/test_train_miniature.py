"""The recipe of the bundled miniature, run for a few steps on made-up text."""

from __future__ import annotations

import importlib.util
import math
import random
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "train_miniature.py"
WORDS = {"verse": "the old sea was calm and grey before a storm", "code": "def f ( x ) : return x + 1"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_miniature", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(1)
    for domain, words in WORDS.items():
        (folder / domain).mkdir()
        for number in range(24):
            text = " ".join(rng.choices(words.split(), k=750 * words.count(" ") // len(words)))
            (folder / domain / f"{number:02d}.txt").write_text(f"{number} {text}", encoding="utf-8")
    return folder


def run(script: ModuleType, texts: Path, folder: Path) -> dict[str, Any]:
    flags = (
        "--steps 8 --save-steps 3 --batch-size 4 --sequence-length 32 --hidden-size 32 --layers 2 --experts 8 "
        "--vocab-size 320 --heldout-kb 2 --calibration-kb 4"
    )
    paths = ["--text-dir", str(texts), "--out", str(folder / "out"), "--work-dir", str(folder / "work")]
    threads = torch.get_num_threads()
    try:
        return script.main([*paths, *flags.split()])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(script: ModuleType, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("first")
    return folder / "out", run(script, texts, folder)


def test_training_lowers_the_loss(result: tuple[Path, dict[str, Any]]) -> None:
    _, measured = result
    assert measured["last_loss"] < measured["first_loss"]
    assert set(measured["scores"]) == {*WORDS, "all"}
    assert measured["scores"]["all"]["perplexity"] < 320  # the uniform distribution over the vocabulary
    for share in measured["usage"].values():
        torch.testing.assert_close(share.sum(1), torch.ones(2))


def test_saved_folder_loads_in_plain_transformers(result: tuple[Path, dict[str, Any]]) -> None:
    out, measured = result
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.config.output_router_logits
    assert (model.config.num_experts, model.config.vocab_size) == (8, len(tokenizer))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("f(12) was\n  grey")) == "f(12) was\n  grey"
    ids = torch.tensor([tokenizer.encode("the old sea was calm")])
    loss = model.float()(input_ids=ids, labels=ids).loss.item()
    assert math.isfinite(loss)
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| all | {measured['scores']['all']['tokens']} |" in card


def test_heldout_documents_are_whole_and_unseen(result: tuple[Path, dict[str, Any]], texts: Path) -> None:
    out, _ = result
    documents = {path.read_text(encoding="utf-8") for path in texts.glob("*/*.txt")}
    parts = {
        name: [part for part in (out / f"{name}.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n") if part]
        for name in ("calibration", "heldout")
    }
    assert parts["heldout"] and parts["calibration"]
    assert set(parts["heldout"]) | set(parts["calibration"]) <= documents
    assert not set(parts["heldout"]) & set(parts["calibration"])
    assert (out / "SOURCES.md").is_file()


def test_same_seed_gives_the_same_weights(
    script: ModuleType, texts: Path, tmp_path: Path, result: tuple[Path, dict[str, Any]]
) -> None:
    run(script, texts, tmp_path)
    for name in ("model/model.safetensors", "model/tokenizer.json", "heldout.txt", "calibration.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (result[0] / name).read_bytes(), name


def test_interrupted_run_continues_to_the_same_weights(
    script: ModuleType,
    texts: Path,
    tmp_path: Path,
    result: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, calls = script.MuonAdamW.step, iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.MuonAdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(script, texts, tmp_path)
    assert (tmp_path / "work" / "checkpoint-3").is_dir()
    assert run(script, texts, tmp_path)["resumed"]
    name = "model/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (result[0] / name).read_bytes()


def test_too_few_documents_are_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "texts" / "lonely").mkdir(parents=True)
    (tmp_path / "texts" / "lonely" / "one.txt").write_text("only one", encoding="utf-8")
    with pytest.raises(SystemExit, match="too few documents"):
        run(script, tmp_path / "texts", tmp_path)


def test_stacked_matrices_become_nearly_orthogonal(script: ModuleType) -> None:
    matrices = torch.randn(3, 48, 16, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(script.orthogonalise(matrices))
    assert singular.shape == (3, 16)
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_reads_the_strings_of_an_r_database(script: ModuleType) -> None:
    lines = ["EMMA", "", "Chapter I"]
    data = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        data += struct.pack(">ii", 9, len(line)) + line.encode()
    other = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 13, 0)
    database = b"".join(struct.pack(">I", len(part)) + zlib.compress(part) for part in (data, other, data))
    assert list(script.r_strings(database)) == [lines, lines]
