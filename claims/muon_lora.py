"""Claims of "Uniform Spectral Growth and Convergence of Muon in LoRA-Style Matrix Factorization", arXiv 2602.06385.

The statements are those of its abstract and of readers' notes; the target of its toy is not known, so ours is
(5, 4, 3, 2, 1). Its fine-tunings (RoBERTa on SST-2, LLaMA-3.2-1B on Alpaca) are observations without numbers; here
SmolLM2-135M reads Jane Austen. The claim with the budget `cpu-hours` fetches that model and text once:
`burnish claims run --budget cpu-hours --only lora-fine-tuning --scratch DIR` finds its finished runs again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.diagnose.factors import (
    Factorization,
    Trajectory,
    best_residual,
    descend,
    flow,
    gradient,
    lora_start,
    matrix_with,
    smoothed,
    soft_threshold,
    spectral,
    spectral_time,
)
from burnish.diagnose.spectrum import effective_rank, growth_rates, hit_order, hit_steps
from burnish.optim import Muon
from burnish.runs.claims import Claim, Measurement, Verdict

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
TOY = (5.0, 4.0, 3.0, 2.0, 1.0)
TOY_SETTING = "Y 60 x 70 with singular values 5, 4, 3, 2, 1, r = 5, A = 0, B Gaussian times 1e-3, float64, seeds 0-2"
TARGET = torch.tensor(TOY, dtype=torch.float64)


def _toy(seed: int, *, size: float = 1e-3) -> Factorization:
    draw = torch.Generator().manual_seed(seed)
    return lora_start(matrix_with(TOY, 60, 70, draw), len(TOY), size=size, generator=draw)


def _muon(method: str) -> Callable[[list[torch.nn.Parameter]], Muon]:
    """Muon whose steps are of length lr in every direction, as the flow's are."""
    return lambda both: Muon(both, lr=0.01, weight_decay=0.0, scale="none", orthogonalization=method)


WAYS: dict[str, Callable[[Factorization], Trajectory]] = {
    "exact": lambda start: flow(start, spectral, lr=0.01, steps=300),
    "Muon, Polar Express": lambda start: descend(start, _muon("polar-express"), steps=300),
    "Muon, Newton-Schulz": lambda start: descend(start, _muon("newton-schulz"), steps=300),
    "Adam": lambda start: descend(start, partial(torch.optim.Adam, lr=0.01), steps=600),
    "gradient descent": lambda start: flow(start, gradient, lr=0.01, steps=1500),
}


def _verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def uniform_growth(scratch: Path) -> Measurement:
    """Largest over smallest singular value and effective rank when their sum first is a quarter of the target's."""
    bounds: dict[str, Callable[[float], bool]] = {
        "exact": lambda ratio: ratio < 1.2,
        "Muon, Polar Express": lambda ratio: ratio < 1.2,
        "Muon, Newton-Schulz": lambda ratio: ratio < 3,
        "Adam": lambda ratio: ratio > 20,
        "gradient descent": lambda ratio: ratio > 1e3,
    }
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    ranks: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in SEEDS:
        for name, way in WAYS.items():
            values = way(_toy(seed)).at_share(0.25)
            ratios[name].append(float(values[0] / values[-1]))
            ranks[name].append(float(effective_rank(values)))
    held = {name: all(map(bounds[name], found)) for name, found in ratios.items()}
    number = "; ".join(
        f"{name} {_range(ratios[name])} (effective rank {statistics.mean(ranks[name]):.2f})" for name in WAYS
    )
    verdict = _verdict(all(held.values()), all(held[name] for name in held if name != "Adam"))
    return Measurement(verdict, f"d1/d5: {number}", {"ratios": ratios, "effective_ranks": ranks, "seeds": SEEDS})


def arrival_order(scratch: Path) -> Measurement:
    """Steps to 90% of the target by mode."""
    expected = {"exact": "smallest-first", "Muon, Polar Express": "smallest-first", "gradient descent": "largest-first"}
    hits: dict[str, list[tuple[int | None, ...]]] = {name: [] for name in WAYS}
    for seed in SEEDS:
        for name, way in WAYS.items():
            path = way(_toy(seed))
            hits[name].append(hit_steps(path.steps, path.singular_values, TARGET, share=0.9))
    orders = {name: [hit_order(found) for found in hits[name]] for name in WAYS}
    held = [set(orders[name]) == {order} for name, order in expected.items()]
    number = "; ".join(f"{name} {', '.join(map(str, hits[name][0]))}" for name in WAYS)
    return Measurement(
        _verdict(all(held), any(held)),
        f"steps to 90% of 5, 4, 3, 2, 1 (seed 0): {number}",
        {"hits": hits, "orders": orders, "seeds": SEEDS},
    )


