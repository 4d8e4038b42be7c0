import io
import json
import socket
import warnings

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from burnish.data import TokenBlocks, bundled_text, load_texts, token_blocks
from burnish.errors import DataError

DOCUMENTS = ["ab", "cd", "efg"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"


def byte_tokenizer(template=None, **special):
    """One token a byte; `template` is what a call adds around the text."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if template:
        core.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    return file


def decoded(tokenizer, ids):
    return tokenizer.decode(ids).replace("</s>", "|").replace("<s>", "^")


def test_documents_are_joined_by_the_end_token_and_cut_into_blocks(tokenizer, corpus):
    blocks = token_blocks(tokenizer, corpus, num_samples=2, max_length=4, shuffle=False)
    assert [decoded(tokenizer, row) for row in blocks.input_ids] == ["ab|c", "d|ef"]  # the tail "g" is dropped
    assert blocks.input_ids.dtype == torch.int64
    assert blocks.attention_mask.dtype == torch.bool
    assert blocks.attention_mask.all()
    assert blocks.num_tokens == 8


@pytest.mark.parametrize(
    ("template", "expected"),
    [("<s> $A", "^ab|^cd|^efg"), ("<s> $A </s>", "^ab|^cd|^efg"), ("$A </s>", "ab|cd|efg"), (None, "ab|cd|efg")],
)
def test_only_the_tokenizers_own_bos_is_added(corpus, template, expected):
    tokenizer = byte_tokenizer(template)
    blocks = token_blocks(tokenizer, corpus, num_samples=1, max_length=len(expected), shuffle=False)
    assert decoded(tokenizer, blocks.input_ids[0]) == expected


def test_reading_stops_when_there_are_enough_tokens(tokenizer, corpus):
    blocks = token_blocks(tokenizer, corpus, num_samples=1, max_length=4, shuffle=False)
    assert blocks.sources == {"corpus.txt": 2}


def test_short_corpus_gives_fewer_blocks_and_says_how_many(tokenizer, corpus):
    with pytest.warns(UserWarning, match=r"9 tokens fill 2 of the 5 blocks of 4"):
        blocks = token_blocks(tokenizer, corpus, num_samples=5, max_length=4, shuffle=False)
    assert blocks.input_ids.shape == (2, 4)
    assert blocks.attention_mask.all()


@pytest.mark.parametrize(("pad", "expected"), [({}, "ab|cd|efg|||"), ({"pad_token": "<s>"}, "ab|cd|efg^^^")])
def test_corpus_shorter_than_a_block_gives_one_padded_block(corpus, pad, expected):
    tokenizer = byte_tokenizer(**pad)
    with pytest.warns(UserWarning, match="one padded block"):
        blocks = token_blocks(tokenizer, corpus, num_samples=5, max_length=12, shuffle=False)
    assert [decoded(tokenizer, row) for row in blocks.input_ids] == [expected]
    assert blocks.attention_mask.tolist() == [[True] * 9 + [False] * 3]
    assert blocks.num_tokens == 9


def test_u12_1_a_seed_fixes_the_order_and_another_changes_it(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": chr(97 + i)}) + "\n" for i in range(26)))
    state = torch.get_rng_state()
    first, again, other = (token_blocks(tokenizer, file, num_samples=1, max_length=51, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)  # U12.2
    assert first.fingerprint == again.fingerprint != other.fingerprint
    order = torch.randperm(26, generator=torch.Generator().manual_seed(3)).tolist()
    assert decoded(tokenizer, first.input_ids[0]) == "|".join(chr(97 + i) for i in order)


def test_fingerprint_covers_ids_mask_and_shape():
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    changed_ids, changed_mask = ids.clone(), mask.clone()
    changed_ids[1, 3] = 0
    changed_mask[1, 3] = False
    variants = [(ids, mask), (changed_ids, mask), (ids, changed_mask), (ids.view(4, 2), mask.view(4, 2))]
    fingerprints = [TokenBlocks(*variant, {}).fingerprint for variant in variants]
    assert len(set(fingerprints)) == 4
    assert fingerprints[0] == TokenBlocks(ids.clone(), mask.clone(), {"other": 1}).fingerprint


def write(path, documents):
    rows = [{"id": i, "text": document} for i, document in enumerate(documents)]
    if path.suffix in (".txt", ".md"):
        path.write_text("\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{i},"{document}"\n' for i, document in enumerate(documents)))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".json", ".jsonl", ".csv", ".parquet"])
def test_u11_1_every_file_format_gives_the_same_documents_without_network(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    documents = [
        "one\n<|endoftext|> starts, is <|endoftext|> inside and ends a line <|endoftext|>",
        "  ",
        "long " * 300_000,
        "ünï",
    ]
    write(tmp_path / f"rows{suffix}", documents)
    texts = list(load_texts(tmp_path / f"rows{suffix}"))
    assert [text.content for text in texts] == [documents[0], *documents[2:]]  # the blank one is left out
    assert [text.row for text in texts] == [1, 3, 4]


def test_a_number_in_a_csv_column_is_text(tmp_path):
    write(tmp_path / "rows.csv", ["007"])
    assert [text.content for text in load_texts(tmp_path)] == ["007"]


def test_u9_4_a_directory_counts_documents_per_source(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.csv", ["aaaa"])
    write(tmp_path / "sub" / "a.jsonl", ["bb", "cc"])
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    blocks = token_blocks(tokenizer, tmp_path, num_samples=1, max_length=10, shuffle=False)
    assert decoded(tokenizer, blocks.input_ids[0]) == "aaaa|bb|cc"
    assert blocks.sources == {"b.csv": 1, "sub/a.jsonl": 2}


def test_standard_input_is_plain_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n<|endoftext|>\ntwo\n"))
    assert [(text.source, text.content) for text in load_texts("-")] == [("stdin", "one"), ("stdin", "two")]


def test_messages_are_rendered_by_the_tokenizers_own_template_without_a_second_bos(tmp_path):
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    blocks = token_blocks(tokenizer, file, num_samples=1, max_length=8)
    assert decoded(tokenizer, blocks.input_ids[0]) == "^uhi^ayo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": 3}\n', r"a\.jsonl row 2: column 'text' is int 3, expected a string"),
        ("a.jsonl", '{"text": "ok"}\n\n{"text": \n', r"a\.jsonl row 3: not JSON at column \d+"),
        ("a.jsonl", "[1]\n", r"a\.jsonl row 1: found list \[1\], expected an object"),
        ("a.jsonl", '{"prompt": "x", "y": 1}\n', r"row 1: found the columns 'prompt', 'y'; accepted: a column `text`"),
        (
            "a.json",
            '{"text": "ok"}\n{"text": "ok"}',
            r"a\.json: cannot be read as \.json \(Extra data: line 2 column 1",
        ),
        ("a.json", '{"text": "ok"}', r"expected an array of objects"),
        ("a.json", '[{"text": "ok"}, {"text": null}]', r"a\.json row 2: column 'text' is NoneType None"),
        ("a.csv", "text,b\nok,1\nbad\n", r"a\.csv: cannot be read as \.csv .*Row #3: Expected 2 columns, got 1"),
        ("a.csv", "prompt\nok\n", r"a\.csv row 1: found the columns 'prompt'"),
        ("a.parquet", "text", r"a\.parquet: cannot be read as \.parquet"),
        ("a.jsonl", '{"messages": []}', r"row 1: column 'messages' is list \[\], expected a list"),
        (
            "a.jsonl",
            json.dumps({"messages": [*CHAT, {"role": "robot", "content": "x"}]}),
            r"row 1: column 'messages' item 3 is dict .*robot.*, expected a role of system, .* and a content",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', r"column 'messages' item 1 is dict"),
        ("a.txt", "", r"a\.txt: no text in it"),
        ("a.bin", "text", r"a\.bin: expected a file \.txt, \.md"),
    ],
)
def test_u9_3_bad_data_is_refused_with_file_row_and_column(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(load_texts(file))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as \.txt .*position 5"):
        list(load_texts(tmp_path))


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "needs a chat template"), ("{{ raise_exception('roles must alternate') }}", "roles must alternate")],
)
def test_messages_need_a_template_that_accepts_them(tmp_path, template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match=rf"chat\.jsonl row 1: column 'messages' .*{message}"):
        token_blocks(tokenizer, file, num_samples=1, max_length=8)


@pytest.mark.parametrize("name", ["missing.jsonl", "/no/such/place", "./missing"])
def test_missing_file_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("network"))
    with pytest.raises(DataError, match="no such file or directory"):
        list(load_texts(name))


def test_hub_data_set_takes_name_config_and_split(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return [{"text": "a"}, {"text": ""}, {"text": 5}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    texts = load_texts("owner/name:config", split="validation")
    assert next(texts).content == "a"
    with pytest.raises(DataError, match=r"owner/name:config row 3: column 'text' is int 5"):
        next(texts)
    assert calls == [("owner/name", "config", "validation")]


def test_u11_3_hub_data_set_that_cannot_be_loaded_says_how_to_fetch_it(monkeypatch):
    def load_dataset(name, config, *, split):
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"\(offline\); .*: hf download --repo-type dataset owner/name$"):
        list(load_texts("owner/name"))


@pytest.mark.parametrize(("num_samples", "max_length"), [(0, 8), (1, 1)])
def test_sizes_are_checked(tokenizer, num_samples, max_length):
    with pytest.raises(ValueError, match=f"num_samples={num_samples}, max_length={max_length}"):
        token_blocks(tokenizer, num_samples=num_samples, max_length=max_length)


def test_a_tokenizer_without_an_end_token_is_refused(corpus):
    with pytest.raises(ValueError, match="no eos_token"):
        token_blocks(byte_tokenizer(eos_token=None), corpus, num_samples=1, max_length=4)


@pytest.mark.parametrize("name", ["calibration", "heldout"])
def test_bundled_text_holds_many_documents(tokenizer, name):
    with warnings.catch_warnings(action="error"):
        blocks = token_blocks(tokenizer, bundled_text(name), num_samples=64, max_length=512)
    assert blocks.sources[f"{name}.txt"] > 1


def test_text_of_a_single_token_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: 1 tokens after tokenisation, expected at least 2"):
        token_blocks(tokenizer, tmp_path / "a.txt", num_samples=1, max_length=4)
