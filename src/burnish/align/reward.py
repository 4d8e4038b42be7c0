"""What a completion is worth: a reward model, a Python function, or several of them together."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import foreign_bars_hidden, load_tokenizer
from burnish.data.examples import Messages
from burnish.data.text import rendered
from burnish.errors import BurnishError, CheckpointError, DataError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[[Sequence[str | Messages], Sequence[str]], Any]
"""(prompts, their completions) -> one number for each, as a Tensor `[completions]` or anything that makes one."""

FUNCTION = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*)")


def load_reward(
    reward: str | os.PathLike[str] | Reward,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> Reward:
    """A reward by its name.

    Args:
        reward: a function as it is; `module:function` or `path/file.py:function`; else directory or hub name of a
            reward model.
        device, dtype, batch_size, trust_remote_code: of a reward model.

    Raises:
        BurnishError: there is no such function or model.
    """
    if callable(reward):
        return reward
    if (found := FUNCTION.fullmatch(os.fspath(reward))) and not Path(reward).exists():
        return python_reward(found["place"], found["name"])
    return RewardModel.load(
        os.fspath(reward), device=device, dtype=dtype, batch_size=batch_size, trust_remote_code=trust_remote_code
    )


def python_reward(place: str, name: str) -> Reward:
    """A function of the user's own code.

    It is called as `function(prompts, completions)` with two lists of one length (a prompt is a string, or messages
    `[{role, content}]`; a completion a string) and returns one number for each completion.

    Args:
        place: a module that can be imported, or a `.py` file.
        name: of the function.

    Raises:
        BurnishError: there is no such module, file or function.
    """
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise BurnishError(f"{place}: has no function {name!r}; it has {known or 'none'}")
    found: Reward = function
    return found


def rewards_of(
    reward: Reward,
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    *,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The rewards of completions, checked.

    Args:
        reward: what gives them.
        prompts: one for each completion.
        completions: as text.
        names: of the completions in messages; None numbers them from 1.

    Returns:
        Tensor `[completions]`, float32.

    Raises:
        DataError: not one number for each completion, or one that is not finite; names the first such row.
    """
    found = reward(prompts, completions)
    values = found if isinstance(found, Tensor) else torch.tensor(list(found), dtype=torch.float64)
    values = values.detach().to("cpu", torch.float32)
    if values.shape != (len(completions),):
        raise DataError(
            f"the reward returned {list(values.shape)} numbers for {len(completions)} completions: expected one each"
        )
    wrong = (~values.isfinite()).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"the reward of {names[row] if names else f'row {row + 1}'} is {values[row].item()} ({len(wrong)} of"
            f" {len(values)} are not finite): prompt {_brief(prompts[row])}, completion {_brief(completions[row])};"
            " expected a finite number"
        )
    return values


