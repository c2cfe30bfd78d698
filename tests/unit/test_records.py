"""Users' tables: cells stay what they were, and what is wrong is named by file and line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvec.data.table import Row, check_rows
from pvec.data.tables import open_table
from pvec.errors import InputError
from pvec.runs.files import atomic_write

pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
pq = pytest.importorskip("pyarrow.parquet")

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
one_file = [HealthCheck.function_scoped_fixture]


def values(path: Path) -> list[dict[str, Any]]:
    return [dict(row.values) for row in open_table(path).rows()]


def copy_with(path: Path, columns: dict[str, Any]) -> bytes:
    """Write the table with the same ``columns`` for every row, and return the file's bytes."""
    table = open_table(path)
    stream = io.BytesIO()
    with table.writer(stream, columns=list(columns)) as writer:
        for row in table.rows():
            writer.write(row, columns)
    return stream.getvalue()


def test_cells_that_look_missing_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer\nNA,null\nnan,\n None,1.50\n")
    assert values(path) == [
        {"prompt": "NA", "answer": "null"},
        {"prompt": "nan", "answer": ""},
        {"prompt": " None", "answer": "1.50"},
    ]


@given(st.lists(st.tuples(cells, cells), max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=one_file)
def test_any_cell_is_read_as_the_csv_module_wrote_it(
    tmp_path: Path, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "answer"), *rows])
    assert [tuple(row.values()) for row in values(path)] == rows


@given(st.lists(st.tuples(cells, cells), max_size=5), st.text("ab1", min_size=1))
@settings(max_examples=60, deadline=None, suppress_health_check=one_file)
def test_added_columns_leave_every_other_byte_alone(
    tmp_path: Path, rows: list[tuple[str, str]], added: str
) -> None:
    def written(row: tuple[str, str], end: bytes) -> bytes:
        stream = io.StringIO(newline="")
        csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="").writerow(row)
        return stream.getvalue().encode() + end

    path = tmp_path / "a.csv"
    header = ("prompt", "answer")
    path.write_bytes(b"".join(written(row, b"\r\n") for row in (header, *rows)))
    assert copy_with(path, {"new": added}) == written(header, b",new\r\n") + b"".join(
        written(row, b",%s\r\n" % added.encode()) for row in rows
    )


