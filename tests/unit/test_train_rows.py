"""Training rows: what is wrong with them is said at once, and every row is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.models import CHATML, tiny_tokenizer

from pvec.errors import InputError
from pvec.training.config import DataPart
from pvec.training.data import TrainingData, prepare_data, read_chats


def row(answer: str = "Hello.", question: str = "Hi") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def jsonl(path: Path, rows: list[Any]) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def prepare(path: str, **options: Any) -> TrainingData:
    return prepare_data(DataPart(train=(path,), **options), tiny_tokenizer(), seed=0)


def test_every_wrong_line_is_named_and_empty_lines_are_none(tmp_path: Path) -> None:
    user_only = {"messages": [{"role": "user", "content": "Hi"}]}
    odd_role = {"messages": [{"role": "bot", "content": "Hi"}]}
    path = jsonl(
        tmp_path / "rows.jsonl",
        [row(), "", "{broken", user_only, row(), {"text": "x"}, odd_role, row("  ")],
    )
    with pytest.raises(InputError) as caught:
        read_chats([path])
    message = str(caught.value)
    assert message.startswith("5 training rows are wrong")
    for number, fault in (
        (3, "is not valid JSON"),
        (4, "has no assistant turn"),
        (6, "has no list of messages"),
        (7, "has the role 'bot'"),
        (8, "has an empty assistant turn"),
    ):
        assert f"{path}:{number} {fault}" in message


def test_rows_that_cannot_be_used_are_left_out_and_counted_on_request(tmp_path: Path) -> None:
    """Unread ones, and one that only the chat template refuses."""
    twice = {"messages": [*row()["messages"], {"role": "assistant", "content": "Again"}]}
    tokenizer = tiny_tokenizer(
        "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    )
    path = jsonl(tmp_path / "rows.jsonl", [row(), "{broken", twice, row(), {"text": "x"}])
    data = prepare_data(DataPart(train=(path,), skip_bad=True), tokenizer, seed=0)
    assert len(data.train.rows) == 2
    assert f"3 rows cannot be used and are left out, the first: {path}:2" in data.notes[0]
    with pytest.raises(InputError, match=r"2 training rows are wrong: .*data\.skip_bad=true"):
        prepare_data(DataPart(train=(path,)), tokenizer, seed=0)


def test_faults_of_several_files_come_together(tmp_path: Path) -> None:
    one, two = (jsonl(tmp_path / name, ["{"]) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(InputError, match=r"a\.jsonl has no row.*b\.jsonl has no row"):
        read_chats([one, two])


def test_an_empty_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        read_chats([str(tmp_path / "empty.jsonl")])


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [row()])
    with pytest.raises(InputError, match=r"Did you mean 'rows\.jsonl'"):
        read_chats([str(tmp_path / "row.jsonl")])


def test_json_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [row(), row("Fine.")]
    lines = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    expected = [chat.messages for _, chat in read_chats([lines])]
    for name in ("a.json", "a.parquet"):
        assert [chat.messages for _, chat in read_chats([str(tmp_path / name)])] == expected


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(), row("bread " * 60)])
    data = prepare(path, max_tokens=32)
    assert max(data.train.lengths) == 32
    assert (data.train.truncated, data.train.dropped) == (1, 0)
    assert "1 training rows were longer than 32 tokens: their end is cut" in data.notes


def test_long_rows_are_left_out_when_asked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(), row("bread " * 60)])
    data = prepare(path, max_tokens=32, too_long="drop")
    assert (len(data.train.rows), data.train.dropped) == (1, 1)
    assert any("1 training rows were left out" in note for note in data.notes)


def test_long_rows_are_refused_when_asked_with_their_places(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(), row("bread " * 60)])
    with pytest.raises(InputError, match=r"1 rows are longer than 32 tokens .*rows\.jsonl:2"):
        prepare(path, max_tokens=32, too_long="refuse")


def test_a_row_whose_answer_lies_behind_the_limit_is_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(), row(question="bread " * 60)])
    data = prepare(path, max_tokens=32)
    assert (len(data.train.rows), data.train.truncated, data.train.dropped) == (1, 0, 1)


def test_nothing_left_to_learn_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(question="bread " * 60)])
    with pytest.raises(InputError, match="No training row has anything to learn"):
        prepare(path, max_tokens=32)


def test_a_share_is_held_out_at_random_and_the_same_each_time(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row(f"Answer number {n}.") for n in range(20)])
    data = prepare(path, eval_fraction=0.25)
    again = prepare(path, eval_fraction=0.25)
    assert (len(data.train.rows), len(data.held_out.rows)) == (15, 5)
    assert data.held_out == again.held_out
    assert not set(data.held_out.rows) & set(data.train.rows)


def test_a_held_out_file_is_checked_like_the_training_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row()])
    held = jsonl(tmp_path / "held.jsonl", [row("Fine."), "{"])
    with pytest.raises(InputError, match=r"held\.jsonl:2"):
        prepare(path, eval=(held,))
