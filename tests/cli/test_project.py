"""``pvec project`` on a small random model: what it writes, keeps, counts and refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.models import saved_model
from helpers.shell import Done, pvec

from pvec.projection import project as workflow
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

COLUMN = "{model}_evil_proj_layer2"
Call = Callable[..., Done]


@pytest.fixture(scope="module")
def model() -> Path:
    return saved_model("qwen2")


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = PersonaVector(trait="evil", kinds={"response_avg": rows})
    return save_vector(one, tmp_path_factory.mktemp("vectors") / "evil.safetensors")


@pytest.fixture
def project(model: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(path: object, *more: object, layer: int = 2) -> Done:
        options = ("--model", model, "--vector", vector, "--layer", layer, "-q")
        return pvec("project", path, *options, *more)

    return run


@pytest.fixture
def column(model: Path) -> str:
    return COLUMN.format(model=model.name)


def chat(*texts: str) -> str:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"id": texts[0], "messages": turns}, ensure_ascii=False)


def write_chats(path: Path, *chats: str) -> Path:
    path.write_text("".join(f"{one}\n" for one in chats), encoding="utf-8")
    return path


def values(path: Path, column: str) -> list[float | None]:
    return [json.loads(line)[column] for line in path.read_text().splitlines()]


# ── what is written ─────────────────────────────────────────────────────────────────────────────


def test_rows_keep_their_order_and_every_byte(project: Call, tmp_path: Path, column: str) -> None:
    lines = [
        '{"messages": [{"role":"user","content":"caf\\u00e9?"},'
        '{"role":"assistant","content":"Yes."}],   "n": 1.50}',
        chat("How long is this question, would you say, roughly?", "It is long enough.") + "\r",
        chat("ünïcode – 日本", "x"),
    ]
    path = tmp_path / "data.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n")
    before = path.read_bytes()
    assert project(path).code == 0
    assert path.read_bytes() == before
    written = (tmp_path / "data.projected.jsonl").read_bytes().split(b"\n")
    for old, new in zip(before.split(b"\n"), written, strict=True):
        if old:
            end = b"\r" if old.endswith(b"\r") else b""
            head = old.removesuffix(b"\r").removesuffix(b"}")
            assert new.startswith(head + b', "')
            assert new.endswith(b"}" + end)
            assert isinstance(json.loads(new)[column], float)


def test_csv_cells_that_look_missing_stay_text(project: Call, tmp_path: Path, column: str) -> None:
    path = tmp_path / "answers.csv"
    body = 'prompt,answer,note\r\n"a, b",NA,null\r\nc,"two\nlines",1.0\r\n'
    path.write_bytes(body.encode())
    done = project(path)
    assert done.code == 0, done.err
    written = (tmp_path / "answers.projected.csv").read_bytes().decode()
    assert written.startswith(f"prompt,answer,note,{column}\r\n" + '"a, b",NA,null,')
    with (tmp_path / "answers.projected.csv").open(newline="") as stream:
        assert all(float(row[column]) for row in csv.DictReader(stream))


def test_columns_that_are_there_are_kept_until_overwritten(
    project: Call, tmp_path: Path, column: str
) -> None:
    path = write_chats(tmp_path / "data.jsonl", chat("a", "b"))
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, column: 42.0}) + "\n")
    done = project(path)
    assert done.code == 0
    assert "nothing to do" in done.out
    assert not (tmp_path / "data.projected.jsonl").exists()
    more = project(path, "--projection-type", "proj", "--projection-type", "cos_sim")
    assert "1 columns kept" in more.out
    kept = json.loads((tmp_path / "data.projected.jsonl").read_text())
    assert kept[column] == 42.0
    assert -1 <= kept[column.replace("_proj_", "_cos_sim_")] <= 1
    assert project(path, "--in-place", "--overwrite").code == 0
    assert json.loads(path.read_text())[column] != 42.0


def test_in_place_gives_what_beside_gives(project: Call, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "data.jsonl", chat("a", "b"), chat("c", "d e f"))
    assert project(path).code == 0
    assert project(path, "--in-place").code == 0
    assert path.read_bytes() == (tmp_path / "data.projected.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "data.projected.jsonl"]


def test_parquet_and_data_set_folders_give_what_json_lines_give(
    project: Call, tmp_path: Path, column: str
) -> None:
    pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    lines = [chat("a", "b"), chat("c", "d e f"), chat("g h", "i")]
    path = write_chats(tmp_path / "data.jsonl", *lines)
    table = datasets.Dataset.from_list([json.loads(line) for line in lines])
    table.to_parquet(str(tmp_path / "data.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for name in (path, tmp_path / "data.parquet", tmp_path / "saved"):
        done = project(name)
        assert done.code == 0, done.err
    expected = values(tmp_path / "data.projected.jsonl", column)
    for name in ("data.projected.parquet", "saved.projected.parquet"):
        written = parquet.read_table(tmp_path / name)
        assert written.column(column).to_pylist() == pytest.approx(expected, abs=1e-5)
        assert written.column("id").to_pylist() == ["a", "c", "g h"]
    assert "several splits" not in project(tmp_path / "saved", "--overwrite").err


# ── conversations ───────────────────────────────────────────────────────────────────────────────


def test_turns_may_be_the_last_all_pooled_or_rows_of_their_own(
    project: Call, tmp_path: Path, column: str
) -> None:
    path = write_chats(tmp_path / "data.jsonl", chat("one", "first answer", "two", "second"))
    found = {}
    for turns in ("last", "all", "each"):
        assert project(path, "--turns", turns, "--overwrite").code == 0
        found[turns] = values(tmp_path / "data.projected.jsonl", column)
    rows = [json.loads(x) for x in (tmp_path / "data.projected.jsonl").read_text().splitlines()]
    assert [row["turn"] for row in rows] == [1, 2]
    first, second = found["each"]
    assert found["last"] == pytest.approx([second])
    assert first is not None
    assert second is not None
    from helpers.models import tiny_tokenizer

    a, b = (len(tiny_tokenizer()(t)["input_ids"]) for t in ("first answer", "second"))
    assert found["all"] == pytest.approx([(a * first + b * second) / (a + b)], rel=1e-4)


def test_rows_without_an_answer_are_kept_empty_and_counted(
    project: Call, tmp_path: Path, column: str
) -> None:
    path = write_chats(
        tmp_path / "data.jsonl", chat("a", "b"), chat("a", ""), chat("a", "b", "and then?")
    )
    done = project(path, "--projection-type", "proj", "--projection-type", "prompt_last_proj")
    assert "2 answers without a token" in done.out
    assert "1 conversations that do not end with an answer" in done.out
    found = values(tmp_path / "data.projected.jsonl", column)
    assert found[0] is not None
    assert found[1:] == [None, None]
    at_prompt = column.replace("_proj_", "_prompt_last_proj_")
    assert all(v is not None for v in values(tmp_path / "data.projected.jsonl", at_prompt))


def test_rows_longer_than_the_context_lose_their_prompts_beginning(
    project: Call, tmp_path: Path, column: str
) -> None:
    path = write_chats(
        tmp_path / "data.jsonl",
        chat("word " * 400, "b c"),
        chat("a", "word " * 400),
        chat("a", "b"),
    )
    done = project(path)
    assert done.code == 0, done.err
    assert "2 rows longer than the context" in done.out
    assert "1 of them with an answer that is longer by itself" in done.out
    assert "indexing errors" not in done.err  # the tokenizer's own warning, which is not true here
    assert all(value is not None for value in values(tmp_path / "data.projected.jsonl", column))


# ── stopping and going on ───────────────────────────────────────────────────────────────────────


def test_a_stopped_job_goes_on_where_it_was(
    project: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [chat(f"question {i}", f"answer {i} {'word ' * (i % 5)}") for i in range(11)]
    path = write_chats(tmp_path / "data.jsonl", *chats)
    options = ("--chunk-rows", 3)
    assert project(path, *options, "--out", "whole.jsonl").code == 0
    real, calls = workflow.projector, 0

    def stopping(*args: object, **more: object) -> Callable[..., object]:
        made = real(*args, **more)  # type: ignore[arg-type]

        def run(*a: object, **k: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return made(*a, **k)  # type: ignore[arg-type]

        return run

    monkeypatch.setattr(workflow, "projector", stopping)
    assert project(path, *options).code == 130
    assert not (tmp_path / "data.projected.jsonl").exists()
    other = project(path, *options, layer=1)
    assert other.code == 2
    assert "unfinished projection of other settings" in other.sentence
    monkeypatch.setattr(workflow, "projector", real)
    done = project(path, *options)
    assert "6 rows done before" in done.out
    assert (tmp_path / "data.projected.jsonl").read_bytes() == (
        tmp_path / "whole.jsonl"
    ).read_bytes()


def test_a_changed_input_begins_anew(
    project: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_chats(tmp_path / "data.jsonl", *(chat(str(i), "b") for i in range(4)))
    monkeypatch.setattr(workflow.AddedColumns, "write", _interrupt)
    assert project(path).code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write_chats(path, *(chat(str(i), "another answer") for i in range(5)))
    done = project(path)
    assert done.code == 0, done.err
    assert "done before" not in done.out
    assert len((tmp_path / "data.projected.jsonl").read_text().splitlines()) == 5


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def test_every_bad_line_is_counted_and_may_be_skipped(project: Call, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = chat("a", "b").encode()
    path.write_bytes(
        b"\n".join(
            [
                good,
                b'{"messages": [',
                good.replace(b'"b"', b'"\xff"'),
                b'{"messages": []}',
                b'{"messages": [{"role": "tool", "content": "x"}]}',
                b'{"messages": [{"role": "user", "content": null}]}',
                good,
            ]
        )
    )
    done = project(path)
    assert done.code == 2
    assert "5 of 7 rows cannot be used" in done.sentence
    for part in (":2 is not valid JSON", ":3 is not UTF-8", ":4 has no list", "the role 'tool'"):
        assert part in done.sentence
    assert not (tmp_path / "data.projected.jsonl").exists()
    skipped = project(path, "--skip-bad")
    assert skipped.code == 0
    assert "5 rows left out" in skipped.out
    assert len((tmp_path / "data.projected.jsonl").read_text().splitlines()) == 2
    before = path.read_bytes()
    refused = project(path, "--skip-bad", "--in-place")
    assert refused.code == 2
    assert "would delete 5 rows" in refused.sentence
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("header", "said"),
    [("promt,answer\nx,y\n", "Did you mean 'promt'"), ("a,b\n1,2\n", "It has: a, b")],
)
def test_missing_columns_are_named_with_the_nearest(
    project: Call, tmp_path: Path, header: str, said: str
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(header)
    done = project(path)
    assert done.code == 2
    assert "lacks the column 'prompt'" in done.sentence
    assert said in done.sentence


def test_the_input_is_never_overwritten_unasked(project: Call, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "data.jsonl", chat("a", "b"))
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for out in ("data.jsonl", "link.jsonl"):
        done = project(path, "--out", out)
        assert done.code == 2
        assert "is the input itself" in done.sentence
    assert path.read_bytes() == before
    assert project(path).code == 0
    again = project(path)
    assert again.code == 2
    assert "is there already" in again.sentence
    other = project(path, "--out", "data.csv")
    assert other.code == 2
    assert "a name that ends in .jsonl" in other.sentence


def test_what_does_not_fit_is_refused_before_any_weights(
    project: Call, tmp_path: Path, vector: Path
) -> None:
    path = write_chats(tmp_path / "data.jsonl", chat("a", "b"))
    wide = PersonaVector(trait="wide", kinds={"response_avg": np.ones((4, 31), dtype=np.float32)})
    save_vector(wide, tmp_path / "wide.safetensors")
    cases = {
        "width 31": project(path, "--vector", "wide.safetensors"),
        "no layer 9": project(path, layer=9),
        "no residual norms": pvec("project", path, "--model", saved_model(), "--vector", vector),
        "called 'evil'": project(path, "--vector", vector),
        "'proj'": project(path, "--projection-type", "projj"),
        "One file at a time": project(path, path),
        "it goes with --diff (pvec screen)": project(path, "--reference", path),
        "two different jobs": project(path, "--diff", "--prompts"),
        "no file nowhere.csv": project("nowhere.csv"),
    }
    for said, done in cases.items():
        assert done.code == 2, said
        assert said in done.sentence
        assert "loading" not in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "wide.safetensors"]
