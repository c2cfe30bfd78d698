"""Notebooks: figures are those of the reports, and results show themselves as tables."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import pvec
from pvec.errors import InputError
from pvec.notebook import HtmlResult
from pvec.stats import Interval
from pvec.vectors.vector import PersonaVector


@dataclass(frozen=True)
class Row:
    name: str
    score: Interval
    extra: str = ""


@dataclass(frozen=True)
class Result(HtmlResult):
    run: Path
    answers: int
    share: float
    rows: tuple[Row, ...]
    note: str | None = None


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def cells(result: HtmlResult) -> _Cells:
    parser = _Cells()
    parser.feed(result._repr_html_())
    return parser


def test_a_result_shows_itself_with_intervals_and_grouped_digits() -> None:
    score = Interval(mean=71.26, low=68.0, high=74.1, n=40, groups=20)
    unknown = Interval(mean=-3.0, low=float("nan"), high=float("nan"), n=1, groups=1)
    rows = (Row("steered", score), Row("<script>alert(1)</script>", unknown))
    shown = cells(Result(run=Path("runs/x"), answers=12_000, share=0.25, rows=rows))
    assert "12,000" in shown.texts
    assert "71.26 (68 to 74.1)" in shown.texts
    assert "\u22123" in shown.texts
    assert "<script>alert(1)</script>" in shown.texts, "text stays text"
    assert "script" not in shown.tags
    assert "note" not in shown.texts, "what is empty is left out"
    assert "extra" not in shown.texts


def vector(trait: str, *, layers: int = 4) -> PersonaVector:
    rows = np.random.default_rng(len(trait)).standard_normal((layers + 1, 8)).astype(np.float32)
    return PersonaVector(trait=trait, kinds={"response_avg": rows})


def test_cosines_of_a_notebook_are_those_of_the_rows() -> None:
    one, other = vector("evil"), vector("kind")
    drawn = pvec.plot.cosines({"a": one, "b": other}, layer=2)
    a, b = (v.kind("response_avg")[2].astype(float) for v in (one, other))
    expected = a @ b / np.sqrt((a @ a) * (b @ b))
    written = [text.get_text().replace("\u2212", "-") for text in drawn.axes[0].texts]
    assert written == ["1.00", f"{expected:.2f}", f"{expected:.2f}", "1.00"]


def test_vectors_of_one_trait_are_told_apart() -> None:
    drawn = pvec.plot.layers([vector("evil"), vector("evil")])
    legend = drawn.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["evil 1", "evil 2"]


def test_a_layer_that_a_vector_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="no layer 9"):
        pvec.plot.cosines(vector("evil"), layer=9)
    with pytest.raises(InputError, match="no token"):
        pvec.plot.tokens([])


def test_tokens_stand_beside_the_extractions_answers() -> None:
    stats = {"proj_response_neg": np.arange(5.0), "proj_response_pos": np.arange(5.0) + 10}
    evil = PersonaVector(trait="evil", kinds=vector("evil").kinds, stats=stats)
    readings = [(" a", {"evil_layer3": 4.0, "kind_layer3": 1.0})] * 2
    drawn = pvec.plot.tokens(readings, vectors={"evil": evil})
    first, second = drawn.axes
    assert {line.get_ydata()[0] for line in first.lines} == {3.0, 4.0, 13.0}
    assert {line.get_ydata()[0] for line in second.lines} == {1.0}
    assert len(pvec.plot.tokens(readings).axes) == 1
