"""Preferences in every form, their tokens held against TRL's, and what is refused."""

import json
import math
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from burnish.data import bundled_model
from burnish.data.preferences import (
    Counts,
    encode_pair,
    encode_preferences,
    load_completions,
    load_pairs_or_prompts,
    load_preferences,
    load_prompts,
    load_unpaired,
    read_pair,
)
from burnish.errors import DataError
from tests.data.test_examples import ASSISTANT, CHATML, USER, chat_tokenizer, write
from tests.data.test_text import byte_tokenizer

NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "S"}
PLAIN = {"prompt": "ab", "chosen": " c", "rejected": " d"}


def only(rows):
    (found,) = rows
    return found


def shown(tokenizer, branches):
    """Prompt and completions as text; ^ and | stand for the special tokens, $ for a new line."""
    texts = [tokenizer.decode(ids) for ids in (branches.prompt_ids, *branches.branch_ids)]
    return " / ".join(texts).replace("</s>", "|").replace("<s>", "^").replace("\n", "$")


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (PLAIN, "prompt-chosen-rejected", "^ab /  c| /  d|"),
        # The space before the first difference belongs to the completions; so does the end of the shorter text.
        ({"chosen": "a b c", "rejected": "a b d"}, "implicit-prompt", "^a b /  c| /  d|"),
        ({"chosen": "ab", "rejected": "abc"}, "implicit-prompt", "^a / b| / bc|"),
        ({"chosen": "xy", "rejected": "xy"}, "implicit-prompt", "^x / y| / y|"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]}, "prompt-chosen-rejected",
         "^u:hi|$^a: / yo|$ / no|$"),
        ({"chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, NO]}, "implicit-prompt",
         "^s:S|$^u:hi|$^a: / yo|$ / no|$"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "implicit-prompt",
         "^u:hi|$^a: / yo|$ / yo|$"),
        ({"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, NO]}, "implicit-prompt",
         "^u:hi|$^a: / yo|$ / no|$"),
        ({"prompt": "hi", "chosen": [ASSISTANT], "rejected": [NO]}, "prompt-chosen-rejected",
         "^u:hi|$^a: / yo|$ / no|$"),
        ({"prompt": [USER], "chosen": "yo", "rejected": "no"}, "prompt-chosen-rejected", "^u:hi|$^a: / yo|$ / no|$"),
        ({"conversations": [{"from": "human", "value": "hi"}], "system": "S", "chosen": {"from": "gpt", "value": "yo"},
          "rejected": {"from": "gpt", "value": "no"}}, "conversations", "^s:S|$^u:hi|$^a: / yo|$ / no|$"),
    ],
)  # fmt: skip
def test_pairs_in_every_form(tmp_path, row, format, expected):
    found = only(load_preferences(write(tmp_path, row)))
    chat = isinstance(found.prompt, list)
    tokenizer = chat_tokenizer() if chat else byte_tokenizer("<s> $A </s>")
    assert (found.format, found.label, found.source, found.row) == (format, 1.0, "rows.jsonl", 1)
    assert shown(tokenizer, encode_pair(tokenizer, found, 99)) == expected


