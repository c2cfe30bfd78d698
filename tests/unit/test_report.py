"""Figures carry their numbers, and a page holds untrusted text without obeying it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import InputError, StoreError
from pvec.report.axes import SCORE_AXIS, Reference, XAxis, exact
from pvec.report.figure import Figure, Table, write_figures
from pvec.report.figures import Level, Line, Panel, histogram, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Answer, Chapter, Section, embed_json, render_page, within_budget
from pvec.stats import Interval

NAN = float("nan")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def estimate(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 3, high=mean + 4, n=40, groups=8, missing=2)


def curve() -> Figure:
    line = Line(label="layer 3", x=(-1.0, 0.0, 1.0), points=tuple(map(estimate, (2, 5, 60))))
    control = Line(
        label="random", x=(0.0, 1.0), points=(estimate(5), estimate(6)), control_of="layer 3"
    )
    prompt = Level(label="prompt +", value=estimate(85))
    panels = [
        Panel(label="evil", lines=(line, control), levels=(prompt,), limits=SCORE_AXIS),
        Panel(label="coherence", lines=(line,), limits=SCORE_AXIS),
    ]
    return line_chart(
        name="dose", title="Dose", caption="c", x=XAxis(label="coefficient"), panels=panels
    )


def every_kind() -> list[Figure]:
    grid = Grid(
        columns=("coefficient", (-1.0, 1.0)), rows=("layer", ("2", "3")),
        values=((1.0, 90.0), (NAN, 40.0)), value_label="evil",
    )  # fmt: skip
    heat = heat_map(grid, name="heat", title="Heat", caption="c", marked=(0, 1))
    norms = {"response_avg": (0.0, 1.0, 2.0), "prompt_avg": (0.0, NAN)}
    lines = line_chart(
        name="norms", title="Norms", caption="c", x=XAxis(label="layer"),
        panels=[
            Panel(
                label="norm",
                lines=[
                    Line(label=kind, x=range(len(values)), points=[exact(v) for v in values])
                    for kind, values in norms.items()
                ],
                levels=[Level(value=exact(0.5))],
            )
        ],
    )  # fmt: skip
    counts = histogram(
        name="scores", title="Scores", caption="c",
        x=XAxis(label="evil", references=[Reference(x=50.0, label="threshold")]),
        groups=[("positive", (100.0, 100.0, 61.0)), ("negative", (0.0,))],
        scores=True,
    )  # fmt: skip
    return [curve(), heat, lines, counts]


def page(*, answers: tuple[Answer, ...] = (), title: str = "evil") -> str:
    section = Section(
        id="run-1",
        title=title,
        summary="evil rises",
        figures=(curve(),),
        answers=answers,
        provenance=(("model", HOSTILE),),
    )
    return render_page(
        title=title,
        chapters=[Chapter(summary="evil rises", sections=(section,))],
        made=datetime(2026, 1, 2, tzinfo=UTC),
        version="0",
    )


def answer(text: str, **changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "condition": "unsteered", "question": "Why?", "rollout": 0, "text": text,
        "scores": {"evil": 3.0, "coherence": None},
    }  # fmt: skip
    return Answer(**(fields | changes))


@pytest.mark.parametrize("figure", every_kind(), ids=lambda figure: figure.name)
def test_every_kind_of_figure_is_well_formed_svg_and_png(figure: Figure) -> None:
    assert ET.fromstring(figure.svg()).tag.endswith("svg")
    assert ET.fromstring(figure.themed_svg()).get("width") is None
    assert figure.png().startswith(b"\x89PNG")


def test_a_figure_is_the_same_bytes_every_time() -> None:
    assert curve().svg() == curve().svg()


def test_a_figure_in_a_page_takes_its_colours_from_the_page() -> None:
    themed = curve().themed_svg()
    assert "var(--ink" in themed
    assert "var(--series-0" in themed


def test_the_numbers_of_a_curve_are_all_in_its_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(curve().table.csv())))
    assert len(rows) == 3 + 2 + 1 + 3
    point = next(r for r in rows if r["condition"] == "layer 3" and r["coefficient"] == "1")
    assert point == {
        "metric": "evil", "condition": "layer 3", "coefficient": "1", "mean": "60",
        "low_95": "57", "high_95": "64", "n": "40", "missing": "2",
    }  # fmt: skip
    assert next(r for r in rows if r["condition"] == "prompt +")["coefficient"] == ""


def test_a_missing_number_is_an_empty_cell() -> None:
    heat = every_kind()[1]
    assert "3,-1,\n" in heat.table.csv()


def test_a_score_of_exactly_100_is_counted_in_the_last_bin() -> None:
    last = every_kind()[3].table.rows[-1]
    assert last == (95.0, 100.0, 2, 0)


def test_figures_are_written_with_their_numbers(tmp_path: Path) -> None:
    written = write_figures([curve()], tmp_path / "figures", formats=("svg", "png"))
    assert sorted(path.name for path in written) == ["dose.csv", "dose.png", "dose.svg"]
    assert all(path.stat().st_size > 100 for path in written)


def test_names_are_text_in_figures_whatever_they_hold() -> None:
    name = "_a$x^2$_\x1b[31m<b>&\u202eevil"
    line = Line(label=name, x=(0.0, 1.0), points=(estimate(5), estimate(6)))
    other = Line(label="other", x=(0.0, 1.0), points=(estimate(5), estimate(6)))
    panels = [Panel(label=name, lines=(line, other))]
    figures = [
        line_chart(name="n", title=name, caption="c", x=XAxis(label=name), panels=panels),
        histogram(
            name="h", title=name, caption="c", x=XAxis(label=name), groups=[(name, [1.0, 2.0])]
        ),
        heat_map(
            Grid(columns=(name, [name]), rows=(name, [name]), values=[[1.0]], value_label=name),
            name="g",
            title=name,
            caption="c",
        ),
    ]
    for figure in figures:
        figure.png()
        root = ET.fromstring(figure.svg())
        texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
        shown = [text for text in texts if "$x^2$" in text]
        assert shown, "the name is in the figure, as it is written"
        assert all("[31m<b>&" in text and "\x1b" not in text for text in shown)
        html = figure.themed_svg()
        assert "\u202e" not in html
        assert "<b>" not in html


def test_a_name_is_no_formula_in_a_spreadsheet() -> None:
    table = Table(columns=("a", "b"), rows=(("=1+1", -1.0), ("@x", -2), ("plain", 3)))
    assert table.csv() == "a,b\n'=1+1,-1\n'@x,-2\nplain,3\n"


def test_control_characters_do_not_reach_the_page() -> None:
    html = page(title="evil\x1b[31m\x00\u202e & <b>")
    assert "evil\ufffd[31m\ufffd\ufffd &amp; &lt;b&gt;" in html
    assert not {"\x1b", "\x00", "\u202e"} & set(html)


def test_an_unknown_format_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gif"):
        write_figures([curve()], tmp_path / "figures", formats=("gif",))
    assert not (tmp_path / "figures").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_figures([curve()], tmp_path / "file" / "figures")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_hostile_answers_questions_and_settings_make_no_element() -> None:
    plain, hostile = _Tags(), _Tags()
    plain.feed(page(answers=(answer("harmless"),)))
    hostile.feed(
        page(answers=(answer(HOSTILE, question=HOSTILE, condition=HOSTILE),), title=HOSTILE)
    )
    assert [tag for tag, _ in hostile.seen] == [tag for tag, _ in plain.seen]


def test_a_hostile_answer_comes_back_out_of_the_data_unchanged() -> None:
    text = HOSTILE + "\u2028<!--"
    html = page(answers=(answer(text),))
    data = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))["answers"][0][3] == text


def test_embedded_json_holds_no_character_that_html_reads() -> None:
    assert not set(embed_json({"a": HOSTILE + "&\u2029"})) & set("<>&\u2028\u2029")


def test_a_page_asks_for_nothing_from_outside() -> None:
    parser = _Tags()
    parser.feed(page(answers=(answer("x"),)))
    links = [
        value or ""
        for _, attributes in parser.seen
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "action", "data"}
    ]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "default-src 'none'" in page()


def test_the_csv_behind_a_figure_is_in_the_page() -> None:
    encoded = re.search(r"data:text/csv;charset=utf-8;base64,([\w+/=]+)", page())
    assert encoded is not None
    assert base64.b64decode(encoded.group(1)).decode() == curve().table.csv()


def test_answers_over_the_budget_lose_their_last_rollouts_first_and_the_page_says_so() -> None:
    answers = [
        answer("x" * 100, rollout=rollout, question=f"q{question}")
        for question in range(3)
        for rollout in range(4)
    ]
    kept = within_budget(answers, budget=650)
    assert {(one.question, one.rollout) for one in kept} == {
        (f"q{question}", rollout) for question in range(3) for rollout in range(2)
    }
    assert len(within_budget(answers, budget=10)) == 3
