"""How good a student is before distillation: perplexity, and its divergence from a teacher that ran once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.data import TokenBlocks
from burnish.distill.divergence import forward_kl
from burnish.evaluate import Estimate, mean_per_token, perplexity
from burnish.evaluate.perplexity import predicted
from burnish.families.streaming import Calibration, StreamedModel, stream
from burnish.training.chunked import CHUNK_BYTES
from burnish.training.head import decoder, language_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = {"cpu": 2 * 2**20, "cuda": CHUNK_BYTES["cuda"]}
"""Float32 logits of one chunk: on a CPU they should stay in its cache."""


@dataclass(frozen=True)
class Measured:
    """Quality of a model on the held-out text; `forward_kl` is that of the teacher from it, nats per token."""

    nll: Estimate
    forward_kl: Estimate

    @property
    def perplexity(self) -> Estimate:
        """exp of the negative log-likelihood."""
        return perplexity(self.nll)


class _LastStates:
    """Keeps what the last decoder layer puts out; see `burnish.families.streaming.Watch`."""

    def __init__(self, layer: nn.Module) -> None:
        self.batches: list[Tensor] = []
        self.hook = layer.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self.batches.append((output[0] if isinstance(output, tuple) else output).cpu())

    def next_batch(self, live: Tensor) -> None:
        """See Watch."""

    def save(self, file: Path) -> None:
        """See Watch."""
        self.hook.remove()
        save_file({"hidden": torch.cat(self.batches)}, file)


def last_hidden_states(
    teacher: StreamedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int,
    work: Path,
    advance: Callable[[int], None] = lambda batches: None,
) -> Tensor:
    """What a teacher's last decoder layer says of every token, [blocks, length, hidden]; its norm and head follow.

    The teacher is streamed: one layer is in memory, and a run that was killed goes on after its last finished layer.

    Args:
        teacher: the streamed model.
        blocks: text.
        batch_size: blocks per forward pass.
        work: directory for unfinished work.
        advance: called with 1 after each batch of each layer.
    """
    last = len(teacher.layers) - 1
    text = Calibration(blocks.input_ids, blocks.attention_mask)
    (file,) = stream(teacher, text, {last: _LastStates}, batch_size=batch_size, work=work, advance=advance)
    with safe_open(file, framework="pt") as stored:
        hidden: Tensor = stored.get_tensor("hidden")
    return hidden


def save_states(hidden: Tensor, file: Path, fingerprint: Any) -> None:
    """Write a teacher's states by rename, with what they depend on."""
    partial = file.with_name(file.name + ".partial")
    save_file({"hidden": hidden}, partial, metadata={"fingerprint": json.dumps(fingerprint, sort_keys=True)})
    partial.replace(file)


def load_states(file: Path, fingerprint: Any) -> Tensor | None:
    """What `save_states` wrote; None where there is no such file, or it is of another teacher or text."""
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") != json.dumps(fingerprint, sort_keys=True):
                return None
            hidden: Tensor = stored.get_tensor("hidden")
            return hidden
    except (OSError, SafetensorError):
        return None


@torch.inference_mode()
def measure(
    model: PreTrainedModel, hidden: Tensor, blocks: TokenBlocks, *, batch_size: int, teacher: bool = False
) -> Measured:
    """Perplexity of a student, and its divergence from the teacher.

    Both heads are applied to a few tokens at a time. The student has the teacher's own final norm and head, which no
    conversion changes, so that the teacher is its last hidden states and nothing else.

    Args:
        model: the student, in evaluation mode.
        hidden: Tensor `[blocks, length, hidden]`, the teacher's, see `last_hidden_states`.
        blocks: the same text.
        batch_size: blocks per forward pass.
        teacher: measure the teacher itself; the student only lends its norm and head.
    """
    body, device = decoder(model), model.device
    norm = body.get_submodule("norm")
    counted = predicted(blocks.attention_mask)
    nll, kl = torch.zeros(2, *counted.shape, dtype=torch.float64)
    for start in range(0, len(hidden), batch_size):
        rows = slice(start, start + batch_size)
        ids = blocks.input_ids[rows].to(device)
        # Padding is on the right, where a causal model does not see it: no attention mask is needed.
        said = norm(hidden[rows].to(device))[:, :-1]
        heard = said if teacher else body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        for total, values in zip((nll, kl), _per_token(model, said, heard, ids[:, 1:]), strict=True):
            total[rows] = values.double().cpu()
    counts = counted.sum(1)
    sums = (total.where(counted, 0.0).sum(1) for total in (nll, kl))
    return Measured(*(_finite(mean_per_token(total, counts)) for total in sums))


def _per_token(model: PreTrainedModel, teacher: Tensor, student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and forward KL of each token, from the states [batch, seq, hidden] before the head."""
    head, shape = language_head(model), targets.shape
    chunk_bytes = LOGITS_BYTES["cuda" if model.device.type == "cuda" else "cpu"]
    step = max(1, chunk_bytes // (4 * head.linear.weight.shape[0]))
    pieces = []
    flat = (student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten())
    for states, references, ids in zip(*(torch.split(tensor, step) for tensor in flat), strict=True):
        log_q = head.logits(states).float().log_softmax(-1)  # [chunk, vocab]
        log_p = head.logits(references).float().log_softmax(-1)
        pieces.append((-log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1), forward_kl(log_p, log_q)))
    nll, kl = (torch.cat(part).view(shape) for part in zip(*pieces, strict=True))
    return nll, kl


def _finite(estimate: Estimate) -> Estimate:
    """A student whose numbers overflow is infinitely far away, which can be ranked; NaN cannot."""
    return estimate if math.isfinite(estimate.value) else Estimate(math.inf, math.nan)
