import io
import json

import pyarrow
import pytest
import torch
from pyarrow import parquet

from burnish.data.examples import IGNORED, Counts, encode, load_examples
from burnish.errors import DataError
from tests.data.test_text import byte_tokenizer

# ChatML in miniature: <s> opens a turn, </s> ends it, a new line follows.
CHATML = (
    "{% for m in messages %}<s>{{ m['role'][0] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def chat_tokenizer(template=CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(tmp_path, *rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def first(tmp_path, row):
    (example,) = load_examples(write(tmp_path, row))
    return example


def counted(tokenizer, dataset, max_length):
    rows, counts = [], Counts()
    for example in load_examples(dataset):
        rows.append(encode(tokenizer, example, max_length))
        counts.add(example, rows[-1])
    return rows, counts


def shown(tokenizer, encoded):
    """The tokens as text, those that are learned in brackets; ^ and | stand for the special tokens."""
    text, inside = "", False
    for token, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) != inside:
            text, inside = text + ("]" if inside else "["), not inside
        text += tokenizer.decode([token])
    return (text + ("]" if inside else "")).replace("</s>", "|").replace("<s>", "^").replace("\n", "$")


def test_of_two_strings_the_completion_and_the_end_token_are_learned(tmp_path):
    tokenizer = byte_tokenizer("<s> $A </s>")
    encoded = encode(tokenizer, first(tmp_path, {"prompt": "ab", "completion": " c"}), 99)
    assert shown(tokenizer, encoded) == "^ab[ c|]"
    assert encoded.input_ids.dtype == encoded.labels.dtype == torch.int64 and encoded.cut == "nothing"
    assert shown(byte_tokenizer(), encode(byte_tokenizer(), first(tmp_path, {"prompt": "", "completion": "c"}), 9)) == (
        "[c|]"
    )


def test_a_token_that_holds_the_end_of_the_prompt_and_the_beginning_of_the_answer_is_learned(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["b "])
    assert shown(tokenizer, encode(tokenizer, first(tmp_path, {"prompt": "ab", "completion": " c"}), 99)) == "a[b c|]"


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path):
    tokenizer = chat_tokenizer()
    chat = [{"role": "system", "content": "S"}, USER, ASSISTANT, {"role": "user", "content": "2?"}, ASSISTANT]
    encoded = encode(tokenizer, first(tmp_path, {"messages": chat}), 99)
    assert shown(tokenizer, encoded) == "^s:S|$^u:hi|$^a:[yo|$]^u:2?|$^a:[yo|$]"


def test_in_a_prompt_of_messages_the_assistant_is_not_learned(tmp_path):
    tokenizer = chat_tokenizer()
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "ok"}]}
    assert shown(tokenizer, encode(tokenizer, first(tmp_path, row), 99)) == "^u:hi|$^a:yo|$^u:hi|$^a:[ok|$]"


def test_a_template_that_ends_turns_with_no_special_token_gets_the_end_token(tmp_path):
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    assert shown(tokenizer, encode(tokenizer, first(tmp_path, {"messages": [USER, ASSISTANT]}), 99)) == "u:hi;a:[yo;|]"


def test_a_template_that_ends_only_earlier_turns_gets_the_end_token(tmp_path):
    tokenizer = chat_tokenizer(CHATML.replace("</s>\n", "{{ '' if loop.last and m['role'] != 'user' else '</s>' }}"))
    assert shown(tokenizer, encode(tokenizer, first(tmp_path, {"messages": [USER, ASSISTANT]}), 99)) == "^u:hi|^a:[yo|]"


def test_tools_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer("{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML)
    row = {"messages": [USER, ASSISTANT], "tools": [{"name": "T"}]}
    assert shown(tokenizer, encode(tokenizer, first(tmp_path, row), 99)) == "T^u:hi|$^a:[yo|$]"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "add", "input": "12", "output": "3"}, "^u:add$$12|$^a:[3|$]"),
        ({"instruction": "add", "input": "", "output": "3"}, "^u:add|$^a:[3|$]"),
        (
            {"instruction": "q", "output": "3", "system": "S", "history": [["x", "y"]]},
            "^s:S|$^u:x|$^a:y|$^u:q|$^a:[3|$]",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
            "^s:S|$^u:a|$^a:[b|$]",
        ),
        (
            {
                "conversations": [
                    {"from": who, "value": who[0]} for who in ("system", "user", "assistant", "observation")
                ]
            },
            "^s:s|$^u:u|$^a:[a|$]^t:o|$",
        ),
    ],
)
def test_alpaca_and_sharegpt_become_chats_and_this_is_said(tmp_path, row, expected):
    tokenizer = chat_tokenizer()
    ((encoded,), counts) = counted(tokenizer, write(tmp_path, row), 99)
    assert shown(tokenizer, encoded) == expected
    assert "(converted to messages)" in str(counts)