def equal_rate(scratch: Path) -> Measurement:
    """Slope of sqrt(d) by mode from time 0.2 to 0.9, steps to 95%, and how the spread follows the size of the start."""
    slopes: dict[str, list[list[float]]] = {"exact": [], "smoothed 0.01": [], "Muon, Polar Express": []}
    ways = {**WAYS, "smoothed 0.01": lambda start: flow(start, smoothed(0.01), lr=0.01, steps=300)}
    late, factors = [], []
    for seed in SEEDS:
        for name in slopes:
            path = ways[name](_toy(seed))
            slopes[name].append(growth_rates(path.times, path.singular_values, start=0.2, end=0.9).tolist())
            if name == "exact":
                hits = hit_steps(path.steps, path.singular_values, TARGET, share=0.95)
                late += [abs(hit - 100 * spectral_time(s, 0.95)) for hit, s in zip(hits, TOY, strict=True) if hit]
        spreads = []
        for size in (1e-2, 1e-3, 1e-4):
            roots = flow(_toy(seed, size=size), spectral, lr=0.001, steps=500, every=500).singular_values[-1].sqrt()
            spreads.append(float(roots[0] - roots[-1]))
        factors += [larger / smaller for larger, smaller in pairwise(spreads)]
    off = {name: max(abs(slope - 1) for row in found for slope in row) for name, found in slopes.items()}
    flows = max(off["exact"], off["smoothed 0.01"])
    held = (flows <= 0.01, len(late) == 15 and max(late) <= 2, all(8 <= factor <= 12 for factor in factors))
    number = (
        f"slopes within {off['exact']:.0e} of 1 (smoothed {off['smoothed 0.01']:.0e}, Muon with Polar Express"
        f" {off['Muon, Polar Express']:.2f}), arrival within {max(late):.1f} of about 100 to 220 steps, spread"
        f" {_range(factors)} times smaller for a start 10 times smaller"
    )
    return Measurement(
        _verdict(all(held), held[0]), number, {"slopes": slopes, "spread_factors": factors, "seeds": SEEDS}
    )


STARTS = 20


def _random_start(target: Tensor, rank: int, draw: torch.Generator) -> Factorization:
    """Both factors Gaussian, of a size drawn between 0.01 and 1."""
    size = 10 ** float(-2 * torch.rand((), generator=draw))
    rows, columns = target.shape
    a, b = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((rows, rank), (rank, columns)))
    return Factorization(size * a, size * b, target)


def convergence(scratch: Path) -> Measurement:
    """Residual of the smoothed flow over the best one of that rank, from random starts."""
    excess, norms = [], []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        target = matrix_with(range(10, 0, -1), 60, 70, draw)
        for _ in range(STARTS):
            end = flow(_random_start(target, 5, draw), smoothed(0.05), lr=0.002, steps=6000, every=6000).end
            excess.append(float(end.error.norm()) / best_residual(target, 5) - 1)
            norms.append(max(float(end.a.norm()), float(end.b.norm())))
    share = sum(value < 1e-3 for value in excess) / len(excess)
    return Measurement(
        _verdict(share == 1, share >= 0.9),
        f"{share:.0%} of {len(excess)} starts within 0.1% of the best residual, the worst at {max(excess):.1e}; largest"
        f" factor norm {max(norms):.1f}",
        {"excess": excess, "factor_norms": norms, "seeds": SEEDS},
    )


def l2_threshold(scratch: Path) -> Measurement:
    """Singular values and imbalance at the end of the smoothed flow with l2, from random starts."""
    worst, imbalance, ends = 0.0, 0.0, {}
    for l2 in (0.5, 1.5):
        for seed in SEEDS:
            draw = torch.Generator().manual_seed(seed)
            target = matrix_with(TOY, 60, 70, draw)
            end = flow(_random_start(target, 5, draw), smoothed(0.05), lr=0.002, steps=8000, l2=l2, every=8000).end
            wanted = soft_threshold(target, 5, l2)
            worst = max(worst, float((end.singular_values - wanted).abs().max()))
            imbalance = max(imbalance, float(end.imbalance.norm()))
            ends[f"{l2}, seed {seed}"] = end.singular_values.tolist()
    return Measurement(
        _verdict(worst <= 1e-3 and imbalance <= 1e-3, worst <= 1e-2),
        f"largest deviation from max(s - lambda, 0) {worst:.1e}, from balanced factors {imbalance:.1e}",
        {"ends": ends, "seeds": SEEDS},
    )