def chatml(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def chat(prompt, *answers):
    return [prompt, *([{"role": "assistant", "content": answer}] for answer in answers)]


ROWS = {
    "plain": [
        dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
        for row in [
            ("The capital of France is", " Paris.", " a town."),
            ("A word that is cut in the mid", "dle of a token", "st of it"),  # tokens span both
            ("", "nothing before it", "no prompt"),
            ("same", " answer", " answer"),
            ("long " * 30, "dropped", "gone"),
            ("long " * 10, "cut " * 30, "cut, too " * 30),
            ("ends itself", " already<|endoftext|>", " not"),
        ]
    ],
    "implicit": [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Understand this", "rejected": "Undertake this"},
        {"chosen": "one two", "rejected": "one two three"},
    ],
    "chat": [
        dict(zip(("prompt", "chosen", "rejected"), chat(*row), strict=True))
        for row in [
            ([USER], "yo", "no"),
            ([SYSTEM, USER, ASSISTANT, USER], "A longer answer.\nOf two lines.", "x"),
            ([{"role": "user", "content": "word " * 40}], "dropped", "gone"),
        ]
    ],
    "implicit chat": [{"chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, NO]}],
}


@pytest.mark.parametrize("kind", ROWS)
def test_u8_2_the_tokens_are_those_of_the_peer(tmp_path, kind):
    """TRL's DPOTrainer prepares the same prompts and completions; the rows that it would drop are dropped."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    max_length = 48
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    tokenizer = chatml(tokenizer) if "chat" in kind else tokenizer
    if "prompt" in ROWS[kind][0] and kind == "plain":
        tokenizer._tokenizer.post_processor = opened(tokenizer)
    ours, counts = encode_preferences(tokenizer, load_preferences(write(tmp_path, *ROWS[kind])), max_length)
    peer = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        Dataset.from_list(ROWS[kind]),
        tokenizer,
        DPOConfig(output_dir=str(tmp_path), max_length=max_length, report_to=[], bf16=False),
        "train",
    )
    found = [(row["prompt_ids"], *row["branch_ids"]) for row in ours]
    room = [max_length - len(row["prompt_ids"]) for row in peer]
    expected = [
        (row["prompt_ids"], row["chosen_ids"][:left], row["rejected_ids"][:left])
        for row, left in zip(peer, room, strict=True)
    ]
    assert found == expected and counts.dropped == len(ROWS[kind]) - len(found)


def opened(tokenizer):
    """A post-processor that opens texts with the beginning-of-text token, so that a prompt may be empty."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    return TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completion(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["b "])
    found = encode_pair(tokenizer, only(load_preferences(write(tmp_path, PLAIN))), 99)
    assert shown(tokenizer, found) == "a / b c| / b d|" and found.moved
    # It does in one completion: then in the other too, so that both have the same prompt.
    row = {"prompt": "ab", "chosen": " c", "rejected": "d"}
    assert shown(tokenizer, encode_pair(tokenizer, only(load_preferences(write(tmp_path, row))), 99)) == (
        "a / b c| / bd|"
    )


def test_a_template_without_an_end_of_turn_gets_the_end_token(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    found = only(load_preferences(write(tmp_path, {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]})))
    assert shown(tokenizer, encode_pair(tokenizer, found, 99)) == "u:hi;a: / yo;| / no;|"


@pytest.mark.parametrize(
    ("max_length", "expected", "cut"),
    [(6, "^ab / cde| / f|", 0), (5, "^ab / cd / f|", 1), (4, "^ab / c / f", 2), (3, None, 0)],
)
def test_completions_lose_their_end_and_prompts_nothing(tmp_path, max_length, expected, cut):
    tokenizer = byte_tokenizer("<s> $A </s>")
    row = only(load_preferences(write(tmp_path, {"prompt": "ab", "chosen": "cde", "rejected": "f"})))
    max_length += expected == "^ab / cde| / f|"
    found = encode_pair(tokenizer, row, max_length)
    assert (found and (shown(tokenizer, found), found.cut)) == (expected and (expected, cut))


def test_u9_4_what_is_special_about_the_rows_is_counted_and_said(tmp_path):
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "c", "label": 0.5},
        {"prompt": "ab", "chosen": "cdefg", "rejected": "d", "label": 1},
        {"prompt": "abcdefg", "chosen": "c", "rejected": "d", "label": False},
        {"chosen": "ac", "rejected": "ad", "label": 0.25},
    ]
    data, counts = encode_preferences(byte_tokenizer("<s> $A"), load_preferences(write(tmp_path, *rows)), 6)
    assert data["label"] == [0.5, 1.0, 0.25] and data["row"] == [0, 1, 3]
    assert (counts.sources, counts.kept) == ({"rows.jsonl": 4}, 3)
    assert str(counts) == (
        "4 rows: 3 prompt-chosen-rejected, 1 implicit-prompt; 21 tokens, 13 of completions, 1 dropped, their prompt"
        " alone does not fit, 1 of equal completions, whose loss is constant (ln 2 with dpo), 2 of soft labels,"
        " 1 completions cut"
    )


def test_scores_annotators_and_similarities_become_columns_of_rows(tmp_path):
    extra = {"score_chosen": 3, "score_rejected": -1.5, "annotator": 7, "similarity": 0.5}
    data, _ = encode_preferences(byte_tokenizer(), load_preferences(write(tmp_path, PLAIN | extra)), 99)
    row = data[0]
    assert (row["rewards"], row["annotator"], row["similarity"]) == ([3.0, -1.5], "7", 0.5)
    with pytest.raises(
        DataError, match=r"rows\.jsonl row 2: has no score_chosen and score_rejected, which rows\.js.* 1"
    ):
        encode_preferences(
            byte_tokenizer(),
            load_preferences(write(tmp_path, PLAIN | {"score_chosen": 1, "score_rejected": 0}, PLAIN)),
            99,
        )
    with pytest.raises(DataError, match=r"rows\.jsonl row 1: has no annotator, which rows\.jsonl row 2 has"):
        encode_preferences(byte_tokenizer(), load_preferences(write(tmp_path, PLAIN, PLAIN | {"annotator": "a"})), 99)


def test_tables_give_the_same_pairs_as_json_lines(tmp_path):
    rows = [PLAIN | {"label": 0.25, "score_chosen": 2.0, "score_rejected": 1.0}, PLAIN | {"label": 1.0}]
    rows[1] |= {"score_chosen": None, "score_rejected": None}
    write(tmp_path, *rows, name="a.jsonl")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(
        "prompt,chosen,rejected,label,score_chosen,score_rejected\nab, c, d,0.25,2,1\nab, c, d,True,,\n"
    )
    found = [[row[3:7] for row in load_preferences(tmp_path / f"a.{kind}")] for kind in ("jsonl", "parquet", "csv")]
    assert found[1:] == found[:1] * 2 and found[0][0][2:] == (0.25, (2.0, 1.0))[:2]


def test_tools_reach_the_template_as_objects_or_as_text(tmp_path):
    tokenizer = chat_tokenizer("{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML)
    row = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]}
    for tools in ([{"name": "T"}], '[{"name": "T"}]'):
        found = only(load_preferences(write(tmp_path, row | {"tools": tools})))
        assert shown(tokenizer, encode_pair(tokenizer, found, 99)) == "T^u:hi|$^a: / yo|$ / no|$"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "ab", "completion": " c", "label": True}, [("ab", (" c",), 1.0)]),
        ({"prompt": [USER], "completion": [NO], "label": 0}, [([USER], ([NO],), 0.0)]),
        ({"messages": [USER, ASSISTANT], "label": False}, [([USER], ([ASSISTANT],), 0.0)]),
        (PLAIN, [("ab", (" c",), 1.0), ("ab", (" d",), 0.0)]),
        (PLAIN | {"label": 0}, [("ab", (" c",), 0.0), ("ab", (" d",), 1.0)]),
    ],
)
def test_single_judged_completions(tmp_path, row, expected):
    found = list(load_unpaired(write(tmp_path, row)))
    assert [(one.prompt, one.completions, one.label) for one in found] == expected
    assert all((one.source, one.row) == ("rows.jsonl", 1) for one in found)