@pytest.mark.parametrize(
    ("max_length", "expected", "cut"),
    [
        (8, "^abcd[ef|]", "nothing"),
        (7, "^bcd[ef|]", "prompt"),
        (4, "^[ef|]", "prompt"),
        (3, "^[ef]", "completion"),
        (2, "^[e]", "completion"),
    ],
)
def test_the_prompt_is_cut_from_the_left_and_only_then_the_completion_from_the_right(
    tmp_path, max_length, expected, cut
):
    tokenizer = byte_tokenizer("<s> $A")
    encoded = encode(tokenizer, first(tmp_path, {"prompt": "abcd", "completion": "ef"}), max_length)
    assert (shown(tokenizer, encoded), encoded.cut) == (expected, cut)


def test_without_an_opening_token_all_of_the_prompt_may_go(tmp_path):
    tokenizer = byte_tokenizer()
    example = first(tmp_path, {"prompt": "abcd", "completion": "ef"})
    found = [shown(tokenizer, encode(tokenizer, example, size)) for size in (6, 3, 2)]
    assert found == ["bcd[ef|]", "[ef|]", "[ef]"]


def test_u9_4_rows_formats_cuts_and_tokens_are_counted(tmp_path):
    write(tmp_path, {"prompt": "abcd", "completion": "e"}, {"prompt": "a", "completion": "bcdefgh"}, name="a.jsonl")
    write(tmp_path, {"instruction": "i", "output": "o"}, {"prompt": "a", "completion": "b"}, name="b.jsonl")
    rows, counts = counted(chat_tokenizer(), tmp_path, 5)
    assert counts.sources == {"a.jsonl": 2, "b.jsonl": 2} and counts.formats == {"prompt-completion": 3, "alpaca": 1}
    assert counts.cut == {"prompt": 2, "completion": 1, "nothing": 1}
    assert [len(row.labels) for row in rows] == [5, 5, 5, 3] and counts.tokens == 18
    assert counts.learned == 2 + 5 + 3 + 2 == sum(int((row.labels != IGNORED).sum()) for row in rows)
    assert str(counts) == (
        "4 rows: 3 prompt-completion, 1 alpaca (converted to messages); 18 tokens, 12 learned, 2 prompts cut,"
        " 1 completions cut"
    )


def test_every_file_format_gives_the_same_examples(tmp_path, monkeypatch):
    rows = [{"id": 1, "prompt": "007", "completion": "x,\ny"}, {"id": 2, "prompt": "ü", "completion": "NA"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write(tmp_path, *rows, name="a.jsonl")
    (tmp_path / "a.csv").write_text('id,prompt,completion\n1,007,"x,\ny"\n2,ü,NA\n')
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "a.jsonl").read_text()))
    found = [
        [(example.prompt, example.completion, example.row) for example in load_examples(name)]
        for name in ("-", *(tmp_path / f"a.{suffix}" for suffix in ("json", "jsonl", "csv", "parquet")))
    ]
    assert found == [[("007", "x,\ny", 1), ("ü", "NA", 2)]] * 5


def test_columns_that_a_row_of_a_table_leaves_null_are_not_there(tmp_path):
    rows = [{"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist([{**dict.fromkeys(rows[0] | rows[1]), **row} for row in rows]),
                        tmp_path / "a.parquet")  # fmt: skip
    assert [example.format for example in load_examples(tmp_path / "a.parquet")] == ["messages", "prompt-completion"]


def test_u12_1_a_seed_fixes_the_order(tmp_path):
    file = write(tmp_path, *({"prompt": str(i), "completion": ""} for i in range(9)))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5)).tolist()
    assert [example.prompt for example in load_examples(file, seed=5)] == [str(i) for i in order]