RANK, LENGTH, STEPS, MEASURED_EVERY = 8, 96, 40, 5
LEARNING_RATES = {"muon": 3e-3, "adamw": 3e-3, "sgd": 0.3}
"""Of 1e-3, 3e-3 and 1e-2 for Muon and AdamW, and of 0.1, 0.3 and 1 for SGD: each the best of a run of its own."""


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint, fetched once by the test suite's own means."""
    command = [sys.executable, "-c", "from tests.smollm2 import original; print(original())"]
    found = Path(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip())
    if not found.is_dir():
        raise RuntimeError(str(found))
    return found


def _novels(scratch: Path) -> tuple[Path, Path]:
    """Five novels of Jane Austen to train on, and one that is held out."""
    folder, train, held_out = scratch / "texts", scratch / "novels.txt", scratch / "northanger-abbey.txt"
    if not folder.exists():
        spec = importlib.util.spec_from_file_location("train_miniature", ROOT / "examples" / "train_miniature.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.main(["--fetch", "--text-dir", str(folder)])
    chapters = sorted((folder / "austen").glob("*.txt"))
    for file, wanted in ((train, False), (held_out, True)):
        texts = [path.read_text() for path in chapters if path.name.startswith("northanger") == wanted]
        file.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return train, held_out


def _optimizer(name: str, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "muon":
        return Muon(factors, lr=lr, weight_decay=0.0, scale="match_rms_adamw")
    if name == "adamw":
        return torch.optim.AdamW(factors, lr=lr, weight_decay=0.0)
    return torch.optim.SGD(factors, lr=lr, momentum=0.9)


def fine_tune(scratch: Path, name: str, seed: int, lr: float, steps: int = STEPS) -> Path:
    """One LoRA fine-tuning with its spectra and held-out losses; the directory of its run."""
    out = scratch / f"{name}-{lr:g}-{seed}"
    if (out / "losses.json").exists():
        return out
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from burnish.data.text import token_blocks
    from burnish.diagnose import SpectrumTracker

    source, (train, held_out) = _smollm2(), _novels(scratch)
    tokenizer = AutoTokenizer.from_pretrained(source)
    blocks = [
        token_blocks(tokenizer, file, num_samples=count, max_length=LENGTH, seed=draw).input_ids
        for file, count, draw in ((train, 4 * steps, seed), (held_out, 16, 0))
    ]
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]),
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        bf16=True,
        use_cpu=True,
        seed=seed,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=MEASURED_EVERY,
        eval_on_start=True,
        logging_steps=MEASURED_EVERY,
        save_strategy="no",
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=[],
    )
    optimizer = _optimizer(name, model, lr)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rows = [[{"input_ids": ids, "labels": ids} for ids in part] for part in blocks]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        callbacks=[SpectrumTracker(out, every=MEASURED_EVERY, overwrite=True)],
        optimizers=(optimizer, constant),
    )
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    (out / "losses.json").write_text(json.dumps(losses))
    return out


def _course(out: Path) -> tuple[dict[int, float], dict[int, list[dict[str, Any]]]]:
    """Held-out loss, and the spectra of all adapters, by step."""
    losses = {int(step): loss for step, loss in json.loads((out / "losses.json").read_text()).items()}
    spectra: dict[int, list[dict[str, Any]]] = {}
    for line in (out / "spectrum.jsonl").read_text().splitlines():
        measured = json.loads(line)
        spectra.setdefault(measured["step"], []).append(measured)
    return losses, spectra


