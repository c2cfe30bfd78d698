"""Chat formats: the same conversation is read from each, and what is not understood is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.models import tiny_tokenizer

from pvec.data.conversations import Chat, Columns, Pair, conversation_of
from pvec.data.json_table import parse_row
from pvec.data.spans import SpanMaker, TemplateCheck
from pvec.data.table import BadRow, Row
from pvec.data.tables import open_table
from pvec.errors import InputError
from pvec.projection.inputs import open_source
from pvec.settings import Settings
from pvec.training.data import read_chats
from pvec.training.masks import tokenize_conversation

DATA = os.environ.get("PVEC_TEST_DATA")

EXPECTED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
]


def messages(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": EXPECTED},
    "developer": {"messages": messages(("developer", "Be brief."), *[
        (m["role"], m["content"]) for m in EXPECTED[1:]])},
    "parts": {"messages": messages(
        ("system", "Be brief."),
        ("user", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]),
        ("assistant", [{"type": "text", "text": "Hi."}]),
    )},
    "top-level system": {"system": "Be brief.", "messages": EXPECTED[1:]},
    "nulls of a parquet file": {"messages": [
        {**m, "tool_calls": None, "weight": None, "name": None} for m in EXPECTED], "tools": None},
    "sharegpt": {"system": "Be brief.", "conversations": [
        {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
    "sharegpt with roles": {"conversations": EXPECTED},
    "alpaca": {"system": "Be brief.", "instruction": "Hello", "input": "", "output": "Hi."},
    "prompt and completion": {"prompt": EXPECTED[:2], "completion": EXPECTED[2:]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_conversation_to_every_command(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORMATS[name]) + "\n\n")  # a blank last line is no row
    ((_, chat),) = open_source(path, Settings().project).rows()
    assert chat == Chat(messages=EXPECTED)
    assert [list(chat.messages) for _, chat in read_chats([str(path)])] == [EXPECTED]


def test_an_alpaca_input_and_history_belong_to_the_conversation() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}
    chat = conversation_of(row, Columns())
    assert isinstance(chat, Chat)
    assert [m["content"] for m in chat.messages] == ["Hi", "Hello", "Add.\n1, 2", "3"]


def test_a_prompt_beside_its_answer_is_rendered_unless_it_is_plain() -> None:
    row = {"prompt": "<u>Hello<a>", "answer": "Hi.", "system": "of a run's table"}
    assert conversation_of(row, Columns()) == Pair(prompt="<u>Hello<a>", answer="Hi.")
    plain = {"prompt": "Hello", "completion": "Hi.", "system": "Be brief."}
    assert conversation_of(plain, Columns(plain_prompts=True)) == Chat(messages=EXPECTED)


USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]}, "tool calling"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "'tool_calls'"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "has 'tools'"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}, "reasoning beside"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "can be 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "not the assistant's"),
        ({"messages": [ANSWER, USER]}, "begins with an answer"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, USER]}, "keep one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "surrogate pair"),
        ({"messages": "[]"}, "has text as its 'messages'"),
        ({"prompt": None, "answer": "x"}, "no text as its 'prompt'"),
        ({"prompt": "a", "completion": "b"}, "--answer-column completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--answer-column chosen"),
        ({"text": "a"}, "it holds 'text'"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_remedy(row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        conversation_of(row, Columns())


def test_a_weight_of_0_is_not_learnt_and_the_others_are() -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    chat = conversation_of(row, Columns())
    assert isinstance(chat, Chat)
    assert chat.without_loss == {1}
    tokenizer = tiny_tokenizer()
    learnt = tokenize_conversation(tokenizer, chat.messages, without_loss=chat.without_loss)
    both = tokenize_conversation(tokenizer, chat.messages)
    alone = tokenize_conversation(tokenizer, chat.messages[2:])
    assert both.loss_tokens == 2 * alone.loss_tokens
    assert learnt.loss_tokens == alone.loss_tokens
    assert learnt.labels[: len(learnt.labels) // 2] == (-100,) * (len(learnt.labels) // 2)
    every = tokenize_conversation(
        tokenizer, chat.messages, loss_on_all=True, without_loss=chat.without_loss
    )
    assert every.labels.count(-100) == alone.loss_tokens


def test_a_template_refuses_the_row_and_not_the_file() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if loop.index0 % 2 == 0 and m.role != 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}"
    )
    good = Chat(messages=[USER, ANSWER])
    bad = Chat(messages=[USER, ANSWER, ANSWER, USER, ANSWER])
    check = TemplateCheck(tokenizer)
    check(good)
    with pytest.raises(InputError, match=r"is refused: .*roles must alternate"):
        check(bad)
    made = SpanMaker(tokenizer=tokenizer, needed=("response",))([good, bad, good])
    assert [len(spans) for spans in made.rows] == [1, 0, 1]
    assert list(made.refused) == [1]


def test_thinking_is_counted_where_it_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    thought = len(tokenizer("<think>hm</think>", add_special_tokens=False)["input_ids"])
    pairs = [Pair(prompt="a", answer="<think>hm</think>Yes"), Pair(prompt="a", answer="Yes")]
    counts = SpanMaker(tokenizer=tokenizer, needed=("response",))(pairs).counts
    assert (counts.thinking, counts.think_tokens, counts.answers) == (1, thought, 2)
    counts = SpanMaker(tokenizer=tokenizer, needed=("response",), thinking=True)(pairs).counts
    assert counts.thinking == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "levels"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_a_row_that_would_break_a_reader_is_named(text: bytes, said: str) -> None:
    row = parse_row(text, number=0, line=1)
    assert isinstance(row, BadRow)
    assert said in row.reason


def test_a_row_at_the_limits_is_read() -> None:
    text = b'{"a": ' + b"[" * 90 + b"]" * 90 + b', "b": ' + b"9" * 4300 + b"}"
    row = parse_row(text, number=0, line=1)
    assert isinstance(row, Row)
    assert json.dumps(row.values).encode() == text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'prompt,answer\nx,"y\n', "a quoted cell that is never closed"),
        ("a.csv", "prompt,answer\nx,y\x00z\n", "NUL bytes"),
        ("a.json", '[{"prompt": "a", "answer": "b"},', "is not valid JSON"),
        ("a.json", '{"prompt": "a"}', "must hold a list of rows"),
    ],
)
def test_a_table_that_is_cut_off_or_no_text_is_named(
    name: str, content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        list(open_table(tmp_path / name).rows())


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InputError, match="a pipe or a device"):
        open_table(tmp_path / "a.csv")


@pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")
@pytest.mark.parametrize("name", ["sharegpt", "parts", "developer", "promptcompletion", "blankend"])
def test_public_rows_are_read_alike(name: str) -> None:
    assert DATA is not None
    path = Path(DATA) / "cases" / "21-public-row-formats" / f"{name}.jsonl"
    chats = [chat for _, chat in open_source(path, Settings().project).rows()]
    assert chats
    assert [list(chat.messages) for _, chat in read_chats([str(path)])] == [
        list(chat.messages) for chat in chats if isinstance(chat, Chat)
    ]
