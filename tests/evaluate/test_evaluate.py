import io
import json
import math
import shutil
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

import burnish
from burnish.cli.evaluate import evaluate as command
from burnish.data import token_blocks
from burnish.errors import CheckpointError, OutputError, UnsupportedModelError
from burnish.evaluate import Speed, compare, evaluate

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 12
VOCAB = 260
SMALL = {"num_samples": 5, "max_length": 32, "batch_size": 2, "speed": False}


def save(path, seed=0, vocab_size=VOCAB, swap=(), change=None):
    """A random two-layer Qwen3 model with a byte tokenizer of 258 tokens."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for index in swap:
        names[index] = f"<unused {index}>"
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(path)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.3, attention_dropout=0.5,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    if change:
        change(model)
    model.save_pretrained(path)


def uniform(model):
    model.lm_head.weight.data.zero_()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    (path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXT.split(".")))
    with torch.random.fork_rng():
        save(path / "before")
        save(path / "after", seed=1)
        save(path / "uniform", change=uniform)
        save(path / "swapped", swap=(200, 100))
    shutil.copytree(path / "before", path / "copy")
    return path


@pytest.fixture
def run(home):
    return lambda *args, **options: evaluate(*args, **({"dataset": home / "text.txt"} | SMALL | options))


def test_uniform_model_has_the_vocabulary_as_perplexity(home, run):
    (row,) = run(home / "uniform").rows
    assert row.perplexity.value == pytest.approx(VOCAB, rel=1e-6)
    assert row.perplexity.standard_error == pytest.approx(0, abs=1e-4)
    assert row.comparison is None


def test_perplexity_is_that_of_the_models_own_loss(home, run):
    result = run(home / "before")
    model = AutoModelForCausalLM.from_pretrained(home / "before")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "before")
    blocks = token_blocks(tokenizer, home / "text.txt", num_samples=5, max_length=32, shuffle=False)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in blocks.input_ids]).double()
    assert result.fingerprint == blocks.fingerprint
    assert result.rows[0].nll.value == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.rows[0].nll.standard_error == pytest.approx((losses.std() / math.sqrt(5)).item(), rel=1e-4)
    assert result.rows[0].perplexity.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_u10_2_identical_models_differ_by_exactly_nothing(home, run):
    before, after = run(before=home / "before", after=home / "copy").rows
    assert after.comparison is not None
    assert (after.comparison.nll_difference.value, after.comparison.nll_difference.standard_error) == (0, 0)
    assert (after.comparison.forward_kl.value, after.comparison.forward_kl.standard_error) == (0, 0)
    assert after.comparison.top1_agreement.value == 1
    assert (after.nll, after.num_parameters) == (before.nll, before.num_parameters)


def test_u10_2_before_after_share_one_setting(home, run):
    result = run(before=home / "before", after=home / "after")
    alone = [run(home / name).rows[0] for name in ("before", "after")]
    assert [row.nll for row in result.rows] == [row.nll for row in alone]
    assert [Path(row.model).name for row in result.rows] == ["before", "after"]
    difference = result.rows[1].comparison.nll_difference
    assert difference.value == pytest.approx(alone[1].nll.value - alone[0].nll.value)
    unpaired = math.hypot(alone[0].nll.standard_error, alone[1].nll.standard_error)
    assert 0 < difference.standard_error != pytest.approx(unpaired, rel=1e-3)


def test_kl_is_from_before_to_after(home, run):
    """Against uniform logits KL(before || after) is log V - H(before) per predicted token."""
    (_, row) = run(before=home / "before", after=home / "uniform").rows
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "before")
    blocks = token_blocks(tokenizer, home / "text.txt", num_samples=5, max_length=32, shuffle=False)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(home / "before")(blocks.input_ids).logits[:, :-1]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert row.comparison.forward_kl.value == pytest.approx(math.log(VOCAB) - entropy, rel=1e-5)
    assert row.comparison.forward_kl.value > 0.1


def test_batch_size_does_not_change_results(home, run):
    one, five = (run(before=home / "before", after=home / "after", batch_size=size).rows for size in (1, 5))
    for a, b in zip(one, five, strict=True):
        assert a.nll.value == pytest.approx(b.nll.value, rel=1e-6)
        assert a.perplexity.standard_error == pytest.approx(b.perplexity.standard_error, rel=1e-4)
    assert one[1].comparison.forward_kl.value == pytest.approx(five[1].comparison.forward_kl.value, rel=1e-5)
    assert one[1].comparison.top1_agreement == five[1].comparison.top1_agreement


@pytest.mark.filterwarnings("ignore:.*one padded block")
def test_a_padded_block_counts_its_tokens_only(tmp_path, home, run):
    (tmp_path / "short.txt").write_text("in want of a wife")
    short = run(home / "before", dataset=tmp_path / "short.txt", num_samples=1, max_length=64)
    exact = run(home / "before", dataset=tmp_path / "short.txt", num_samples=1, max_length=17)
    assert short.num_tokens == exact.num_tokens == 17
    assert short.rows[0].nll.value == pytest.approx(exact.rows[0].nll.value, rel=1e-5)
    assert short.to_dict()["rows"][0]["nll"]["standard_error"] is None


def test_the_model_before_runs_once_for_all_models_after(home, run, monkeypatch):
    calls = Counter()
    load = compare.load_model

    def counted(checkpoint, **options):
        model = load(checkpoint, **options)
        model.register_forward_pre_hook(lambda *_: calls.update([Path(checkpoint.name).name]))
        return model

    monkeypatch.setattr(compare, "load_model", counted)
    result = run(before=home / "before", after=[home / "after", home / "uniform", home / "copy"])
    assert len(result.rows) == 4
    assert calls == {"before": 3, "after": 3, "uniform": 3, "copy": 3}  # 5 blocks in batches of 2


def test_u8_3_different_vocabularies_are_refused_before_loading(home, run, monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(
        UnsupportedModelError, match=r"swapped: its vocabulary of 258 .* with 258: token 100 is '<unused 100>'"
    ):
        run(before=home / "before", after=home / "swapped")


def test_u8_3_padding_of_the_logits_is_sliced_and_said(tmp_path, home, run):
    def pad(tensor):
        return torch.cat([tensor, torch.full((4, 32), 9.0)])

    shutil.copytree(home / "before", tmp_path / "padded")
    file = tmp_path / "padded" / "model.safetensors"
    tensors = load_file(file)
    padded = {name: pad(tensors[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | padded, file, metadata={"format": "pt"})
    config = tmp_path / "padded" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": VOCAB + 4}))

    with pytest.warns(UserWarning, match=r"\[260, 264\] logits: only the first 260 are compared"):
        result = run(before=home / "before", after=tmp_path / "padded")
    assert result.vocab_size == 260
    assert result.rows[1].comparison.forward_kl.value == pytest.approx(0, abs=1e-9)
    assert result.rows[1].nll.value == pytest.approx(result.rows[0].nll.value, rel=1e-6)


def test_u8_3_fewer_logits_than_tokens_are_not_padding(tmp_path, home, run):
    save(tmp_path / "fewer", vocab_size=257)
    with pytest.raises(UnsupportedModelError, match=r"fewer: 257 logits, but its tokenizer has ids up to 257"):
        run(before=home / "before", after=tmp_path / "fewer")


def test_u4_missing_weights_are_refused(tmp_path, home, run):
    shutil.copytree(home / "before", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        run(tmp_path / "broken")


def test_an_unknown_model_type_is_refused_in_one_line(tmp_path, home, run):
    shutil.copytree(home / "before", tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "gwen"}')
    with pytest.raises(UnsupportedModelError, match=r"unknown: transformers cannot load it \(.*gwen") as caught:
        run(tmp_path / "unknown")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(tmp_path, home, run):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(home / "before" / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="no tokenizer lies beside the weights"):
        run(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one model alone, or before and after together"),
        ({"before": "before"}, "give one model alone"),
        ({"model": "before", "after": "after"}, "give one model alone"),
        ({"model": "before", "dtype": "float8"}, "dtype='float8': choose auto, float32"),
        ({"model": "before", "device": "cuda:99"}, "device='cuda:99' but torch sees"),
        ({"model": "before", "batch_size": 0}, "batch_size=0"),
        ({"model": "before", "max_length": 65}, r"max_length=65 but .*before has 64 positions: choose 2\.\.64"),
    ],
)
def test_options_out_of_range_are_refused_before_loading(home, run, monkeypatch, options, message):
    monkeypatch.chdir(home)
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_u11_1_u12_2_no_network_and_no_global_randomness(home, run, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    state = torch.get_rng_state()
    first = run(before=home / "before", after=home / "after", dataset=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert run(before=home / "before", after=home / "after", dataset=None).to_dict() == first.to_dict()  # U12.1
    assert run(home / "before", dataset=None, seed=1).fingerprint != first.fingerprint
    assert first.sources.keys() == {"heldout.txt"}


def test_auto_dtype_is_that_of_the_first_model_for_all(tmp_path, home, run):
    save(tmp_path / "half", change=lambda model: model.bfloat16())
    half = run(before=tmp_path / "half", after=home / "before")
    assert half.dtype == "bfloat16"
    assert half.rows[1].comparison.forward_kl.value == 0  # the float32 copy, rounded as the one before
    assert run(tmp_path / "half", dtype="float32").dtype == "float32"


def test_u10_1_the_record_names_everything(home, run):
    result = run(before=home / "before", after=home / "after", speed=True, num_samples=3)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    setting = {
        "task": "language-modelling", "version": 1, "dataset": str(home / "text.txt"), "split": "test",
        "num_samples": 3, "max_length": 32, "num_tokens": 96, "vocab_size": VOCAB, "batch_size": 2,
        "dtype": "float32", "device": "cpu", "seed": 0, "chat_template_hash": None,
    }  # fmt: skip
    assert {key: record[key] for key in setting} == setting
    assert sum(record["sources"].values()) >= 2
    assert len(record["fingerprint"]) == len(record["tokenizer_hash"]) == 32
    assert record["environment"]["versions"]["torch"]
    (speed,) = record["rows"][1]["speeds"]
    assert (speed["batch_size"], speed["prompt_tokens"], speed["new_tokens"]) == (2, 16, 16)
    assert speed["prefill_tokens_per_second"] > 0
    assert speed["peak_memory_bytes"] >= record["rows"][1]["bytes_on_disk"]


def test_each_batch_size_is_measured_on_its_own_with_all_models(home, run, monkeypatch):
    """Five blocks give 8 prompts by starting again; the prompts have one length for all batch sizes."""
    prompts = []

    def recorded(models, prompt, *, new_tokens):
        prompts.append((len(models), prompt))
        return [Speed(len(prompt), prompt.shape[1], new_tokens, 1.0, 2.0, 3.0, 4.0, 5)] * len(models)

    monkeypatch.setattr(compare, "speeds", recorded)
    result = run(before=home / "before", after=home / "after", speed=True, batch_sizes=[1, 8])
    assert [(count, tuple(prompt.shape)) for count, prompt in prompts] == [(2, (1, 16)), (2, (8, 16))]
    assert torch.equal(prompts[1][1][5:], prompts[1][1][:3])
    assert [[speed.batch_size for speed in row.speeds] for row in result.rows] == [[1, 8], [1, 8]]
    assert run(home / "before").rows[0].speeds == ()


def test_u10_4_a_slower_model_is_said_to_be(home, run):
    result = run(before=home / "before", after=home / "after")
    before = Speed(2, 16, 16, 32.0, 1000.0, 20.0, 100.0, 10**6)
    after = Speed(2, 16, 16, 21.3, 1500.0, 24.1, 83.0, 2 * 10**6)
    rows = (replace(result.rows[0], speeds=(before,)), replace(result.rows[1], speeds=(after,), model="after[bold]"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(replace(result, rows=rows).table())
    text = console.export_text()
    line = [line for line in text.splitlines() if "after[bold]" in line][1]  # of the second table
    assert "1,500 (1.50x)" in line
    assert "83 (0.83x) slower" in line
    assert text.count("slower") == 1
    assert "2.0 MB" in line


def test_the_room_can_be_called():
    with pytest.raises(ValueError, match="give one model alone"):
        burnish.evaluate(before="x")


@pytest.fixture
def cli(home):
    app = typer.Typer()
    app.command("evaluate")(command)
    options = ["--dataset", str(home / "text.txt"), "--num-samples", "2", "--max-length", "16", "--no-speed", "-q"]
    return lambda *args: CliRunner().invoke(app, [*map(str, args), *options])


def test_command_prints_one_json_object_and_writes_the_same(tmp_path, home, cli):
    out = tmp_path / "result.json"
    args = ("--before", home / "before", "--after", home / "after", "--after", home / "copy", "--json", "--out", out)
    result = cli(*args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert [Path(row["model"]).name for row in json.loads(result.stdout)["rows"]] == ["before", "after", "copy"]
    again = cli(*args)
    assert isinstance(again.exception, OutputError)


def test_command_writes_the_table_into_the_card(tmp_path, home, cli):
    after = shutil.copytree(home / "after", tmp_path / "after")
    (after / "burnish.json").write_text("{}")
    args = ("--before", home / "before", "--after", after, "--update-card")
    assert cli(*args).exit_code == 0
    written = (after / "README.md").read_text()
    assert "| | before: before | this model | difference |" in written
    assert cli(*args).exit_code == 0
    assert (after / "README.md").read_text() == written


def test_command_refuses_cards_and_batch_sizes_before_it_loads(home, cli, monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    found = cli("--before", home / "before", "--after", home / "after", "--update-card")
    assert isinstance(found.exception, OutputError)
    assert isinstance(cli(home / "before", "--update-card").exception, ValueError)
    assert "expected numbers with commas" in str(cli(home / "before", "--batch-sizes", "1;2").exception)


def test_command_prints_a_table_of_one_model(home, cli):
    result = cli(home / "before")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "KL" not in result.stdout
    assert "tok/s" not in result.stdout
