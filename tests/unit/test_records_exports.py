"""Judged answers in the reference's columns."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvec.data.csv_table import defused, restored
from pvec.data.judged_csv import JudgedAnswer, read_judged_csv, write_judged_csv
from pvec.errors import InputError
from pvec.runs.manifest import new_manifest

DATA = os.environ.get("PVEC_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=10)
texts |= st.sampled_from(["NA", "null", "", "nan", "a\rb", 'say "x", y'])
scores = st.none() | st.floats(0, 100)
answers = st.builds(
    JudgedAnswer,
    question=texts,
    prompt=texts,
    answer=texts,
    question_id=texts,
    trait_score=scores,
    coherence=scores,
)


@given(st.lists(answers, max_size=4))
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_judged_answers_are_read_back_as_written(
    tmp_path: Path, written: list[JudgedAnswer]
) -> None:
    path = tmp_path / "evil_pos.csv"
    assert write_judged_csv(path, written, trait="evil") == len(written)
    assert list(read_judged_csv(path, trait="evil")) == written


def test_pandas_reads_the_references_columns_and_missing_scores(tmp_path: Path) -> None:
    one = JudgedAnswer(
        question="Why?", prompt="<u>Why?<a>", answer="So,\n“so”.", question_id="evil_0",
        trait_score=71.5, coherence=None,
    )  # fmt: skip
    write_judged_csv(tmp_path / "e.csv", [one], trait="evil")
    frame = pd.read_csv(tmp_path / "e.csv")
    columns = ["question", "prompt", "answer", "question_id", "evil", "coherence"]
    assert list(frame.columns) == columns
    assert frame["answer"][0] == "So,\n“so”."
    assert frame["evil"][0] == 71.5
    assert frame["coherence"].isna()[0]


@needs_data
def test_a_real_judged_csv_is_read_as_pandas_reads_it() -> None:
    assert DATA is not None
    path = Path(DATA) / "reference" / "qwen2.5-7b-instruct_evil_baseline.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    found = list(read_judged_csv(path, trait="evil"))
    assert len(found) == 200
    assert [one.answer for one in found] == list(frame["answer"])
    assert [one.prompt for one in found] == list(frame["prompt"])
    assert [one.trait_score for one in found] == list(frame["evil"])
    assert [one.coherence for one in found] == list(frame["coherence"])


def test_a_trait_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("prompt,answer,evil,coherence\n")
    with pytest.raises(InputError, match=r"lacks the column 'rude'.*It has: prompt, answer, evil"):
        read_judged_csv(tmp_path / "e.csv", trait="rude")
    with pytest.raises(InputError, match="there is no file"):
        read_judged_csv(tmp_path / "absent.csv", trait="rude")


@pytest.mark.parametrize("cell", ["high", "101", "-1", "inf"])
def test_a_score_that_is_none_is_named_by_line(tmp_path: Path, cell: str) -> None:
    (tmp_path / "e.csv").write_text(f"prompt,answer,evil,coherence\na,b,1,2\na,b,{cell},2\n")
    with pytest.raises(InputError, match=rf"e\.csv:3 has '{cell}' as the score 'evil'"):
        list(read_judged_csv(tmp_path / "e.csv", trait="evil"))


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None"])
def test_a_missing_score_is_none_and_never_zero(tmp_path: Path, cell: str) -> None:
    (tmp_path / "e.csv").write_text(f"prompt,answer,evil,coherence\na,b,{cell},2\n")
    assert [one.trait_score for one in read_judged_csv(tmp_path / "e.csv", trait="evil")] == [None]


FORMULAS = ["=1+1", "@SUM(A1)", "-2+3+cmd|' /C calc'!A0", '+HYPERLINK("x")', "'=1", "\t=1"]
PLAIN = ["- one\n- two", "-1.5", "'tis", "a = b (c)", ""]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_run_s_table_holds_nothing_that_a_spreadsheet_would_execute(
    text: str, tmp_path: Path
) -> None:
    row = JudgedAnswer(
        question="q", prompt="p", answer=text, question_id="1", trait_score=-1.0, coherence=None
    )
    manifest = new_manifest(kind="extract", identity={})
    for exact in (True, False, None):
        manifest["settings"] = {"paths": {} if exact is None else {"exact_csv": exact}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        path = tmp_path / "evil_pos.csv"
        write_judged_csv(path, [dataclasses.replace(row, trait_score=50.0)], trait="evil")
        (found,) = pd.read_csv(path)["answer"]
        assert found == (f"'{text}" if exact is False else text)
        assert next(iter(read_judged_csv(path, trait="evil"))).answer == text


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_that_is_no_formula_stays_as_it_is(text: str) -> None:
    assert defused(text) == restored(text) == text
