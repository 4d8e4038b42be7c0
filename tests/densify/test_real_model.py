"""A real language model made dense, and what other programs read from the output."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

import burnish
from burnish.densify import densify
from tests import engines, smollm2
from tests.conftest import FAMILIES, TinyModel, logits_of

pytestmark = pytest.mark.slow

TRANSFORMERS = ("transformers-4", "transformers-5")
MINIATURE = Path(burnish.__file__).parent / "data" / "miniature" / "model"
CHAT = (smollm2.QUESTION, "Explain in two sentences why the sky is blue.")
NEW_TOKENS = 32
# Nothing of it is a default, so that a reader that misses a key gets other logits.
ROPE = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Expected:
    """What a model answers in this process, for an engine to be held against."""

    texts: list[str]
    prompts: list[list[int]]
    answers: list[str]
    tokens: list[list[int]]
    logits: Tensor  # [length of the first prompt, vocab]


Record = Callable[[str, object], None]


def expected_of(model: Path, texts: list[str]) -> Expected:
    """Greedy answers and logits of a model in the transformers that burnish itself uses."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    request = {"model": model, "prompts": prompts, "texts": texts, "max_new_tokens": NEW_TOKENS, "logits": None}
    made = engines.PROGRAMS["transformers"](request)
    return Expected(texts, prompts, made["texts"], made["tokens"], logits_of(model, torch.tensor([prompts[0]]))[0])


def chat_of(model: Path) -> list[str]:
    """The questions as the model's chat template writes them."""
    template = AutoTokenizer.from_pretrained(model).apply_chat_template
    return [template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True) for text in CHAT]


def divergence(expected: Tensor, got: Tensor) -> float:
    """Largest KL(expected || got) of any position, in nats; logits [length, vocab]."""
    log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).max().item()


def ask(engine: str, model: Path, expected: Expected, **options: Any) -> dict[str, Any]:
    """What an engine makes of the same prompts; skips where it cannot be installed."""
    if reason := engines.why_unavailable(engine):
        pytest.skip(reason)
    return engines.generate(engine, model, expected.prompts, expected.texts, max_new_tokens=NEW_TOKENS, **options)


def require_same_answers(got: dict[str, Any], expected: Expected) -> None:
    assert got["prompts"] == expected.prompts
    assert got["tokens"] == expected.tokens
    assert got["texts"] == expected.answers


@pytest.fixture(scope="module")
def original() -> Path:
    found = smollm2.original()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def expected(original: Path) -> Expected:
    return expected_of(original, chat_of(original))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for half-gigabyte models, emptied after use: pytest keeps its own for three runs."""
    folder = tmp_path_factory.mktemp("models")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def dense(original: Path, work: Path) -> Path:
    moe = smollm2.split_into_experts(original, work / "moe")
    densify(moe, work / "dense", score="sf", keep=8, num_samples=2, max_length=64)
    return work / "dense"


@pytest.fixture(scope="module")
def dense_from_shards(original: Path, work: Path) -> Path:
    moe = smollm2.split_into_experts(original, work / "moe-shards", num_shards=3)
    densify(moe, work / "dense-shards", score="sf", keep=8, num_samples=2, max_length=64, max_shard_size="200MB")
    return work / "dense-shards"


@pytest.fixture(scope="module")
def dense_miniature(work: Path) -> Path:
    densify(MINIATURE, work / "miniature", score="sf", num_samples=32, max_length=256, dtype="float32")
    return work / "miniature"


@pytest.mark.parametrize("fixture", ["dense", "dense_from_shards"])
def test_u4_4_split_smollm2_made_dense_is_the_original(
    fixture: str, request: pytest.FixtureRequest, original: Path, expected: Expected, record_property: Record
) -> None:
    made: Path = request.getfixturevalue(fixture)
    got = expected_of(made, expected.texts)
    difference = (got.logits - expected.logits).abs().max().item()
    record_property("max_logit_difference", difference)
    assert difference < 1e-4
    assert got.prompts == expected.prompts
    assert got.answers == expected.answers
    assert "Paris" in got.answers[0]
    assert len(list(made.glob("*.safetensors"))) == (1 if fixture == "dense" else 3)


@pytest.mark.parametrize("engine", TRANSFORMERS)
def test_u5_1_smollm2_in_plain_transformers(
    engine: str, dense: Path, expected: Expected, tmp_path: Path, record_property: Record
) -> None:
    got = ask(engine, dense, expected, logits=tmp_path / "logits.npy")
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    record_property("kl", divergence(expected.logits, logits))
    record_property("versions", got["versions"])
    assert divergence(expected.logits, logits) < 1e-6
    require_same_answers(got, expected)


def test_u5_4_smollm2_in_vllm(dense: Path, expected: Expected, record_property: Record) -> None:
    got = ask("vllm", dense, expected)
    record_property("versions", got["versions"])
    require_same_answers(got, expected)


def test_u5_4_smollm2_in_llama_cpp(dense: Path, expected: Expected, tmp_path: Path, record_property: Record) -> None:
    got = ask("llama.cpp", dense, expected, logits=tmp_path / "logits.npy")
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    record_property("kl", divergence(expected.logits, logits))
    record_property("versions", got["versions"])
    assert divergence(expected.logits, logits) < 1e-6
    require_same_answers(got, expected)


@pytest.mark.parametrize("engine", TRANSFORMERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_u5_1_every_family_in_plain_transformers(
    family: str, engine: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path, record_property: Record
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    head = {"head_dim": 8} if family == "mixtral" else {}  # transformers needs it to be said beside YaRN
    shutil.copytree(tiny_model(family, rope_parameters=ROPE, **head), teacher)
    smollm2.name_common_tokenizer_class(teacher)
    densify(teacher, out, score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    expected = expected_of(out, ["the expert of many weights are chosen by tokens", "a router"])
    got = ask(engine, out, expected, logits=tmp_path / "logits.npy")
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    record_property("kl", divergence(expected.logits, logits))
    assert divergence(expected.logits, logits) < 1e-6
    # Not the text: for some model types transformers 5 puts the family's own tokenizer over the one that is saved.
    assert got["tokens"] == expected.tokens


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_u5_4_qwen3_miniature_in_other_engines(engine: str, dense_miniature: Path) -> None:
    expected = expected_of(dense_miniature, ["The old man said", "def main("])
    # The miniature's tokenizer splits words as SmolLM's, but llama.cpp's converter knows tokenizers by name.
    got = ask(engine, dense_miniature, expected, pre_tokenizer="smollm")
    require_same_answers(got, expected)
