import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from burnish.checkpoint import Checkpoint, TensorInfo
from burnish.evaluate import measure
from burnish.evaluate.measure import speeds

MIB = 2**20


class Recorder(torch.nn.Module):
    """A causal model of the documented interface that notes its calls, sleeps and holds memory."""

    def __init__(self, *, seconds=0.0, num_bytes=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        self.seconds, self.num_bytes, self.calls = seconds, num_bytes, []

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        self.calls.append((tuple(input_ids.shape), past_key_values, use_cache, logits_to_keep))
        held = torch.ones(self.num_bytes, dtype=torch.uint8)
        time.sleep(self.seconds + 0.02 * (len(held) > 0))
        cached = (past_key_values or 0) + input_ids.shape[1]
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5), past_key_values=cached)


def test_size_is_read_from_headers():
    shapes = {"a": ("BF16", (3, 4), 24), "b": ("F32", (5,), 20), "c": ("F32", (), 4)}
    tensors = {
        name: TensorInfo(name, dtype, shape, Path("x"), 100, 100 + size)
        for name, (dtype, shape, size) in shapes.items()
    }
    checkpoint = Checkpoint(name="x", path=Path("x"), config={}, tensors=tensors)
    assert checkpoint.num_parameters == 12 + 5 + 1
    assert checkpoint.nbytes == 48


@pytest.mark.parametrize("tied", [False, True])
def test_size_is_that_of_the_loaded_model(tmp_path, tied):
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.num_parameters == model.num_parameters()
    assert checkpoint.nbytes == 2 * model.num_parameters()
    assert checkpoint.bytes_read == 0


def test_generation_uses_the_cache_one_token_at_a_time():
    model = Recorder()
    (speed,) = speeds([model], torch.zeros(2, 6, dtype=torch.int64), new_tokens=3, repeats=1)
    generation = [((2, 6), None, True, 1), ((2, 1), 6, True, 0), ((2, 1), 7, True, 0), ((2, 1), 8, True, 0)]
    assert model.calls == 3 * generation  # warm-up, memory, one repeat
    assert (speed.batch_size, speed.prompt_tokens, speed.new_tokens) == (2, 6, 3)


def test_rates_count_the_tokens_of_the_whole_batch():
    """A forward pass sleeps 20 ms: 30 / 0.02 and 25 / 0.1 are bounds, a quarter of them allows for a busy machine."""
    (speed,) = speeds([Recorder(seconds=0.02)], torch.zeros(5, 6, dtype=torch.int64), new_tokens=5, repeats=3)
    assert 1500 / 4 <= speed.prefill_tokens_per_second <= 1500
    assert 250 / 4 <= speed.decode_tokens_per_second <= 250


def test_latencies_are_the_medians_and_rates_follow_from_them(monkeypatch):
    """Prefill 10, 30, 20 ms and decode 80, 40, 60 ms for 4 tokens of 2 sequences: medians 20 and 60 ms."""
    timed = iter([(1, 1), (1, 1), (0.01, 0.08), (0.03, 0.04), (0.02, 0.06)])  # warm-up and memory first
    monkeypatch.setattr(measure, "_generate", lambda *_: next(timed))
    (speed,) = speeds([Recorder()], torch.zeros(2, 6, dtype=torch.int64), new_tokens=4, repeats=3)
    assert (speed.prefill_ms, speed.decode_ms_per_token) == (20, 15)
    assert speed.prefill_tokens_per_second == pytest.approx(12 / 0.02)
    assert speed.decode_tokens_per_second == pytest.approx(8 / 0.06)


def test_repeats_alternate_between_models():
    order = []
    models = [Recorder(), Recorder()]
    for name, model in zip("ab", models, strict=True):
        model.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    speeds(models, torch.zeros(1, 2, dtype=torch.int64), new_tokens=0, repeats=2)
    assert "".join(order) == "aa" + "bb" + "abab"


def test_memory_is_weights_and_what_a_generation_adds():
    models = [Recorder(), Recorder(num_bytes=200 * MIB)]
    small, large = speeds(models, torch.zeros(1, 2, dtype=torch.int64), new_tokens=1, repeats=1)
    assert 4000 <= small.peak_memory_bytes < 50 * MIB
    assert 190 * MIB < large.peak_memory_bytes < 250 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_cuda_is_exact():
    class OnDevice(Recorder):
        def forward(self, input_ids, **options):
            held = torch.ones(200 * MIB, dtype=torch.uint8, device="cuda")
            output = super().forward(input_ids, **options)
            output.logits = output.logits.cuda() * held[0]
            return output

    model = OnDevice().cuda()
    (speed,) = speeds([model], torch.zeros(1, 2, dtype=torch.int64, device="cuda"), new_tokens=1, repeats=1)
    assert 0 <= speed.peak_memory_bytes - 4000 - 200 * MIB < MIB
