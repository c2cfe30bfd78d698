"""Files in blocks: every row in one block, in order, whatever the size of the blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.block_data import (
    COLUMN,
    assert_same_lines,
    block_settings,
    in_process,
    lines_of,
    local_lines,
    samples,
    save_random_vector,
    write_folder,
    write_lines,
)
from pyarrow import parquet

from pvec.data.blocks import list_blocks
from pvec.data.storage import url_of
from pvec.data.table import Row
from pvec.errors import InputError, StoreError
from pvec.projection import project, project_blocks, screen, screen_blocks
from pvec.types import OutputOptions


def numbers(path: Path, size: int) -> list[int]:
    rows = [row for block in list_blocks(path, size=size).blocks for row in block.open().read()]
    return [row.values["n"] for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("size", [1, 7, 30, 31, 1000, 10**6])
def test_every_line_is_in_one_block(tmp_path: Path, size: int) -> None:
    texts = [f'{{"n": {n}, "é": "{"x" * (n * 13 % 40)}"}}' for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(texts[:20]) + "\n\n" + "\r\n".join(texts[20:]))  # no end of line
    assert numbers(path, size) == list(range(40))


@pytest.mark.parametrize("size", [1, 100, 500, 10**6])
def test_every_parquet_row_is_in_one_block(tmp_path: Path, size: int) -> None:
    table = pa.table({"n": list(range(50)), "text": ["word " * (n % 9) for n in range(50)]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=20)
    assert numbers(tmp_path / "rows.parquet", size) == list(range(50))


def test_a_bad_line_is_counted_from_the_beginning_of_its_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "rows.jsonl", [*samples(30), [1], *samples(5)])
    vector = save_random_vector(tmp_path)
    with pytest.raises(InputError, match=r"rows\.jsonl:31 is not a JSON object"):
        project_blocks.run(block_settings(), path, [vector], execute=in_process)
    result = project_blocks.run(
        block_settings(), path, [vector], execute=in_process,
        output=OutputOptions(skip_bad=True, out=tmp_path / "skipped"),
    )  # fmt: skip
    assert (result.rows, result.left_out) == (35, 1)


def test_json_lines_come_out_as_locally_and_once(tmp_path: Path) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    result = project_blocks.run(block_settings(), folder, [vector], execute=in_process)
    assert result.blocks > 4
    assert_same_lines(lines_of(Path(result.output)), local_lines(block_settings(), folder, vector))
    whole = project.run(
        block_settings(), tmp_path / "whole.jsonl", [vector],
        output=OutputOptions(out=tmp_path / "again.jsonl"),
    )  # fmt: skip
    assert result.rows == whole.rows == 48
    assert result.columns[0].mean == pytest.approx(whole.columns[0].mean)
    assert result.columns[0].deviation == pytest.approx(whole.columns[0].deviation)


def test_parquet_keeps_its_schema_and_gets_a_column(tmp_path: Path) -> None:
    rows = [{**row, "messages": row["messages"]} for row in samples(40)]
    path, vector = tmp_path / "data.parquet", save_random_vector(tmp_path)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    result = project_blocks.run(block_settings(), path, [vector], execute=in_process)
    found = parquet.read_table(result.output)
    local = project.run(
        block_settings(), path, [vector], output=OutputOptions(out=tmp_path / "l.parquet")
    )
    expected = parquet.read_table(local.output)
    assert result.blocks > 2
    assert found.schema == expected.schema
    assert found.drop([COLUMN]).equals(expected.drop([COLUMN]))
    assert found[COLUMN].to_pylist() == pytest.approx(expected[COLUMN].to_pylist(), rel=1e-5)


def test_a_second_call_does_only_what_is_missing(tmp_path: Path) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    first = project_blocks.run(block_settings(), folder, [vector], execute=in_process)
    parts = sorted(Path(first.output).glob("part-*"))
    before = [part.read_bytes() for part in parts]
    parts[2].unlink()
    (parts[0].parent / "_pvec" / f"{parts[1].stem}.json").unlink()  # killed between the two
    again = project_blocks.run(block_settings(), folder, [vector], execute=in_process)
    assert again.resumed == first.blocks - 2
    assert (again.rows, again.columns) == (first.rows, first.columns)
    assert [part.read_bytes() for part in parts] == before


@pytest.mark.parametrize("name", ["plan.json", "part-000001.json"])
def test_what_is_damaged_in_the_folder_is_named(tmp_path: Path, name: str) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    first = project_blocks.run(block_settings(), folder, [vector], execute=in_process)
    (Path(first.output) / "_pvec" / name).write_bytes(b'{"rows": 1\xff')
    with pytest.raises(StoreError, match=rf"{name} is damaged: "):
        project_blocks.run(block_settings(), folder, [vector], execute=in_process)


def test_another_job_s_folder_is_refused(tmp_path: Path) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    project_blocks.run(block_settings(), folder, [vector], execute=in_process)
    other = save_random_vector(tmp_path / "in2", seed=4)
    with pytest.raises(StoreError, match=r"another job \(different: vectors\)"):
        project_blocks.run(block_settings(), folder, [other], execute=in_process)
    with (folder / "data1.jsonl").open("a") as stream:
        stream.write(json.dumps(samples(1)[0]) + "\n")
    with pytest.raises(StoreError, match=r"\(different: input\)"):
        project_blocks.run(block_settings(), folder, [vector], execute=in_process)


def test_inputs_that_cannot_go_by_block_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="is an empty folder"):
        list_blocks(empty, size=100)
    (tmp_path / "table.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(InputError, match=r"reads \.parquet and \.jsonl"):
        list_blocks(tmp_path / "table.csv", size=100)
    with pytest.raises(InputError, match=r"Did you mean 'table\.csv'"):
        list_blocks(tmp_path / "table.cs", size=100)
    for name, values in (("a", [1]), ("b", ["x"])):
        parquet.write_table(pa.table({"n": values}), empty / f"{name}.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has other columns.* than .*a\.parquet"):
        list_blocks(empty, size=100)
    write_lines(empty / "c.jsonl", samples(1))
    with pytest.raises(InputError, match="has files of both kinds"):
        list_blocks(empty, size=100)


def test_a_url_is_known_by_its_scheme() -> None:
    assert url_of(Path("s3://bucket/a b.jsonl")) == "s3://bucket/a b.jsonl"
    assert url_of("hf://datasets/me/x") == "hf://datasets/me/x"
    assert url_of("hf:me/x") is None
    assert url_of(Path("C:/data.csv")) is None


def test_an_unknown_store_and_a_missing_package_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no package of fsspec opens such URLs"):
        list_blocks("nowhere://bucket/data.jsonl", size=100)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs:// needs another package: pip install '\.\[gs\]'"):
        list_blocks("gs://bucket/data.jsonl", size=100)


def test_one_machine_reads_a_table_from_a_store(tmp_path: Path) -> None:
    import fsspec

    vector = save_random_vector(tmp_path)
    whole = write_lines(tmp_path / "whole.jsonl", samples(6))
    fsspec.filesystem("memory").pipe_file("/store/rows.jsonl", whole.read_bytes())
    url = Path("memory://store/rows.jsonl")
    with pytest.raises(InputError, match="needs --engine ray"):
        project.run(block_settings(), url, [vector], output=OutputOptions(out=Path("memory://x")))
    output = OutputOptions(out=tmp_path / "out.jsonl")
    remote = project.run(block_settings(), url, [vector], output=output)
    here = project.run(block_settings(), whole, [vector])
    assert remote.output is not None
    assert here.output is not None
    assert remote.output.read_bytes() == here.output.read_bytes()


@pytest.mark.parametrize("natural", ["generate", "prompt"])
def test_screening_by_block_gives_the_numbers_of_one_machine(tmp_path: Path, natural: str) -> None:
    folder, vector = write_folder(tmp_path / "in", rows=24), save_random_vector(tmp_path)
    whole, clean = tmp_path / "whole.jsonl", write_lines(tmp_path / "clean.jsonl", samples(9))
    whole.write_bytes(b"".join(p.read_bytes() for p in sorted(folder.iterdir())))
    settings = block_settings(natural=natural, percentile=60.0)
    settings = settings.model_copy(
        update={"generation": settings.generation.model_copy(update={"max_tokens": 4})}
    )
    here = screen.run(
        settings, whole, [vector], reference=clean, output=OutputOptions(out=tmp_path / "run")
    )
    result = screen_blocks.run(settings, folder, [vector], reference=clean, execute=in_process)
    assert result.blocks > 2
    assert result.removed_rows == here.removed_rows
    mine, theirs = result.columns[0].score, here.columns[0].score
    for name in ("threshold", "auc", "above"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-5)
    assert vars(mine.mean) == pytest.approx(vars(theirs.mean), rel=1e-4)
    rows = [json.loads(line) for line in lines_of(Path(result.output))]
    table = pd.read_csv(here.run / "samples.csv").query("set == 'data'")
    for part in ("response", "natural", "difference"):
        name = f"evil_layer2_{part}"
        np.testing.assert_allclose([row[name] for row in rows], table[name], rtol=1e-4, atol=1e-6)
    assert [row["removed"] for row in rows] == (table["removed"].astype(str) == "True").tolist()
    assert [s.natural for s in result.suspicious] == [
        s.natural if natural == "generate" else "" for s in here.suspicious
    ]
    assert [s.response for s in result.suspicious] == [s.response for s in here.suspicious]


def test_screening_by_block_refuses_what_needs_all_rows(tmp_path: Path) -> None:
    folder, vector = write_folder(tmp_path / "in", rows=4), save_random_vector(tmp_path)
    with pytest.raises(InputError, match="use --natural generate or prompt"):
        screen_blocks.run(block_settings(natural="subset"), folder, [vector], execute=in_process)
