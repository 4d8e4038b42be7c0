"""Convert and observe a checkpoint with the true shapes of Qwen3-30B-A3B and random weights: memory, bytes and time.

python benchmarks/true_shape.py              write it, convert it, hold memory and time against the bars
python benchmarks/true_shape.py --observe    observe one layer of it, router-only and with every expert
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import pstats
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from burnish.checkpoint import Checkpoint, PlannedTensor, Shard, TensorInfo, plan_shards
from burnish.densify.observe import Calibration, observe
from burnish.densify.plan import DensifyPlan, LayerPlan
from burnish.densify.teacher import StreamedTeacher
from burnish.families import describe_student, detect_family, outline, resolve_config
from burnish.runs import environment, peak_rss_bytes, write_json

SIZES = ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts"]
SIZES += ["moe_intermediate_size", "intermediate_size", "vocab_size"]
TRUE = dict(zip(SIZES, (2048, 32, 4, 128, 128, 768, 6144, 151_936), strict=True))
SMALL = dict(zip(SIZES, (512, 8, 2, 64, 16, 256, 2048, 32_000), strict=True))
FULL_LAYERS, KEEP, SEED = 48, 8, 0
FULL_PARAMETERS = 3_340_449_792
SHARD_BYTES, COPY_BYTES, RESERVE_BYTES = 5 * 10**9, 8 * 2**20, 15 * 10**9
PEAK_BAR, RATIO_BAR = 2.5 * 2**30, 1.5
PHASES = {"load": "layer", "expert matmuls": "expert_outputs", "sums and Gram": "output_sums", "all": "observe"}


def config(sizes: dict[str, int], layers: int) -> dict[str, Any]:
    """`config.json` as published, with `layers` decoder layers."""
    fixed: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16"}
    fixed |= {"norm_topk_prob": True, "tie_word_embeddings": False, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
    fixed |= {"mlp_only_layers": [], "max_position_embeddings": 40_960, "rope_theta": 1e6, "hidden_act": "silu"}
    return fixed | sizes | {"num_hidden_layers": layers}


def layout(config: dict[str, Any]) -> tuple[Shard, ...]:
    """Every tensor of the checkpoint, under the published names, in shards of 5 GB."""
    tensors = outline(config).tensors.values()
    return plan_shards((PlannedTensor(tensor.name, "BF16", tensor.shape) for tensor in tensors), SHARD_BYTES)


def write_checkpoint(path: Path, config: dict[str, Any]) -> Path:
    """Write it: normal weights of deviation 0.02, taken from one random block at a different offset for each tensor."""
    path.mkdir()
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(SEED)).mul_(0.02).bfloat16()
    offsets = random.Random(SEED)
    shards = layout(config)
    for shard in shards:
        with (path / shard.file).open("wb", buffering=0) as file:
            file.write(shard.header())
            for tensor in shard.tensors:
                source = block.add(1) if tensor.name.endswith("norm.weight") else block
                view = source.view(torch.uint8).numpy().data
                left, start = tensor.nbytes, 2 * offsets.randrange(2**23)
                while left:
                    count = file.write(view[start : start + min(left, COPY_BYTES)])
                    left, start = left - count, (start + count) % len(view)
            os.fsync(file.fileno())
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    if len(shards) > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_plan(file: Path, config: dict[str, Any]) -> DensifyPlan:
    """Keep 8 experts of each layer, drawn by a seeded generator, with uniform scales."""
    draw, experts = random.Random(SEED), config["num_experts"]
    layers = [
        LayerPlan(
            layer=i,
            groups=[[e] for e in draw.sample(range(experts), KEEP)],
            weights=[[1.0]] * KEEP,
            scales=[1 / KEEP] * KEEP,
        )
        for i in range(config["num_hidden_layers"])
    ]
    plan = DensifyPlan(family="qwen3_moe", num_experts=experts, top_k=8, keep=KEEP, scaling="uniform", layers=layers)
    file.write_text(plan.to_json(), encoding="utf-8")
    return plan


def run_child(command: list[str]) -> dict[str, Any]:
    """Run a command that prints one JSON object; add the kernel's own high-water mark of its resident memory."""
    high = 0
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output) as child:
        while child.poll() is None:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            high = max([high, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {child.returncode}")
    record: dict[str, Any] = json.loads(text)
    return record | {"high_water_bytes": high}


def convert(model: Path, plan: Path, out: Path) -> dict[str, Any]:
    """`burnish densify MODEL --plan PLAN` in a process of its own; the output is removed again."""
    drop_from_cache(model)
    command = [str(Path(sys.executable).with_name("burnish")), "densify", str(model), "--out", str(out)]
    record = run_child([*command, "--plan", str(plan), "--device", "cpu", "--json"])
    shutil.rmtree(out)
    return record


def byte_ranges(model: Path, plan: DensifyPlan) -> Iterator[TensorInfo]:
    """What the conversion reads: the kept experts, and all that is copied."""
    kept = {f"model.layers.{layer.layer}.mlp.experts.{group[0]}" for layer in plan.layers for group in layer.groups}
    for name, info in Checkpoint.open(model).tensors.items():
        expert = ".mlp.experts." in name
        if (expert and name.rsplit(".", 2)[0] in kept) or not (expert or name.endswith(".mlp.gate.weight")):
            yield info


def plain_copy(model: Path, ranges: list[TensorInfo], target: Path) -> float:
    """Seconds to read the ranges in file order and write the same number of bytes, 8 MiB at a time, with fsync."""
    drop_from_cache(model)
    buffer = memoryview(bytearray(COPY_BYTES))
    start = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for info in ranges:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.start)
                for position in range(info.start, info.end, COPY_BYTES):
                    piece = buffer[: min(COPY_BYTES, info.end - position)]
                    if file.readinto(piece) != len(piece) or out.write(piece) != len(piece):
                        raise OSError(f"{info.file}: short read or write")
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def drop_from_cache(model: Path) -> None:
    """Ask the kernel to forget the source files, so that every measurement reads from the disk."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_act(work: Path, layers: int | None, repeats: int) -> dict[str, Any]:
    """Convert 4 layers, then `layers`, interleaved with plain copies of the same bytes."""
    counts = [4, layers or affordable_layers(work)]
    cases = [measure_case(work, TRUE, count, repeats) for count in dict.fromkeys(counts)]
    small = [measure_case(work, SMALL, count, 1) for count in (4, 40)]
    full = outline(config(TRUE, FULL_LAYERS))
    student = describe_student(full, detect_family(full.config), resolve_config(full.config), KEEP)
    peaks, small_peaks = ([case["peak_bytes"] for case in group] for group in (cases, small))
    off = {str(case["layers"]): case["forecast"]["act_peak_bytes"] / case["peak_bytes"] - 1 for case in cases + small}
    return {
        "cases": cases,
        "small_cases": small,
        "full_parameters": student.num_parameters,
        "bars": {
            "full_parameters": student.num_parameters == FULL_PARAMETERS,
            "peak_under_2.5_GiB": max(peaks) < PEAK_BAR,
            "at_most_1.5_times_a_plain_copy": all(case["ratio"]["median"] <= RATIO_BAR for case in cases),
            "peak_independent_of_layers": all(max(some) <= 1.1 * min(some) for some in (peaks, small_peaks)),
            "forecast_peak_within_25_percent": max(map(abs, off.values())) <= 0.25,
        },
    }


def measure_case(work: Path, sizes: dict[str, int], layers: int, repeats: int) -> dict[str, Any]:
    """One checkpoint: write it, convert it and copy it `repeats` times in alternating order, remove it."""
    shape = config(sizes, layers)
    model, plan_file = write_checkpoint(work / "model", shape), work / "plan.json"
    plan = write_plan(plan_file, shape)
    ranges = list(byte_ranges(model, plan))
    records: list[dict[str, Any]] = []
    copies: list[float] = []
    for repeat in range(repeats):
        for kind in ("convert", "copy") if repeat % 2 == 0 else ("copy", "convert"):
            if kind == "convert":
                records.append(convert(model, plan_file, work / "out"))
            else:
                copies.append(plain_copy(model, ranges, work / "copy"))
    stored = sum(info.nbytes for info in Checkpoint.open(model).tensors.values())
    shutil.rmtree(model)
    record = records[0]
    if record["bytes_read"] != sum(info.nbytes for info in ranges):
        raise SystemExit(f"read {record['bytes_read']} bytes, expected {sum(info.nbytes for info in ranges)}")
    return {
        "layers": layers,
        "hidden_size": sizes["hidden_size"],
        "source_bytes": stored,
        "bytes_read": record["bytes_read"],
        "bytes_written": record["bytes_written"],
        "peak_bytes": max(r["high_water_bytes"] for r in records),
        "recorded_peak_bytes": max(r["peak_rss_bytes"] for r in records),
        "act_seconds": spread([r["seconds"]["act"] for r in records]),
        "copy_seconds": spread(copies),
        "ratio": spread([r["seconds"]["act"] / copy for r, copy in zip(records, copies, strict=True)]),
        "forecast": {key: value for key, value in record["forecast"].items() if not key.startswith("observe")},
    }


def affordable_layers(work: Path) -> int:
    """Layers, of 48, that fit beside their student, a copy of it and the reserve."""
    one, two = (sum(shard.nbytes for shard in layout(config(TRUE, count))) for count in (1, 2))
    per_layer, rest = two - one, 2 * one - two
    dense = per_layer * KEEP // TRUE["num_experts"] + 2**26
    free = shutil.disk_usage(work).free - RESERVE_BYTES - 3 * rest
    return max(4, min(FULL_LAYERS, free // (per_layer + 2 * dense)))


def measure_observe(work: Path, tokens: int, length: int) -> dict[str, Any]:
    """Observe one true-shape layer, router-only and with every expert, each in a process of its own."""
    write_checkpoint(work / "model", config(TRUE, 1))
    command = [sys.executable, __file__, "--work", str(work), "--tokens", str(tokens), "--length", str(length)]
    return {kind: run_child([*command, "--child", kind]) for kind in ("router-only", "all-expert")}


def observe_child(work: Path, tokens: int, length: int, *, outputs: bool) -> dict[str, Any]:
    """Observe under a profiler; seconds of each phase are cumulative times of the function that does it."""
    teacher = Checkpoint.open(work / "model")
    family, resolved = detect_family(teacher.config), resolve_config(teacher.config)
    student = describe_student(teacher, family, resolved, KEEP)
    streamed = StreamedTeacher(
        teacher, family, resolved, student.storage, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    ids = torch.randint(TRUE["vocab_size"], (tokens // length, length), generator=torch.Generator().manual_seed(SEED))
    calibration = Calibration(ids, torch.ones_like(ids, dtype=torch.bool))
    with cProfile.Profile() as profile, tempfile.TemporaryDirectory(dir=work) as scratch:
        observe(
            streamed,
            family.router(resolved),
            calibration,
            outputs=outputs,
            weights=False,
            batch_size=4,
            work=Path(scratch),
        )
    times = dict.fromkeys(PHASES, 0.0)
    for (file, _, function), row in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for name, wanted in PHASES.items():
            if function == wanted and "burnish" in file:
                times[name] += row[3]
    return {
        "tokens": tokens,
        "length": length,
        "seconds": times["all"],
        "load_seconds": times["load"],
        "tokens_per_second": tokens / (times["all"] - times["load"]),
        "share": {name: times[name] / times["all"] for name in PHASES if name != "all"},
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def device() -> str:
    """The machine in plain words."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].splitlines()[0].strip()
    return f"{os.cpu_count()}-core {cpu}, {round(psutil.virtual_memory().total / 2**30)} GiB"


def show(results: dict[str, Any]) -> None:
    """Print what was measured as tables."""
    console = Console(width=120)
    for name in (name for name in results if name.startswith("act")):
        act = results[name]
        table = Table(title=f"{name}; {act['full_parameters']:,} parameters from all 48 layers")
        for heading in ("layers", "hidden", "read", "written", "peak", "forecast", "act", "plain copy", "ratio"):
            table.add_column(heading, justify="right")
        for case in act["cases"] + act["small_cases"]:
            gigabytes = [f"{case[key] / 1e9:.2f} GB" for key in ("bytes_read", "bytes_written", "peak_bytes")]
            seconds = [f"{case[key]['median']:.2f} s" for key in ("act_seconds", "copy_seconds")]
            ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**case["ratio"])
            expected = f"{case['forecast']['act_peak_bytes'] / 1e9:.2f} GB"
            table.add_row(str(case["layers"]), str(case["hidden_size"]), *gigabytes, expected, *seconds, ratio)
        console.print(table)
        console.print(*(f"{'met' if met else 'MISSED'}: {bar}" for bar, met in act["bars"].items()), sep="\n")
    if seen := results.get("observe"):
        table = Table(title="observing one layer")
        for heading in ("statistics", "tokens/s", "peak", *(name for name in PHASES if name != "all")):
            table.add_column(heading, justify="right")
        for kind in ("router-only", "all-expert"):
            row = seen[kind]
            shares = [f"{share:.0%}" for share in row["share"].values()]
            table.add_row(kind, f"{row['tokens_per_second']:.0f}", f"{row['peak_rss_bytes'] / 1e9:.2f} GB", *shares)
        console.print(table)


def main() -> None:
    """Measure, print the tables, and merge the numbers into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of the larger checkpoint; default: what free disk allows, up to 48")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--observe", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence; four sequences are a batch")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, help="of the measured processes; default: torch's own choice")
    parser.add_argument("--storage", default="", help="kind of disk, for the record")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "true_shape.json")
    parser.add_argument("--child", choices=("router-only", "all-expert"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(observe_child(args.work, args.tokens, args.length, outputs=args.child == "all-expert")))
        return
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    load = os.getloadavg()[0]
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        if args.observe:
            measured = {"observe": measure_observe(Path(work), args.tokens, args.length)}
        else:
            name = f"act, {args.threads} threads" if args.threads else "act"
            measured = {name: measure_act(Path(work), args.layers, args.repeats)}
    for measurement in measured.values():
        measurement["load_average_at_start"] = load
    results |= measured | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": ", ".join(filter(None, (device(), args.storage))),
        "page_cache": "source dropped before every conversion and copy; both end with fsync",
        "seed": SEED,
        "environment": environment(),
    }
    show(results)
    write_json(args.results, results)


if __name__ == "__main__":
    main()