@dataclass(frozen=True)
class Shaping:
    """What is made of a reward before it is used: `clip(scale * reward) - penalty`.

    Attributes:
        scale: factor.
        clip: lowest and highest value after scaling; None does not clip.
        missing_end_penalty: taken from completions without an end token, after clipping.
    """

    scale: float = 1.0
    clip: tuple[float, float] | None = None
    missing_end_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"reward_scale={self.scale}: expected a number above 0")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"reward_clip={self.clip}: expected a lowest and a higher highest value")
        if not 0 <= self.missing_end_penalty < math.inf:
            raise ValueError(f"missing_end_penalty={self.missing_end_penalty}: expected 0 or more")

    def __call__(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """Shaped rewards.

        Args:
            rewards: Tensor `[...]`, float.
            ended: Tensor `[...]`, bool: the completion has its end token.
        """
        values = self.scale * rewards
        if self.clip is not None:
            values = values.clamp(*self.clip)
        return values - self.missing_end_penalty * (~ended).to(values.dtype)


def weighted_sum(terms: Iterable[tuple[float, Reward]]) -> Reward:
    """The sum of several rewards, each times its weight."""
    parts = list(terms)

    def total(prompts: Sequence[str | Messages], completions: Sequence[str]) -> Tensor:
        values = [weight * rewards_of(reward, prompts, completions) for weight, reward in parts]
        return torch.stack(values).sum(0)

    return total


class RewardModel:
    """A sequence classifier with a single output, as a reward.

    It reads text, so its tokenizer may differ from that of the policy: through its own chat template where it has one
    (a plain prompt is then the user's turn), else prompt and completion one behind the other. A text that is too long
    loses its beginning.

    Args:
        model: with one output.
        tokenizer: its own.
        batch_size: texts at a time, sorted by length.
        name: in messages.

    Raises:
        UnsupportedModelError: the model has another number of outputs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16, name: str = "reward"
    ) -> None:
        if model.config.num_labels != 1:
            raise UnsupportedModelError(f"{name}: has {model.config.num_labels} outputs, a reward model has 1")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.max_length = min(longest, tokenizer.model_max_length)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """From a directory or hub name.

        Raises:
            CheckpointError: it is not there, or lacks weights: a language model has no output of this kind.
            UnsupportedModelError: it has several outputs, or transformers does not know it.
        """
        from transformers import AutoModelForSequenceClassification

        checkpoint = Checkpoint.open(name)
        try:
            with foreign_bars_hidden():
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    checkpoint.path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
                )
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModelError(f"{name}: transformers cannot load it as a reward model ({reason})") from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{name}: is no reward model: {len(missing)} weights are missing, first {missing[0]}: give a model"
                " trained for sequence classification with one output"
            )
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        return cls(model.to(torch.device(device)), tokenizer, batch_size=batch_size, name=name)

    def text(self, prompt: str | Messages, completion: str) -> str:
        """What the model reads."""
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            answer = {"role": "assistant", "content": completion}
            return rendered(self.tokenizer, [*turns, answer], "a prompt of the reward model")
        if isinstance(prompt, str):
            return prompt + completion
        return "\n".join([*(str(message["content"]) for message in prompt), completion])

    def ids(self, prompt: str | Messages, completion: str) -> list[int]:
        """The tokens that the model reads."""
        special = self.tokenizer.chat_template is None  # a template writes them itself
        found: list[int] = self.tokenizer(
            self.text(prompt, completion), add_special_tokens=special, verbose=False
        )["input_ids"]  # fmt: skip
        surplus = max(0, len(found) - int(min(self.max_length, len(found))))
        keep = int(found[0] == self.tokenizer.bos_token_id)
        return found[:keep] + found[keep + surplus :]

    def padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Rows of tokens as a batch: `input_ids` and `attention_mask`, `[rows, longest]`, and the `pad` [], int64.

        Classifiers of transformers take the last token that is not padding by its id, and many tokenizers pad with the
        end token, which texts end with. So padding is a token that no text of the batch holds.
        """
        pad = _absent(rows, self.tokenizer.pad_token_id)
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "pad": torch.tensor(pad),
        }

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The rewards of a batch of `padded`, Tensor `[rows]`."""
        self.model.config.get_text_config().pad_token_id = int(batch["pad"])
        tensors = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        found: Tensor = self.model(**tensors).logits
        return found[:, 0]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str | Messages], completions: Sequence[str]) -> Tensor:
        """Rewards, Tensor `[completions]`, float32."""
        rows = [self.ids(*pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        values = torch.zeros(len(rows))
        for start in range(0, len(rows), self.batch_size):
            places = order[start : start + self.batch_size]
            values[places] = self.scores(self.padded([rows[place] for place in places])).float().cpu()
        return values


def _absent(rows: Sequence[list[int]], usual: int | None) -> int:
    used = set().union(*rows)
    if usual is not None and usual not in used:
        return usual
    return next(token for token in range(len(used) + 1) if token not in used)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BurnishError(
            f"{name}: no such module ({error}): give module:function of an importable module, or path/file.py:function"
        ) from error


def _module_of_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise BurnishError(f"{file}: no such file: give path/file.py:function")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _brief(content: str | Messages) -> str:
    text = content if isinstance(content, str) else str(content[-1]["content"])
    return repr(text if len(text) <= 60 else text[:57] + "...")
