"""LoRA adapters through PEFT: added to a model, written as PEFT writes them, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.checkpoint import Checkpoint, Staging
from burnish.checkpoint.tensors import dtype_name, read_header
from burnish.errors import BurnishError, OutputError
from burnish.runs.randomness import random_state_kept
from burnish.training.output import make_readable

WEIGHTS_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
NOT_OF_ADAPTERS = frozenset({"config.json", "generation_config.json"})
"""Files of a base model that would make a directory of adapters look like a whole model."""


@dataclass(frozen=True)
class Lora:
    """What adapters are added; PEFT's words.

    Attributes:
        rank: `r`.
        alpha: `lora_alpha`; the product of the factors is scaled by alpha / rank.
        dropout: of what goes into the adapters; none is active in zeroth-order training.
        targets: `target_modules`: "all-linear", or endings of module names.
        seed: of the factor that starts random.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank={self.rank}: expected 1 or more")
        if self.alpha < 1:
            raise ValueError(f"lora_alpha={self.alpha}: expected 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout={self.dropout}: expected a share from 0 to below 1")
        if not self.targets:
            raise ValueError("lora_targets is empty: name modules, or leave it out for all linear layers")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Lora.of` builds it again."""
        return asdict(self) | {"targets": self.targets if isinstance(self.targets, str) else list(self.targets)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Lora:
        """From `to_dict`."""
        targets = values["targets"]
        return cls(**values | {"targets": targets if isinstance(targets, str) else tuple(targets)})


def lora_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """What LORA_OPTIONS are where a verb was not told."""
    rank = options["lora_rank"] or Lora.rank
    return {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_targets": Lora.targets}


def chosen_lora(options: dict[str, Any]) -> Lora | None:
    """The adapters that a verb's options ask for: `lora`, LORA_OPTIONS and `seed`; None without `lora`.

    Raises:
        BurnishError: PEFT is missing.
        ValueError: an option is out of range.
    """
    if not options["lora"]:
        return None
    require_peft()
    targets = options["lora_targets"]
    return Lora(
        rank=options["lora_rank"],
        alpha=options["lora_alpha"],
        dropout=options["lora_dropout"],
        targets=targets if isinstance(targets, str) else tuple(targets),
        seed=options["seed"],
    )


def require_peft() -> None:
    """Say what to install where PEFT is missing.

    Raises:
        BurnishError: it is.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BurnishError('LoRA needs the package peft: pip install "burnish[lora]"') from error


def add_adapters(model: PreTrainedModel, lora: Lora, name: str) -> Any:
    """The model with fresh adapters, which alone require grad; their product is zero.

    Args:
        model: is changed.
        lora: which.
        name: of the base model, as others will look for it.

    Raises:
        ValueError: a target matches no module, or the head.
    """
    import peft

    targets: str | list[str] = ALL_LINEAR
    if lora.targets != ALL_LINEAR:
        targets = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
        _require_targets(model, targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
        target_modules=targets,
    )  # fmt: skip
    with random_state_kept():
        torch.manual_seed(lora.seed)
        adapted: Any = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = name
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise ValueError("lora_targets names the head: the loss takes its weight as it is; leave it out")
    return adapted


def _require_targets(model: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, module in model.named_modules() if not any(module.children())]
    for end in targets:
        if not any(name == end or name.endswith(f".{end}") for name in names):
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ValueError(f"lora_targets: {end!r} matches no module: choose from {', '.join(ends)}")


def base_name(checkpoint: Checkpoint) -> str:
    """How PEFT finds the base model again: the hub name, or the absolute directory."""
    return str(checkpoint.path) if Path(checkpoint.name).expanduser().is_dir() else checkpoint.name


def write_adapters(model: Any, staging: Staging, state: dict[str, torch.Tensor] | None = None) -> int:
    """Write adapters in PEFT's format and verify them; returns the number of their weights.

    Args:
        model: with adapters.
        staging: where they go.
        state: their weights, where those in the model are in pieces.

    Raises:
        OutputError: what was written is not what the model holds.
    """
    import peft

    model.save_pretrained(staging.files, **({} if state is None else {"state_dict": state}))
    make_readable(staging)
    wanted = {
        name: (dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in peft.get_peft_model_state_dict(model, state).items()
    }
    found = {name: (info.dtype, tuple(info.shape)) for name, info in read_header(staging.files / WEIGHTS_FILE).items()}
    if found != wanted:
        name, (dtype, shape) = min(found.items() ^ wanted.items())
        raise OutputError(f"{staging.out}: adapter {name} was not written as it is: {dtype} {list(shape)}")
    return sum(torch.Size(shape).numel() for _, shape in wanted.values())


def merged(model: Any) -> PreTrainedModel:
    """The base model with the adapters added to its weights."""
    found: PreTrainedModel = model.merge_and_unload()
    return found