def test_pairs_or_prompts_but_not_both(tmp_path):
    assert [len(row.completions) for row in load_pairs_or_prompts(write(tmp_path, PLAIN, PLAIN))] == [2, 2]
    assert [row.prompt for row in load_pairs_or_prompts(write(tmp_path, {"prompt": "a"}))] == ["a"]
    with pytest.raises(
        DataError, match=r"rows\.jsonl row 2: has no chosen and no rejected, which rows\.jsonl row 1 has"
    ):
        list(load_pairs_or_prompts(write(tmp_path, PLAIN, {"prompt": "a"})))
    with pytest.raises(DataError, match=r"row 1: found the columns 'prompt', 'chosen'; .*; or `prompt` alone"):
        list(load_pairs_or_prompts(write(tmp_path, {"prompt": "a", "chosen": "b"})))


def test_completions_need_no_label(tmp_path):
    rows = [{"prompt": "ab", "completion": " c"}, {"messages": [USER, ASSISTANT], "label": False}]
    found = [(row.prompt, row.completions, row.label) for row in load_completions(write(tmp_path, *rows))]
    assert found == [("ab", (" c",), 1.0), ([USER], ([ASSISTANT],), 1.0)]
    with pytest.raises(DataError, match=r"row 1: found the columns 'prompt'; accepted: `prompt` and `completion`"):
        list(load_completions(write(tmp_path, {"prompt": "a"})))


