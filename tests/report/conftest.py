"""A run directory such as `burnish densify` and `burnish evaluate` leave behind, of any shape, with a fixed seed."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VERSIONS = {"python": "3.12.8", "burnish": "0.1.0", "torch": "2.11.0", "transformers": "5.10.1", "safetensors": "0.6.2"}


def sample_plan(layers: int, experts: int, keep: int, score: str, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    entries = []
    for layer in range(layers):
        sharpness = 0.4 + 1.2 * layer / max(layers - 1, 1)
        raw = [math.exp(sharpness * draw.gauss(0, 1)) for _ in range(experts)]
        scores = [value / sum(raw) for value in raw]
        kept = sorted(sorted(range(experts), key=lambda e: -scores[e])[: keep - 1])
        kept = sorted({*kept, draw.choice([e for e in range(experts) if e not in kept])})
        entries.append(
            {
                "layer": layer,
                "groups": [[expert] for expert in kept],
                "weights": [[1.0] for _ in kept],
                "scales": [1 / keep for _ in kept],
                "scores": scores,
                "shared_scale": 1.0,
                "effective_rank": keep * (0.95 - 0.3 * draw.random()),
                "relative_block_error": 0.18 + 0.4 * layer / max(layers, 1) + 0.05 * draw.random(),
            }
        )
    return {
        "format": "burnish.densify.plan/1",
        "family": "qwen3_moe",
        "score": score,
        "keep": keep,
        "grouping": None,
        "scaling": "uniform",
        "num_experts": experts,
        "top_k": keep,
        "notes": [],
        "layers": entries,
    }


def sample_record(layers: int, experts: int, keep: int, score: str, name: str = "Qwen3-30B-A3B") -> dict[str, Any]:
    expert = 3 * 2048 * 768
    other = 311_000_000 * 2 + layers * 19_000_000
    before, after = other + layers * experts * expert, other + layers * keep * expert
    return {
        "format": "burnish.run/1",
        "verb": "densify",
        "started": "2026-03-02T09:14:07+00:00",
        "finished": "2026-03-02T09:21:52+00:00",
        "command": f"burnish densify {name} --out {score}-k{keep} --score {score} --keep {keep} --num-samples 512",
        "options": {
            "score": score,
            "keep": keep,
            "grouping": None,
            "scaling": "uniform",
            "dataset": "wikitext-2",
            "num_samples": 512,
            "max_length": 2048,
            "seed": 0,
        },
        "source": {
            "name": name,
            "family": "Qwen3-MoE",
            "model_type": "qwen3_moe",
            "architecture": "Qwen3MoeForCausalLM",
            "parameters": before,
            "bytes": 2 * before,
        },
        "output": {"architecture": "Qwen3ForCausalLM", "parameters": after, "bytes": 2 * after},
        "environment": {"versions": VERSIONS, "platform": "Linux x86_64", "threads": 16, "devices": ["NVIDIA H100"]},
        "seconds": {"observe": 402.7, "decide": 0.38, "act": 61.2},
        "peak_rss_bytes": 5_312_000_000,
        "statistics": {"num_tokens": 1_048_576, "bytes": 812_000_000},
        "counts": {
            "read": layers * experts * 3 + 300,
            "converted": layers * keep * 3,
            "copied": 291,
            "dropped": layers * (experts - keep) * 3,
        },
        "files": {
            "copied": ["tokenizer.json", "tokenizer_config.json", "generation_config.json"],
            "changed": ["config.json", "model.safetensors.index.json", "README.md"],
            "dropped": [],
        },
        "notes": ["Layer 2 routed fewer than 100 tokens to expert 5: its score is uncertain."],
    }


def estimate(value: float, error: float | None) -> dict[str, float | None]:
    return {"value": value, "standard_error": error}


def sample_speed(batch_size: int, parameters: int, speed: float) -> dict[str, Any]:
    prefill, decode = 4121.0 * speed, 61.3 * speed
    return {
        "batch_size": batch_size,
        "prompt_tokens": 256,
        "new_tokens": 32,
        "prefill_ms": 1000 * batch_size * 256 / prefill,
        "prefill_tokens_per_second": prefill,
        "decode_ms_per_token": 1000 * batch_size / decode,
        "decode_tokens_per_second": decode,
        "peak_memory_bytes": 2 * parameters + 900_000_000,
    }


def sample_task(name: str, scores: list[float], **changes: Any) -> dict[str, Any]:
    """One metric of a task; the second and later models are compared with the first."""
    return {
        "task": name,
        "version": "1.0",
        "num_fewshot": 5,
        "limit": None,
        "chat_template_hash": None,
        "fingerprint": f"questions of {name}",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "num_samples": 1000,
        "values": [estimate(score, 0.0152) for score in scores],
        "differences": [None, *(estimate(score - scores[0], 0.0098) for score in scores[1:])],
    } | changes


def sample_evaluation(students: list[tuple[str, int, float, float]], parameters: int) -> dict[str, Any]:
    """As `EvaluateResult.to_dict` writes it; a student is (model, parameters, perplexity, speed-up)."""

    def row(model: str, parameters: int, perplexity: float, speed: float) -> dict[str, Any]:
        return {
            "model": model,
            "num_parameters": parameters,
            "bytes_on_disk": 2 * parameters,
            "nll": estimate(math.log(perplexity), 0.008),
            "perplexity": estimate(perplexity, perplexity * 0.008),
            "comparison": None,
            "speeds": [sample_speed(4, parameters, speed)],
        }

    rows = [row("Qwen/Qwen3-30B-A3B", parameters, 8.704, 1.0)]
    for name, after, perplexity, speed in students:
        loss = math.log(perplexity / 8.704)
        comparison = {
            "forward_kl": estimate(1.1 * loss, 0.013),
            "top1_agreement": estimate(0.75 - 0.13 * loss, 0.0041),
            "nll_difference": estimate(loss, 0.0063),
        }
        rows.append(row(name, after, perplexity, speed) | {"comparison": comparison})
    return {
        "rows": rows,
        "dataset": None,
        "split": "test",
        "sources": {"encyclopedia": 40, "news": 24},
        "fingerprint": "9f2c51d0a77be310",
        "tokenizer_hash": "51c0ffee12ab90de",
        "chat_template_hash": None,
        "num_samples": 64,
        "max_length": 512,
        "num_tokens": 32768,
        "vocab_size": 151_936,
        "batch_size": 4,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "seed": 0,
        "environment": {"versions": VERSIONS, "platform": "Linux x86_64", "threads": 16, "devices": ["NVIDIA H100"]},
        "tasks": [],
        "task": "language-modelling",
        "version": 1,
    }


def sample_distillation(name: str, teacher: str, parameters: int) -> dict[str, Any]:
    record = sample_record(4, 16, 4, "do-acp", name)
    model = {"architecture": "Qwen3ForCausalLM", "parameters": parameters, "bytes": 2 * parameters}
    for key in ("statistics", "counts", "files"):
        del record[key]
    return record | {
        "verb": "distill",
        "command": f"burnish distill {name} --teacher {teacher} --tokens 4B --out 02-distill",
        "options": {"dataset": "fineweb-edu", "tokens": "4B", "loss": "forward-kl", "optimizer": "adamw", "lr": 1e-4},
        "source": {"name": name, "family": "qwen3", "model_type": "qwen3", **model},
        "output": model,
        "teacher": {"name": teacher, "parameters": 30_532_122_624, "bytes": 61_064_245_248},
        "training": {"tokens": 4_000_000_000, "steps": 2000, "tokens_per_second": 41_200.0, "tail_mass": None},
        "seconds": {"train": 97_087.0},
    }


def sample_metrics(steps: int = 2000, tokens: int = 2_000_000) -> list[dict[str, Any]]:
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        kl = 0.12 + 4.1 * (1 + step / 8) ** -0.75
        noisy = kl * math.exp(0.12 * draw.gauss(0, 1))
        line = {"step": step, "tokens": step * tokens, "loss": noisy, "kl": noisy, "nll": 2.16 + noisy * 0.9}
        lines.append(line | {"lr": 1e-4, "grad_norm": 0.7, "seconds": 48.5 * step})
        if step % (steps // 10) == 0 or step == 1:
            lines.append({"step": step, "tokens": step * tokens, "eval_kl": kl, "eval_nll": 2.16 + 0.9 * kl})
    return lines


def sample_prune_plan(**changes: Any) -> dict[str, Any]:
    draw = random.Random(3)
    influence = [0.32] + [0.03 + 0.09 * draw.random() for _ in range(10)] + [0.41]
    return {
        "format": "burnish.prune.plan/1",
        "source_shape": {
            "num_hidden_layers": 12,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "target_shape": {
            "num_hidden_layers": 9,
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "layers": "0-3,6-9,11",
        "block_influence": influence,
    } | changes


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value), encoding="utf-8")
        return
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run of `layers` x `experts` keeping `keep`, and returns its directory."""

    def make(
        layers: int = 4, experts: int = 16, keep: int = 4, *, evaluated: bool = True, name: str = "Qwen3-30B-A3B"
    ) -> Path:
        directory = tmp_path / f"do-acp-k{keep}"
        record = sample_record(layers, experts, keep, "do-acp", name)
        write(directory / "burnish.json", record)
        write(directory / "plan.json", sample_plan(layers, experts, keep, "do-acp"))
        if evaluated:
            students = [(directory.name, record["output"]["parameters"], 24.31, 2.14)]
            write(directory / "evaluation.json", sample_evaluation(students, record["source"]["parameters"]))
        return directory

    return make


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[[], Path]:
    """Writes four runs of one model and the evaluation they share, and returns the directory around them."""

    def make() -> Path:
        directory = tmp_path / "demo"
        students = []
        parameters = 0
        for seed, (score, keep, perplexity, speed) in enumerate(
            [("do-acp", 4, 24.31, 2.14), ("do-acp", 8, 14.77, 1.31), ("sf", 4, 41.9, 2.11), ("sf", 16, 12.6, 0.83)]
        ):
            record = sample_record(4, 32, keep, score)
            parameters = record["source"]["parameters"]
            name = f"{score}-k{keep}"
            write(directory / name / "burnish.json", record)
            write(directory / name / "plan.json", sample_plan(4, 32, keep, score, seed))
            students.append((name, record["output"]["parameters"], perplexity, speed))
        write(directory / "evaluation.json", sample_evaluation(students, parameters))
        return directory

    return make


