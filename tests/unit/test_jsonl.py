"""The append-only log: nothing finished is lost, nothing torn is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvec.errors import StoreError
from pvec.runs.jsonl import JsonlLog, encode_line, read_jsonl

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
json_objects = st.dictionaries(st.text(), json_values, max_size=4)


def records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


@given(st.lists(json_objects, max_size=4))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_appended_is_read_back(tmp_path: Path, objects: list[dict[str, Any]]) -> None:
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    with JsonlLog(path) as log:
        for item in objects:
            log.append(item)
    assert records(path) == objects


@given(st.lists(json_objects, min_size=1, max_size=3), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path: Path, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    lines = [encode_line(item) for item in objects]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    # a line is whole once its closing brace is there; only the newline may be missing
    whole = max(n for n, end in enumerate(ends) if n == 0 or end - 1 <= cut)
    path = tmp_path / "log.jsonl"
    path.write_bytes(content[:cut])
    assert records(path) == objects[:whole]
    with JsonlLog(path) as log:
        assert bool(log.note) == (cut > ends[whole])
        log.append({"after": 1})
    assert records(path) == [*objects[:whole], {"after": 1}]


def test_a_torn_last_line_is_cut_and_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "unfini')
    with JsonlLog(path) as log:
        assert log.note.startswith("log.jsonl ended in the middle of a line (13 bytes")
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_torn_line_longer_than_a_block_is_cut_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 300_000)
    with JsonlLog(path):
        pass
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_whole_last_line_without_its_newline_stays(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}')
    with JsonlLog(path) as log:
        assert log.note == ""
        log.append({"b": 2})
    assert records(path) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("line", [b"garbage", b"[1, 2]", b'{"a": "\xff"}', b'{"a": 1}{"b": 2}'])
def test_a_malformed_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(StoreError, match=r"log\.jsonl:3 is not a JSON object"):
        records(path)


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\ngarbage\n')
    assert next(read_jsonl(path)) == (1, {"a": 1})


def test_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    assert records(tmp_path / "absent.jsonl") == []


def test_every_line_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path)
    for number in range(5):
        log.append({"n": number})
        assert records(path)[-1] == {"n": number}
    log.close()
    log.close()


def test_the_disk_is_asked_to_keep_lines_at_least_every_n(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    with JsonlLog(tmp_path / "log.jsonl", sync_every=4, sync_seconds=1e9) as log:
        for number in range(10):
            log.append({"n": number})
        assert len(synced) == 2
    assert len(synced) == 3


def test_text_is_readable_and_half_surrogates_survive(tmp_path: Path) -> None:
    assert "für Zoë" in encode_line({"a": "für Zoë"}).decode()
    assert json.loads(encode_line({"a": "\ud800"})) == {"a": "\ud800"}


def test_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_line({"a": float("nan")})
