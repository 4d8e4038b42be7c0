"""Claims of "Pruning and Distilling Mixture-of-Experts into Dense Language Models", arXiv 2605.28207.

The headline (+6.3 points over dense-to-dense pruning at 4 billion tokens) needs a 30B teacher. Here the bundled
miniature stands for it, and its dense counterpart of as many parameters, trained on the same text, for the dense
teacher. Claims with the budget `cpu-hours` fetch that text and train the counterpart in the scratch directory, once:
`burnish claims run --budget cpu-hours --scratch DIR` finds its finished runs again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from burnish.data import bundled_model, bundled_text
from burnish.densify import densify
from burnish.densify.scale import relative_block_error, uniform
from burnish.densify.score import SCORES, importance
from burnish.densify.select import d_optimal, effective_rank, importance_kernel, top_k
from burnish.densify.statistics import LayerStatistics, output_sums, router_sums
from burnish.distill import distill
from burnish.evaluate import evaluate
from burnish.families import FAMILIES, describe_student, outline, resolve_config
from burnish.prune import prune
from burnish.recipes.sweep import sweep
from burnish.runs.claims import Claim, Measurement

SEEDS = (0, 1, 2)
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "vocab_size": 151936,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "intermediate_size": 10944, "first_k_dense_replace": 1, "vocab_size": 102400,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "intermediate_size": 2880, "vocab_size": 201088, "tie_word_embeddings": False,
}  # fmt: skip


def concatenation_is_exact(scratch: Path) -> Measurement:
    """Blocks side by side against the scaled sum of the experts, float64."""
    worst = 0.0
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        count, width, hidden = 8, 96, 64
        gate, up = (torch.randn(count, width, hidden, generator=generator).double() / 8 for _ in range(2))
        down = torch.randn(count, hidden, width, generator=generator).double() / 10
        scales = torch.rand(count, generator=generator).double()
        inputs = torch.randn(50, hidden, generator=generator).double()
        silu = torch.nn.functional.silu
        separate = sum(scales[e] * (silu(inputs @ gate[e].mT) * (inputs @ up[e].mT)) @ down[e].mT for e in range(count))
        wide_down = torch.cat([scales[e] * down[e] for e in range(count)], dim=1)
        dense = (silu(inputs @ gate.flatten(0, 1).mT) * (inputs @ up.flatten(0, 1).mT)) @ wide_down.mT
        worst = max(worst, float((dense - separate).abs().max()))
    return Measurement(
        "reproduced" if worst <= 1e-12 else "not reproduced", f"largest difference {worst:.1e}", {"seeds": SEEDS}
    )


def parameter_counts(scratch: Path) -> Measurement:
    """The planner's counts for the three released students."""
    published = {"qwen3_moe": 3_340_449_792, "deepseek_v2": 2_659_708_416, "gpt_oss": 4_185_089_880}
    found = {}
    for config in (QWEN3_30B_A3B, DEEPSEEK_V2_LITE, GPT_OSS_20B):
        name = config["model_type"]
        student = describe_student(
            outline(config), FAMILIES[name], resolve_config(config), config["num_experts_per_tok"]
        )
        found[name] = student.num_parameters
    verdict = "reproduced" if found == published else "not reproduced"
    return Measurement(verdict, ", ".join(f"{count:,}" for count in found.values()), {"published": published})


def score_ranking(scratch: Path) -> Measurement:
    """Held-out perplexity of students of the bundled model by score, pure pruning, uniform scaling, three seeds."""
    found: dict[str, list[float]] = {score: [] for score in SCORES}
    teacher = bundled_model()
    for seed in SEEDS:
        stored = None
        students = []
        for score in ("do-acp", *(name for name in SCORES if name != "do-acp")):
            out = scratch / f"{score}-{seed}"
            densify(teacher, out, score=score, num_samples=128, max_length=256, seed=seed, statistics=stored)
            stored = stored or out / "statistics" / "routing.safetensors"
            students.append(out)
        result = evaluate(
            before=teacher, after=students, num_samples=192, max_length=256,
            dtype="float32", speed=False,
        )  # fmt: skip
        for student, row in zip(students, result.rows[1:], strict=True):
            found[student.name.rpartition("-")[0]].append(row.perplexity.value)
    means = {score: statistics.mean(values) for score, values in found.items()}
    order = sorted(means, key=means.__getitem__)
    first_two = set(order[:2]) == {"acp", "do-acp"}
    router_only = [score for score in order if score in ("sf", "pp", "cp")]
    verdict = "reproduced" if first_two and router_only[0] == "cp" else "not reproduced"
    if verdict == "not reproduced" and (order[0] in ("acp", "do-acp") or router_only[0] == "cp"):
        verdict = "partly"
    number = " < ".join(f"{score} {means[score]:.0f}" for score in order)
    return Measurement(verdict, f"perplexity {number}", {"perplexities": found, "seeds": SEEDS})