def test_prompts_alone(tmp_path):
    rows = list(load_prompts(write(tmp_path, PLAIN, {"prompt": [USER]})))
    assert [(row.prompt, row.completions) for row in rows] == [("ab", ()), ([USER], ())]
    data, counts = encode_preferences(chat_tokenizer(), rows, 99)
    assert data["branch_ids"] == [[], []] and counts.learned == 0
    assert chat_tokenizer().decode(data["prompt_ids"][1]) == "<s>u:hi</s>\n<s>a:"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"found list \[1\], expected an object; accepted: `prompt`"),
        ({"prompt": "a", "chosen": "b"}, r"found the columns 'prompt', 'chosen'; accepted: `prompt`, `chosen`"),
        (PLAIN | {"chosen": None}, r"found the columns 'prompt', 'rejected'; accepted"),
        (PLAIN | {"chosen": ""}, r"column 'chosen' is empty, expected a completion"),
        (PLAIN | {"rejected": 3}, r"column 'rejected' is int 3, expected a string"),
        (PLAIN | {"rejected": [NO]}, r"column 'rejected' is list .*, expected a string"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": "no"},
         r"column 'rejected' is str 'no', expected a list"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": ""}]},
         r"column 'rejected' has an empty turn, expected a completion"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [NO]},
         r"column 'chosen' has the roles user behind the prompt, expected turns of the assistant alone"),
        ({"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "other"}, NO]},
         r"column 'chosen' has the roles user, assistant behind the prompt"),
        ({"prompt": [USER], "chosen": [{"role": "robot", "content": "a"}], "rejected": [NO]},
         r"column 'chosen' item 1 is dict .*a role of system"),
        ({"prompt": [], "chosen": [ASSISTANT], "rejected": [NO]}, r"column 'prompt' is list \[\], expected a list"),
        (PLAIN | {"label": 1.2}, r"column 'label' is float 1\.2, expected a number from 0 to 1"),
        (PLAIN | {"label": "maybe"}, r"column 'label' is str 'maybe', expected a number from 0 to 1"),
        (PLAIN | {"label": math.nan}, r"column 'label' is float nan, expected a number from 0 to 1"),
        (PLAIN | {"score_chosen": math.nan, "score_rejected": 1},
         r"column 'score_chosen' is float nan, expected a finite number"),
        (PLAIN | {"score_chosen": 1}, r"column 'score_rejected' is missing, the other score is there; accepted"),
        (PLAIN | {"similarity": 2}, r"column 'similarity' is int 2, expected a number from -1 to 1"),
        (PLAIN | {"tools": "{"}, r"column 'tools' is str '{', expected JSON"),
        (PLAIN | {"tools": {}}, r"column 'tools' is dict {}, expected a list of objects"),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"},
         r"column 'chosen': column 'conversations' item 1 is str 'b', expected a from"),
    ],
)  # fmt: skip
def test_u9_3_bad_pairs_are_refused_with_file_row_and_column(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl row 2: {message}") as caught:
        next(load_preferences(write(tmp_path, PLAIN, row)))  # before the good first row is given
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_unpaired, {"prompt": "a", "completion": "b"}, r"found the columns 'prompt', 'completion'; accepted: `pr"),
        (load_unpaired, {"prompt": "a", "completion": "", "label": 1}, r"column 'completion' is empty"),
        (load_unpaired, {"prompt": "a", "completion": "b", "label": 0.5}, r"column 'label' is 0\.5, expected true or"),
        (load_unpaired, {"prompt": "a", "completion": "b", "label": 2}, r"column 'label' is int 2, expected a number"),
        (load_unpaired, {"messages": [ASSISTANT], "label": 1}, r"column 'messages' has one turn"),
        (load_unpaired, {"messages": [USER, USER], "label": 1}, r"column 'messages' has the roles user behind"),
        (load_unpaired, PLAIN | {"label": 0.3}, r"column 'label' is 0\.3, expected 0 or 1 where a pair is taken apart"),
        (load_prompts, {"text": "a"}, r"found the columns 'text'; accepted: `prompt`"),
        (load_prompts, {"prompt": 1}, r"column 'prompt' is int 1, expected a list"),
    ],
)
def test_u9_3_other_bad_rows(tmp_path, load, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl row 1: {message}"):
        list(load(write(tmp_path, row)))


def test_data_that_give_nothing_to_learn_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows in it; accepted: `prompt`"):
        list(load_preferences(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl: no prompt is shorter than max_length=2: raise it"):
        encode_preferences(byte_tokenizer(), load_preferences(write(tmp_path, PLAIN)), 2)
    row = read_pair(PLAIN | {"prompt": ""}, "here")
    with pytest.raises(DataError, match="the prompt has no token of its own, and the tokenizer opens texts with none"):
        encode_pair(byte_tokenizer(), row, 9)
    chat = read_pair({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]}, "here")
    with pytest.raises(DataError, match="the chat needs a chat template, and the tokenizer has none"):
        encode_pair(byte_tokenizer(), chat, 9)
    with pytest.raises(ValueError, match="max_length=1: choose at least 2"):
        encode_pair(byte_tokenizer(), row, 1)
    with pytest.raises(ValueError, match="no eos_token"):
        encode_pair(byte_tokenizer(eos_token=None), row, 9)


def test_counts_of_nothing_are_zero():
    assert Counts().kept == 0 and json.loads(json.dumps(Counts().formats)) == {}