def test_hub_data_set_takes_config_and_split(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    examples = load_examples("owner/name:config", split="test")
    assert next(examples).source == "owner/name:config" and calls == [("owner/name", "config", "test")]
    with pytest.raises(DataError, match=r"owner/name:config row 2: found the columns 'prompt'; accepted: `messages`"):
        next(examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"found list \[1\], expected an object; accepted: `messages`"),
        ({"text": "a"}, r"found the columns 'text'; accepted: `messages`"),
        ({"prompt": None, "completion": "a"}, r"found the columns 'completion'; accepted"),
        ({"prompt": "a", "completion": 3}, r"column 'completion' is int 3, expected a string"),
        ({"prompt": "a", "completion": [ASSISTANT]}, r"column 'completion' is list .*, expected a string"),
        ({"prompt": [USER], "completion": "a"}, r"column 'completion' is str 'a', expected a list"),
        ({"prompt": [USER], "completion": [USER]}, r"column 'completion' is list .*, expected a turn of the assistant"),
        ({"messages": "a"}, r"column 'messages' is str 'a', expected a list"),
        (
            {"messages": [USER, {"role": "robot", "content": ""}]},
            r"column 'messages' item 2 is dict .*a role of system",
        ),
        ({"messages": [USER]}, r"column 'messages' has the roles user, expected a turn of the assistant after"),
        (
            {"messages": [ASSISTANT, USER]},
            r"column 'messages' has the roles assistant, user, expected a turn of the assistant after",
        ),
        ({"messages": [USER, ASSISTANT], "tools": {}}, r"column 'tools' is dict {}, expected a list"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            r"column 'conversations' item 1 is dict .*a from of human, user",
        ),
        ({"conversations": [{"from": "human"}]}, r"column 'conversations' item 1 is dict .*a value that is a string"),
        ({"conversations": []}, r"column 'conversations' is list \[\], expected a list"),
        ({"instruction": 1, "output": "a"}, r"column 'instruction' is int 1, expected a string"),
        ({"instruction": "a", "output": "b", "input": [1]}, r"column 'input' is list \[1\], expected a string"),
        (
            {"instruction": "a", "output": "b", "history": [["q"]]},
            r"column 'history' is .*a list of \[question, answer\]",
        ),
    ],
)
def test_u9_3_bad_rows_are_refused_with_file_row_and_column(tmp_path, row, message):
    file = write(tmp_path, {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl row 2: {message}") as caught:
        next(load_examples(file))  # before the good first row is given
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: no rows in it; accepted"),
        ("a.jsonl", "{\n", r"a\.jsonl row 1: not JSON"),
        ("a.txt", "text", r"a\.txt: expected a file \.json, \.jsonl, \.csv, \.parquet, or a directory"),
        ("a.csv", "prompt\na\n", r"a\.csv row 1: found the columns 'prompt'"),
    ],
)
def test_u9_3_files_without_examples_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(load_examples(tmp_path / name))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a chat template"),
        ("{{ raise_exception('no') }}", r"refused by the tokenizer's chat template \(no\)"),
        # What earlier turns look like depends on later ones, as with templates that drop old reasoning.
        ("{{ messages | length }}" + CHATML, "the chat up to message 2 is not how .* the whole begin"),
        # An answer looks otherwise where a question follows.
        (
            CHATML.replace("</s>", "{{ '!' if loop.last and m['role'] != 'user' }}</s>"),
            "the chat up to message 2 is not how .* the whole begin",
        ),
        # The opening for generation is not how an answer begins.
        (CHATML.replace("<s>a:{% endif", "<s>a::{% endif"), "the chat up to message 2 is not how"),
    ],
)
def test_a_template_must_write_turn_after_turn(tmp_path, template, message):
    example = first(tmp_path, {"messages": [USER, ASSISTANT, USER]})
    with pytest.raises(DataError, match=rf"rows\.jsonl row 1: the chat.*{message.removeprefix('the chat')}"):
        encode(chat_tokenizer(template), example, 99)


def test_sizes_and_tokenizers_that_cannot_work_are_refused(tmp_path):
    example = first(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="max_length=1: choose at least 2"):
        encode(byte_tokenizer(), example, 1)
    with pytest.raises(ValueError, match="no eos_token"):
        encode(byte_tokenizer(eos_token=None), example, 9)