@pytest.fixture
def make_distillation(tmp_path: Path) -> Callable[..., Path]:
    """Writes a distillation with a course of training, and returns its directory."""

    def make(metrics: list[dict[str, Any]] | None = None) -> Path:
        directory = tmp_path / "distilled"
        write(directory / "burnish.json", sample_distillation("do-acp-k4", "Qwen3-30B-A3B", 773_000_000))
        write(directory / "metrics.jsonl", sample_metrics() if metrics is None else metrics)
        return directory

    return make


@pytest.fixture
def make_pruning(tmp_path: Path) -> Callable[..., Path]:
    """Writes a pruning of 12 layers to 9, and returns its directory."""

    def make(**changes: Any) -> Path:
        directory = tmp_path / "pruned"
        write(directory / "burnish.json", sample_record(4, 16, 4, "influence", "Qwen3-1.7B") | {"verb": "prune"})
        write(directory / "plan.json", sample_prune_plan(**changes))
        return directory

    return make


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[[], Path]:
    """Writes a recipe of two steps with tasks and speeds at two batch sizes, and returns its directory."""

    def make() -> Path:
        directory = tmp_path / "recipe"
        first = sample_record(4, 16, 4, "do-acp")
        before, after = first["source"]["parameters"], first["output"]["parameters"]
        write(directory / "burnish.json", {"format": "burnish.run/1", "verb": "run", "options": {}, "steps": []})
        write(directory / "01-densify" / "burnish.json", first)
        write(directory / "01-densify" / "plan.json", sample_plan(4, 16, 4, "do-acp"))
        write(directory / "02-distill" / "burnish.json", sample_distillation("01-densify", "Qwen3-30B-A3B", after))
        write(directory / "02-distill" / "metrics.jsonl", sample_metrics())
        names = ["/runs/recipe/01-densify", "/runs/recipe/02-distill"]
        evaluation = sample_evaluation([(names[0], after, 214.3, 2.14), (names[1], after, 10.9, 2.1)], before)
        for row, speed in zip(evaluation["rows"], (1.0, 2.14, 2.1), strict=True):
            parameters = row["num_parameters"]
            row["speeds"] = [sample_speed(size, parameters, speed * size / 4) for size in (1, 4, 16)]
        evaluation["tasks"] = [
            sample_task("hellaswag", [0.612, 0.268, 0.577], metric="acc_norm"),
            sample_task("mmlu", [0.588, 0.251, 0.541], limit=100),
            sample_task("wikitext", [9.1, 240.0, 11.2], metric="word_perplexity", higher_is_better=False),
        ]
        write(directory / "evaluation.json", evaluation)
        return directory

    return make