@given(cells)
@settings(max_examples=60, deadline=None, suppress_health_check=one_file)
def test_any_text_can_be_added(tmp_path: Path, added: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\nWhy?\n")
    path.write_bytes(copy_with(path, {"new": added}))
    assert values(path) == [{"prompt": "Why?", "new": added}]


def test_the_rows_own_quoting_and_line_ends_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"1",  x \r\n2,"y\ny"')
    assert copy_with(path, {"c": 0.5}) == (b'\xef\xbb\xbfa,b,c\r\n"1",  x ,0.5\r\n2,"y\ny",0.5\n')


def test_a_replaced_column_stays_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b,c\n1,"two, three",4\n')
    assert copy_with(path, {"b": None, "d": 5.25}) == b"a,b,c,d\n1,,4,5.25\n"


def test_tabs_separate_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n1,5\t2\n")
    assert values(path) == [{"a": "1,5", "b": "2"}]
    assert copy_with(path, {"c": "x"}) == b"a\tb\tc\n1,5\t2\tx\n"


def test_an_answer_of_any_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'a,b\n"{"x" * 500_000}",1\n')
    assert len(values(path)[0]["a"]) == 500_000


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_missing_columns_are_named_with_what_is_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("promt,answer\n1,2\n")
    elif name == "a.jsonl":
        path.write_text('{"promt": 1, "answer": 2}\n')
    else:
        pq.write_table(pa.table({"promt": ["1"], "answer": ["2"]}), path)
    message = r"lacks the column 'prompt'\. Did you mean 'promt'\? It has: promt, answer"
    with pytest.raises(InputError, match=message):
        open_table(path, need=["prompt", "answer"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", b"nonsense\n", r"no row that can be read \(line 1 is not valid JSON"),
        ("a.csv", b"a,b,a\n1,2,3\n", "two columns called 'a'"),
        ("a.csv", b"a,\xff\n", r"a\.csv:1 is not UTF-8"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.xlsx", b"", "should end in"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_table(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        open_table(tmp_path / "absent.csv")


BAD_CSV = b'a,b\n1,2\n3\n"x\ny",4\n5,\xff\n6,7,8\n9,10\n'
BAD_JSONL = b'{"a": 1, "b": 2}\n{"a": \n[3]\n{"b": 4}\n{"a": "\xff"}\n\n{"a": 5}\n'


@pytest.mark.parametrize(
    ("name", "content", "lines", "good"),
    [("a.csv", BAD_CSV, [3, 6, 7], 3), ("a.jsonl", BAD_JSONL, [2, 3, 4, 5], 2)],
)
def test_bad_rows_are_all_counted_by_line(
    tmp_path: Path, name: str, content: bytes, lines: list[int], good: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    table = open_table(path, need=["a"])
    kept: list[Row] = []
    rows, bad = check_rows(path, table.read(), skip_bad=True, on_row=kept.append)
    assert [row.line for row in bad] == lines
    assert rows == good
    with pytest.raises(InputError, match=f"{len(lines)} of {good + len(lines)} rows cannot"):
        check_rows(path, table.read())
    with pytest.raises(InputError, match=rf"{name}:{lines[0]} "):
        list(table.rows())
    assert [row.number for row in kept] == list(range(good))


def test_a_sound_table_tells_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n2\n")
    assert check_rows(path, open_table(path).read()) == (2, [])


json_objects = st.dictionaries(
    st.sampled_from("abc"), st.none() | st.integers() | cells | st.lists(cells, max_size=2)
)


@given(
    st.lists(json_objects, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from("cde"), st.none() | st.floats(0, 1) | cells, max_size=2),
)
@settings(max_examples=60, deadline=None, suppress_health_check=one_file)
def test_json_lines_take_added_and_replaced_keys(
    tmp_path: Path, objects: list[dict[str, Any]], added: dict[str, Any]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    written = copy_with(path, added).splitlines()
    assert [json.loads(line) for line in written] == [item | added for item in objects]


def test_json_lines_keep_their_bytes_when_keys_are_added(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{ "a":1,  "b": "\\u00e9" }  \r\n{}')
    assert copy_with(path, {"p": 0.5}) == b'{ "a":1,  "b": "\\u00e9", "p": 0.5}  \r\n{"p": 0.5}\n'


def test_parquet_columns_keep_type_and_value(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "when": pa.array([2**62 + n for n in range(3000)], pa.timestamp("ns")),
            "small": pa.array(range(3000), pa.int16()),
            "messages": pa.array([[{"role": "user", "content": str(n)}] for n in range(3000)]),
        }
    )
    pq.write_table(table, path)
    written = pq.read_table(io.BytesIO(copy_with(path, {"proj": 0.25, "small": None})))
    assert written.column_names == ["when", "small", "messages", "proj"]
    assert written["when"].equals(table["when"])
    assert written["messages"].equals(table["messages"])
    assert written["small"].null_count == 3000
    assert written["proj"].to_pylist() == [0.25] * 3000


def test_parquet_rows_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(10))}), path)
    table = open_table(path)
    stream = io.BytesIO()
    with table.writer(stream, columns=["even"]) as writer:
        for row in table.rows():
            if row.values["a"] % 2 == 0:
                writer.write(row, {"even": 1.0})
    assert pq.read_table(io.BytesIO(stream.getvalue()))["a"].to_pylist() == [0, 2, 4, 6, 8]


def test_an_empty_parquet_table_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.int8())}), path)
    assert pq.read_table(io.BytesIO(copy_with(path, {"b": 1.0}))).num_rows == 0


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / name
        line = '"x","y"\n' if name == "a.csv" else '{"a": "x", "b": "y"}\n'
        path.write_text(("a,b\n" if name == "a.csv" else "") + line * rows)
        tracemalloc.start()
        for _ in open_table(path).rows():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports and caches
    assert peak(20_000) < peak(200) + 200_000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with contextlib.suppress(RuntimeError), atomic_write(path, mode="w") as stream:
        stream.write("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path, mode="w") as stream:
        stream.write("new\r\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\r\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_new_file_gets_ordinary_permissions(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "a") as stream:
        stream.write(b"new")
    (tmp_path / "plain").touch()
    plain = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "deep" / "a").stat().st_mode == plain


def test_rows_know_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a\n"1\n1"\n\n2\n')
    rows = [row for row in open_table(path).read() if isinstance(row, Row)]
    assert [(row.number, row.line) for row in rows] == [(0, 2), (1, 5)]


def test_rows_with_null_fields_of_a_struct_are_written(tmp_path: Path) -> None:
    """As hub data sets hold them: taking or casting such rows is an ArrowInvalid."""
    message = {"role": "user", "content": "a", "tool_calls": None}
    rows: list[dict[str, Any]] = [{"messages": [message, message], "n": n} for n in range(6)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    table = open_table(path)
    stream = io.BytesIO()
    with table.writer(stream, columns=["p"]) as writer:
        for row in table.rows():
            if row.values["n"] != 2:
                writer.write(row, {"p": float(row.number)})
    written = pq.read_table(io.BytesIO(stream.getvalue())).to_pylist()
    assert written == [{**row, "p": float(row["n"])} for row in rows if row["n"] != 2]