def planted_redundancy(scratch: Path) -> Measurement:
    """Half of the popular experts are noisy copies of one: block error and effective rank of 4 kept of 16."""
    errors: dict[str, list[float]] = {"sf": [], "do-acp": []}
    ranks: dict[str, list[float]] = {"sf": [], "do-acp": []}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        tokens, hidden, count, keep = 2000, 32, 16, 4
        outputs = torch.randn(count, tokens, hidden, generator=generator)
        for copy in range(1, 4):
            outputs[copy] = outputs[0] + 0.1 * torch.randn(tokens, hidden, generator=generator)
        logits = torch.randn(tokens, count, generator=generator)
        logits[:, :8] += 0.8  # experts 0..7 are popular; 0..3 of them are the copies
        logits[:, :4] += 0.3
        gates, indices = logits.softmax(-1).topk(keep)
        dense = torch.zeros(tokens, count).scatter(1, indices, gates / gates.sum(-1, keepdim=True))
        sums = router_sums(logits, logits.softmax(-1), dense, dense > 0) | output_sums(outputs, dense, dense > 0)
        stats = LayerStatistics(**sums)
        kernel = importance_kernel(importance(stats, "do-acp"), stats.gram / stats.num_tokens)
        chosen = {"sf": top_k(importance(stats, "sf"), keep), "do-acp": d_optimal(kernel, keep)}
        for score, kept in chosen.items():
            groups = [[expert] for expert in kept]
            errors[score].append(relative_block_error(stats, groups, uniform(stats, groups, kernel[0])))
            ranks[score].append(effective_rank(stats.gram[kept][:, kept]))
    better = all(d < s for d, s in zip(errors["do-acp"], errors["sf"], strict=True))
    wider = all(d > s for d, s in zip(ranks["do-acp"], ranks["sf"], strict=True))
    number = "relative block error {:.3f} against {:.3f}, effective rank {:.2f} against {:.2f}".format(
        *(statistics.mean(values[score]) for values in (errors, ranks) for score in ("do-acp", "sf"))
    )
    verdict = "reproduced" if better and wider else "partly" if better or wider else "not reproduced"
    return Measurement(verdict, number, {"errors": errors, "ranks": ranks, "seeds": SEEDS})


SETTING = (
    "bundled 3.6M teacher, 1.2M students, 524,288 tokens of its training text, AdamW, cosine, bfloat16 autocast, best"
    " learning rate of each start, 32,768 held-out tokens (16,384 along the course), seeds 0-2"
)
EXAMPLES = Path(__file__).parents[1] / "examples"
TOKENS = 524_288
DISTILLATION = {
    "tokens": TOKENS, "max_length": 256, "batch_size": 16, "eval_samples": 64, "eval_every": TOKENS // 8,
    "dtype": "bfloat16", "device": "cpu",
}  # fmt: skip
LEARNING_RATE = {"experts": 5e-3, "random-ffn": 5e-3, "random": 2e-3, "pruned": 5e-3}
"""Each start has the best of 1e-3, 2e-3 and 5e-3 in one run of 262,144 tokens (seed 0)."""
STUDENT_SHAPE = {"layers": 4, "hidden_size": 128, "intermediate_size": 512, "heads": 4, "kv_heads": 2}


def _training_text(scratch: Path) -> Path:
    """The text that the miniature was trained on, without the held-out documents."""
    file = scratch / "train.txt"
    if not file.exists():
        script = _example("train_miniature")
        folder = scratch / "texts"
        if not folder.exists():
            script.main(["--fetch", "--text-dir", str(folder)])
        texts, _ = script.split_texts(script.parse(["--text-dir", str(folder)]))
        file.write_text(script.join(texts), encoding="utf-8")
    return file


