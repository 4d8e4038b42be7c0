"""Load a checkpoint through transformers: config, tokenizer, model. What is missing is an error, not a log line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from burnish.checkpoint.source import Checkpoint
from burnish.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of the language model in a checkpoint.

    Raises:
        UnsupportedModelError: transformers does not know this type of model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(f"{checkpoint.name}: transformers cannot load it ({reason})") from error
    return config.get_text_config()


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{checkpoint.name}: its tokenizer cannot be read ({reason})") from error
    # transformers makes up an empty tokenizer where it finds no files.
    if not tokenizer("a")["input_ids"]:
        raise CheckpointError(f"{checkpoint.name}: no tokenizer lies beside the weights")
    return tokenizer


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """The model, in evaluation mode.

    Args:
        checkpoint: what to load; a quantised one is loaded as its `quantization_config` says.
        dtype: of the weights.
        device: where they go; None leaves that to transformers.
        trust_remote_code: run code that lies beside the weights.
        settings: further config values, such as `num_experts_per_tok`.

    Raises:
        CheckpointError: the checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM

    with foreign_bars_hidden():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **settings
        )
    # transformers fills what it does not find with random numbers and only logs it.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{checkpoint.name}: {len(missing)} weights are missing, first {missing[0]}")
    return model if device is None else model.to(device)


@contextmanager
def foreign_bars_hidden() -> Iterator[None]:
    """Our own progress speaks; transformers' bars are switched off meanwhile, and back on as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
