"""Claims of "Pruning and Distilling Mixture-of-Experts into Dense Language Models", arXiv 2605.28207.

The headline (+6.3 points over dense-to-dense pruning at 4 billion tokens) needs a 30B teacher and is not measured
here. What is measured: the exactness of concatenation, the sizes of the released students, and how the scores rank
before any distillation.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from burnish.data import bundled_model
from burnish.densify import densify
from burnish.densify.scale import relative_block_error, uniform
from burnish.densify.score import SCORES, importance
from burnish.densify.select import d_optimal, effective_rank, importance_kernel, top_k
from burnish.densify.statistics import LayerStatistics, output_sums, router_sums
from burnish.evaluate import evaluate
from burnish.families import FAMILIES, describe_student, outline, resolve_config
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
]