def fine_tuning(scratch: Path) -> Measurement:
    """Mean effective rank of 60 adapters where each optimizer first is at the loss that all three reach."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LEARNING_RATES}
    for seed in SEEDS:
        courses = {name: _course(fine_tune(scratch, name, seed, lr)) for name, lr in LEARNING_RATES.items()}
        common = max(min(losses.values()) for losses, _ in courses.values())
        for name, (losses, spectra) in courses.items():
            step = next(step for step, loss in losses.items() if loss <= common)
            last = max(spectra)
            found[name].append(
                {
                    "start_loss": losses[0],
                    "matched_loss": common,
                    "step": step,
                    "final_loss": losses[last],
                    "effective_rank": _mean(spectra[step], "effective_rank"),
                    "growth_variation": _mean(spectra[step], "growth_variation"),
                    "final_effective_rank": _mean(spectra[last], "effective_rank"),
                    "median_singular_values": [
                        statistics.median(values)
                        for values in zip(*(line["singular_values"] for line in spectra[step]), strict=True)
                    ],
                }
            )
    ranks = {name: [run["effective_rank"] for run in runs] for name, runs in found.items()}
    wins = {name: all(m > o for m, o in zip(ranks["muon"], ranks[name], strict=True)) for name in ("adamw", "sgd")}
    number = ", ".join(
        f"{name} {statistics.mean(values):.2f} ({_range(values)}) after {_range([run['step'] for run in found[name]])}"
        " steps"
        for name, values in ranks.items()
    )
    losses = [run["matched_loss"] for run in found["muon"]]
    return Measurement(
        _verdict(all(wins.values()), any(wins.values())),
        f"mean effective rank of 8 at held-out loss {_range(losses)}: {number}",
        {"runs": found, "learning_rates": LEARNING_RATES, "seeds": SEEDS},
    )


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    known = [line[key] for line in lines if line[key] is not None]
    return statistics.mean(known) if known else math.nan


def _range(values: list[float]) -> str:
    """Lowest and highest, to three digits."""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


CLAIMS = [
    Claim(
        name="uniform-growth",
        source="abstract; Theorem 5.7",
        statement="Muon, and steps with exactly orthogonal factors, grow all singular values of the product nearly"
        " alike; gradient descent does not.",
        paper_number="near-uniform (no number)",
        setting=TOY_SETTING + "; lr 0.01, momentum 0.95; when the sum of d first is 25% of the target's",
        reproduced_if="d1/d5 < 1.2 for exact steps and for Polar Express, < 3 for Newton-Schulz, > 20 for Adam, > 1e3"
        " for gradient descent, every seed; partly if all but Adam's",
        budget="cpu-minutes",
        measure=uniform_growth,
    ),
    Claim(
        name="order-of-arrival",
        source="abstract",
        statement="Under orthogonalised steps small target singular values are reached first, under gradient descent"
        " the largest.",
        paper_number="-",
        setting=TOY_SETTING + "; lr 0.01; steps to 90% of the target",
        reproduced_if="smallest first under exact steps and under Muon with Polar Express, largest first under gradient"
        " descent, every seed; partly if some of the three",
        budget="cpu-minutes",
        measure=arrival_order,
    ),
    Claim(
        name="equal-rate",
        source="Theorem 5.7",
        statement="The square roots of the active singular values grow at nearly the unit rate, with deviations that"
        " vanish with the size of the start.",
        paper_number="1",
        setting=TOY_SETTING + "; exact and smoothed flow, lr 0.01; starts of 1e-2, 1e-3 and 1e-4 at lr 0.001",
        reproduced_if="all slopes of sqrt(d) within 0.01 of 1 for both flows, arrival at 95% within 2 steps of"
        " sqrt(.95 s)/lr, spread 8 to 12 times smaller for a start 10 times smaller; partly if the slopes",
        budget="cpu-minutes",
        measure=equal_rate,
    ),
    Claim(
        name="convergence-from-random-starts",
        source="Theorem 6.2",
        statement="From almost every start the flow converges to a global minimum unless the factors' norms diverge.",
        paper_number="almost every",
        setting="Y 60 x 70 with singular values 10, 9 .. 1, r = 5, both factors Gaussian of size 0.01 to 1, smoothed"
        " flow with beta 0.05, lr 0.002, 6,000 steps, float64, 20 starts each of seeds 0-2",
        reproduced_if="every start ends within 0.1% of the residual of the best rank-5 approximation; partly if 90% do",
        budget="cpu-minutes",
        measure=convergence,
    ),
    Claim(
        name="l2-soft-threshold",
        source="Theorem 6.2 with l2 (its global convergence; where it converges to is derived here)",
        statement="With l2 on the factors the flow converges globally: singular values max(s - lambda, 0), balanced"
        " factors.",
        paper_number="global minimum",
        setting="as the toy, both factors Gaussian of size 0.01 to 1, lambda 0.5 and 1.5, smoothed flow with beta 0.05,"
        " lr 0.002, 8,000 steps, seeds 0-2",
        reproduced_if="all singular values within 1e-3 and ||A^T A - B B^T|| <= 1e-3, every seed; partly if within"
        " 1e-2",
        budget="cpu-minutes",
        measure=l2_threshold,
    ),
    Claim(
        name="lora-fine-tuning",
        source="LoRA experiments (RoBERTa, LLaMA-3.2-1B; rank 8 on q and v)",
        statement="Adapters trained with Muon have a flatter spectrum than those of AdamW or gradient descent.",
        paper_number="near-uniform (no number)",
        setting=f"SmolLM2-135M-Instruct, rank {RANK} on q and v (60 adapters), {STEPS} steps of 4 x {LENGTH} tokens of"
        " five novels, bfloat16 autocast, constant lr (best of three by held-out loss after 20 steps, seed 3), no"
        " decay, no clipping; compared where each first has the held-out loss that all reach; 1,536 held-out tokens,"
        " seeds 0-2",
        reproduced_if="mean effective rank under Muon above AdamW's and SGD's, every seed; partly if above one of them",
        budget="cpu-hours",
        measure=fine_tuning,
    ),
]
