"""A file that cannot be read is one sentence, whatever is wrong with it; nothing hangs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pvec.documents import (
    DocumentError,
    misfit,
    parse_json,
    parse_record,
    parse_yaml,
    read_json,
    read_record,
    read_text,
)
from pvec.types import Sampling, Score

DEEP = "[" * 200 + "]" * 200
VERY_DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("deep", [DEEP, VERY_DEEP])
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_too_many_levels_are_refused(parse: object, deep: str) -> None:
    with pytest.raises(DocumentError, match=r"f has more than 100 levels .*; correct it\.$"):
        parse(deep, where="f")  # type: ignore[operator]


def test_a_hundred_levels_are_read() -> None:
    value = parse_json("[" * 100 + "]" * 100, where="f")
    for _ in range(99):
        (value,) = value
    assert value == []


def test_a_key_that_appears_twice_is_named() -> None:
    with pytest.raises(DocumentError, match="f has the key 'b' twice"):
        parse_json('{"a": 1, "c": {"b": 1, "b": 2}}', where="f")
    with pytest.raises(DocumentError, match="f:2 is not valid YAML: the key 'a' appears twice"):
        parse_yaml("a: 1\na: 2", where="f")


@pytest.mark.parametrize("digits", [4300, 4301, 6000])
def test_numbers_have_up_to_4300_digits(digits: int) -> None:
    number = "9" * digits
    if digits <= 4300:
        assert parse_json(number, where="f") == 10**digits - 1
        return
    with pytest.raises(DocumentError, match="number"):
        parse_json(f"[{number}]", where="f")
    with pytest.raises(DocumentError, match="number"):
        parse_yaml(f"a: {number}", where="f")


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"\udfff": 1}', r'{"a": [{"b": "x\ud83dy"}]}'])
def test_half_of_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(DocumentError, match="surrogate"):
        parse_json(text, where="f")
    with pytest.raises(DocumentError):
        parse_yaml(text, where="f")


def test_a_whole_pair_is_a_character() -> None:
    assert parse_json(r'"\ud83d\ude00"', where="f") == "\N{GRINNING FACE}"


def test_aliases_that_would_grow_without_bound_are_refused() -> None:
    text = "a0: &a0 [x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(DocumentError, match="more than 1,000,000 values"):
        parse_yaml(text, where="f")
    assert parse_yaml("a: &a [1]\nb: *a", where="f") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    "text",
    ["a: &a {b: *a}", "a: !!int x", "a: !!timestamp 2026-99-99", "a: !!binary 'x'", "? [1]\n: 2",
     "<<: 3",
     "!!python/object/apply:os.system [echo]", "\x00", "*a", "\t- x", "a: b: c", "a: !!float z"],
)  # fmt: skip
def test_yaml_that_cannot_be_read_is_one_sentence(text: str) -> None:
    with pytest.raises(DocumentError, match=r"^f.*; correct it\.$"):
        parse_yaml(text, where="f")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DocumentError, match=r"is not UTF-8 text \(byte 7\); save it as UTF-8"):
        read_json(path)


@pytest.mark.timeout(5)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DocumentError, match="it is a pipe or a device"):
        read_text(tmp_path / "pipe")
    with pytest.raises(DocumentError, match="it is a folder"):
        read_text(tmp_path)
    with pytest.raises(DocumentError, match="symbolic links"):
        read_text(tmp_path / "loop")
    with pytest.raises(DocumentError, match="cannot be a file's"):
        read_text(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")


@pytest.mark.parametrize(
    "line", ["", "[1]", "3", "{", VERY_DEEP, f'{{"a": {DEEP}}}', f'{{"a": {"9" * 6000}}}', b"\xff"]
)
def test_a_line_that_is_no_record_is_none(line: str | bytes) -> None:
    assert parse_record(line) is None


def test_a_record_is_built_from_values_of_the_right_type_alone() -> None:
    score = {"id": "a", "response_id": "r", "metric": "evil", "judge": "j", "score": 3}
    assert read_record(Score, {**score, "later": 1}) == Score(**score)
    for name, wrong in (
        ("id", 3),
        ("score", "3"),
        ("score", True),
        ("status", "fine"),
        ("id", None),
    ):
        with pytest.raises(ValueError, match=f"'{name}' has another kind of value"):
            read_record(Score, {**score, name: wrong})
    with pytest.raises(ValueError, match="it has no 'metric'"):
        read_record(Score, {k: v for k, v in score.items() if k != "metric"})
    with pytest.raises(ValueError, match="'seed'"):
        read_record(Sampling, {"seed": [1]})


def test_json_and_yaml_read_the_same_document() -> None:
    document = {"a": [1, 2.5, None, True, "x"], "b": {"c": ""}}
    assert parse_json(json.dumps(document), where="f") == document
    assert parse_yaml(json.dumps(document), where="f") == document


def test_a_key_that_is_missing_is_named_even_where_null_would_do() -> None:
    shape = {"a": (int, type(None)), "b": [{"c": str}], "d": {...: float}}
    good = {"a": None, "b": [{"c": "x"}], "d": {"x": 1}, "more": 1}
    assert misfit(good, shape) is None
    assert misfit({k: v for k, v in good.items() if k != "a"}, shape) == "a"
    assert misfit({**good, "b": [{"c": "x"}, {}]}, shape) == "b.1.c"
    assert misfit({**good, "d": {"x": "1"}}, shape) == "d.x"
    assert misfit({**good, "a": True}, shape) == "a"
    assert misfit([], shape) == "the whole"