def _dense_teacher(scratch: Path) -> Path:
    """The miniature's dense counterpart, trained on the same rows in the same order."""
    out = scratch / "counterpart"
    if not (out / "training.json").exists():
        _training_text(scratch)
        command = [sys.executable, "train_counterpart.py", "--text-dir", str(scratch / "texts"), "--out", str(out)]
        subprocess.run([*command, "--work-dir", str(scratch / "counterpart-work")], cwd=EXAMPLES, check=True)
    return out


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _students(scratch: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """Start of each kind and its teacher; all starts have the same shape."""
    moe, starts = bundled_model(), {}
    for name, options in {
        "experts": {},
        "merged": {"keep": 8},
        "random-ffn": {"init": "random-ffn"},
        "random": {"init": "random"},
    }.items():
        starts[name] = (scratch / f"start-{name}-{seed}", moe)
        if not starts[name][0].exists():
            densify(moe, starts[name][0], num_samples=256, max_length=256, seed=seed, **options)
    return starts


def _distilled(scratch: Path, kind: str, student: Path, teacher: Path, seed: int) -> dict[str, Any]:
    """Final evaluation, course and speed of one distillation; a finished one is read again."""
    out = scratch / f"distilled-{kind}-{seed}"
    if not out.exists():
        lr = LEARNING_RATE.get(kind, LEARNING_RATE["experts"])
        distill(
            student, out, teacher=teacher, dataset=_training_text(scratch), eval_dataset=bundled_text("heldout"),
            lr=lr, seed=seed, **DISTILLATION,
        )  # fmt: skip
    measured = scratch / f"final-{kind}-{seed}.json"
    if not measured.exists():  # on the same tokens for every seed
        found = evaluate(before=teacher, after=out, num_samples=128, max_length=256, dtype="float32", speed=False)
        measured.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    row = json.loads(measured.read_text(encoding="utf-8"))["rows"][1]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    course = [(line["tokens"], line["eval_kl"], line["eval_nll"]) for line in lines if "eval_kl" in line]
    training = json.loads((out / "burnish.json").read_text())["training"]
    return {
        "tokens": [tokens for tokens, _, _ in course],
        "kl": [kl for _, kl, _ in course],
        "nll": [nll for _, _, nll in course],
        "final_kl": row["comparison"]["forward_kl"]["value"],
        "final_nll": row["nll"]["value"],
        "tokens_per_second": training["tokens_per_second"],
    }


def _course(scratch: Path, kinds: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Distillations of several starts, all seeds; the kinds alternate, so that all meet the same disturbances."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in SEEDS:
        starts = _students(scratch, seed)
        if "pruned" in kinds:
            dense = _dense_teacher(scratch)
            starts["pruned"] = (scratch / f"start-pruned-{seed}", dense)
            if not starts["pruned"][0].exists():
                prune(dense, starts["pruned"][0], num_samples=256, max_length=256, seed=seed, **STUDENT_SHAPE)
        for kind in kinds:
            found[kind].append(_distilled(scratch, kind, *starts[kind], seed))
    return found


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean and its 95 % interval over the seeds (Student's t with two degrees of freedom)."""
    half = 4.303 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def _details(runs: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    setting = {**DISTILLATION, "learning_rates": LEARNING_RATE}
    return {"runs": runs, "setting": setting, "seeds": SEEDS, **more}


def initialisations(scratch: Path) -> Measurement:
    """Held-out KL after equal distillation tokens from three starts."""
    kinds = ("experts", "random-ffn", "random")
    runs = _course(scratch, kinds)
    final = {kind: [run["final_kl"] for run in runs[kind]] for kind in kinds}
    ordered = [a < b < c for a, b, c in zip(*final.values(), strict=True)]
    means = [statistics.mean(values) for values in final.values()]
    verdict = "reproduced" if all(ordered) else "partly" if means == sorted(means) else "not reproduced"
    number = "KL " + ", ".join(f"{kind} {_spread(values)}" for kind, values in final.items())
    return Measurement(verdict, number, _details(runs, final_kl=final))


def _tokens_to(run: dict[str, Any], kl: float) -> float:
    """Tokens at which a course first reaches a KL, by linear interpolation; infinite if never."""
    points = list(zip(run["tokens"], run["kl"], strict=True))
    for (t0, k0), (t1, k1) in itertools.pairwise(points):
        if k1 <= kl:
            return t0 + (t1 - t0) * min(1.0, max(0.0, (k0 - kl) / (k0 - k1))) if k0 > k1 else t1
    return math.inf


def tokens_to_kl(scratch: Path) -> Measurement:
    """Tokens with AdamW until a start from experts is where a random start ends."""
    runs = _course(scratch, ("experts", "random-ffn", "random"))
    saved: dict[str, list[float]] = {"random-ffn": [], "random": []}
    for kind, ratios in saved.items():
        for mine, other in zip(runs["experts"], runs[kind], strict=True):
            ratios.append(other["tokens"][-1] / _tokens_to(mine, other["kl"][-1]))
    verdict = "reproduced" if min(saved["random"]) >= 2 else "partly" if min(saved["random"]) > 1 else "not reproduced"
    number = ", ".join(f"{_spread(ratios, 1)}x fewer than {kind}" for kind, ratios in saved.items())
    return Measurement(verdict, number, _details(runs, tokens_saved=saved))


def _speed(scratch: Path) -> list[float]:
    """Tokens per second of distilling from the MoE over those from the dense teacher, in short runs by turns."""
    found: dict[str, list[float]] = {"experts": [], "pruned": []}
    places = {"experts": bundled_model(), "pruned": _dense_teacher(scratch)}
    options = {key: value for key, value in DISTILLATION.items() if not key.startswith("eval")} | {"tokens": 98_304}
    for number in range(5):
        for kind, teacher in places.items():
            out = scratch / f"speed-{kind}-{number}"
            result = distill(
                scratch / f"start-{kind}-0", out, teacher=teacher, dataset=_training_text(scratch), overwrite=True,
                **options,
            )  # fmt: skip
            found[kind].append(result.record["training"]["tokens_per_second"])
    return [mine / other for mine, other in zip(*found.values(), strict=True)]


def against_dense_to_dense(scratch: Path) -> Measurement:
    """Held-out log-likelihood of both students after equal tokens, and the ratio of training times."""
    runs = _course(scratch, ("experts", "pruned"))
    gains = [d["final_nll"] - m["final_nll"] for m, d in zip(runs["experts"], runs["pruned"], strict=True)]
    speed = _speed(scratch)
    verdict = "reproduced" if min(gains) > 0 else "partly" if statistics.mean(gains) > 0 else "not reproduced"
    perplexities = {kind: [math.exp(run["final_nll"]) for run in runs[kind]] for kind in runs}
    number = (
        f"nll lower by {_spread(gains)} nats (perplexity {_spread(perplexities['experts'], 1)} against"
        f" {_spread(perplexities['pruned'], 1)}), {statistics.median(speed):.2f}x the tokens per second"
    )
    training = json.loads((_dense_teacher(scratch) / "training.json").read_text())
    more = {"perplexities": perplexities, "speed": speed, "dense_teacher": training}
    return Measurement(verdict, number, _details(runs, **more))


def pruning_against_merging(scratch: Path) -> Measurement:
    """DO-ACP with K = k against K = 2k, merged by weights, after equal tokens."""
    runs = _course(scratch, ("experts", "merged"))
    final = {kind: [run["final_kl"] for run in runs[kind]] for kind in runs}
    better = [a < b for a, b in zip(*final.values(), strict=True)]
    verdict = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
    number = f"KL {_spread(final['experts'])} with K = 4, {_spread(final['merged'])} with K = 8"
    return Measurement(verdict, number, _details(runs, final_kl=final))


def scores_against_groupings(scratch: Path) -> Measurement:
    """The whole grid before distillation, once a seed: spread of mean log KL over the levels of each factor."""
    spreads: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    by_keep: list[dict[str, float]] = []
    for seed in SEEDS:
        out = scratch / f"sweep-{seed}"
        if not (out / "sweep.json").exists():
            sweep(bundled_model(), out, num_samples=256, max_length=256, dtype="float32", seed=seed)
        for effect in json.loads((out / "sweep.json").read_text())["effects"]:
            spreads.setdefault(effect["factor"], []).append(effect["spread"])
            shares.setdefault(effect["factor"], []).append(effect["share"])
            if effect["factor"] == "keep":
                by_keep.append({level["name"]: math.exp(level["mean"]) for level in effect["levels"]})
    ratios = [score / grouping for score, grouping in zip(spreads["score"], spreads["grouping"], strict=True)]
    verdict = "reproduced" if min(ratios) >= 2 else "partly" if min(ratios) > 1 else "not reproduced"
    number = "best to worst level of KL: " + ", ".join(
        f"{factor} {statistics.mean(math.exp(value) for value in values):.2f}x" for factor, values in spreads.items()
    )
    return Measurement(
        verdict, number, {"spreads": spreads, "shares": shares, "kl_by_kept_experts": by_keep, "seeds": SEEDS}
    )


CLAIMS = [
    Claim(
        name="concatenation-is-exact",
        source="section 3.1, Eq. 2, appendix A",
        statement="Block concatenation computes the scaled sum of the kept experts exactly.",
        paper_number="exact",
        setting="8 random experts of width 96, hidden 64, float64, seeds 0-2",
        reproduced_if="largest difference <= 1e-12",
        budget="cpu-minutes",
        measure=concatenation_is_exact,
    ),
    Claim(
        name="parameter-counts",
        source="model cards of the released students",
        statement="Students of Qwen3-30B-A3B (K=8), DeepSeek-V2-Lite (K=6) and GPT-OSS-20B (K=4) have these sizes.",
        paper_number="3,340,449,792, 2,659,708,416, 4,185,089,880",
        setting="our planner on the published configurations, headers only",
        reproduced_if="all three equal",
        budget="cpu-minutes",
        measure=parameter_counts,
    ),
    Claim(
        name="score-ranking",
        source="section 4.2, Fig. 4",
        statement="ACP and DO-ACP rank first; CP is the best of the router-only scores.",
        paper_number="ACP, DO-ACP first; CP best router-only",
        setting="bundled 3.6M model, K = top-k = 4, uniform scaling, held-out perplexity before distillation, 3 seeds",
        reproduced_if="ACP and DO-ACP are the two lowest mean perplexities and CP is below SF and PP; partly if one"
        " of the two is lowest or CP is the best router-only score",
        budget="cpu-minutes",
        measure=score_ranking,
    ),
    Claim(
        name="diverse-selection-on-redundant-experts",
        source="section 3.2, appendix E",
        statement="D-optimal selection avoids mutually redundant experts that frequency selects.",
        paper_number="-",
        setting="synthetic: 16 experts, 4 of the 8 popular ones noisy copies of one, 2,000 tokens, keep 4, seeds 0-2",
        reproduced_if="DO-ACP has lower block error and higher effective rank than SF for every seed; partly if one",
        budget="cpu-minutes",
        measure=planted_redundancy,
    ),
    Claim(
        name="distilled-initialisations",
        source="sections 4.1 and 4.4, Tables 6, 17 and 18",
        statement="After equal distillation, scored experts beat random feed-forwards, which beat a random start.",
        paper_number="58.1 / 45.4 (Qwen3), 42.4 / 30.3 / 30.3 (DeepSeek) points",
        setting=SETTING,
        reproduced_if="held-out KL is in this order for every seed; partly if the means are",
        budget="cpu-hours",
        measure=initialisations,
    ),
    Claim(
        name="tokens-to-a-given-kl",
        source="an independent implementation: about 4 times sooner (block reconstruction)",
        statement="A start from scored experts reaches the final quality of a random start much sooner.",
        paper_number="about 4x (not the paper's)",
        setting=SETTING,
        reproduced_if="at least 2 times fewer tokens than the random start needs, for every seed; partly if fewer",
        budget="cpu-hours",
        measure=tokens_to_kl,
    ),
    Claim(
        name="moe-to-dense-against-dense-to-dense",
        source="abstract, Table 6",
        statement="At matched parameters, tokens and data, MoE-to-dense beats pruning a dense teacher of the MoE's"
        " total size, and distils faster.",
        paper_number="+6.3 points, 1.6x faster",
        setting=SETTING + "; dense teacher of 3.6M (6 layers, hidden 192) trained on the same 14.7M tokens, pruned to"
        " the student's shape by `burnish prune`",
        reproduced_if="lower held-out nll for every seed; partly if the mean is lower",
        budget="cpu-hours",
        measure=against_dense_to_dense,
    ),
    Claim(
        name="pure-pruning-against-merging",
        source="section 4.2, Tables 6 and 17",
        statement="For the diversity-aware score, keeping k experts is better than merging 2k into k blocks.",
        paper_number="42.4 against 41.1 points (DeepSeek)",
        setting=SETTING,
        reproduced_if="lower held-out KL for every seed; partly if for some",
        budget="cpu-hours",
        measure=pruning_against_merging,
    ),
    Claim(
        name="scores-against-groupings",
        source="section 4.2; an independent implementation: 5.7 points between scores, 1 between groupings",
        statement="The choice of the score matters most, that of the grouping little.",
        paper_number="5.7 against about 1 point",
        setting="bundled 3.6M model, all 350 configurations before distillation, 65,536 calibration and 16,384 held-out"
        " tokens, seeds 0-2",
        reproduced_if="spread of mean log KL over scores at least twice that over groupings, every seed; partly if"
        " larger",
        budget="cpu-hours",
        measure=scores_against_groupings,
    ),
]
