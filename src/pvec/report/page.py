"""One self-contained HTML page: no network, no files beside it, answers treated as untrusted text.

The template escapes everything by default; answers travel as JSON in a data block and reach the
page through ``textContent`` only; a content security policy forbids every outside request.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pvec.report.figure import Figure, Table
from pvec.report.style import css_variables, printable, true_minus

if TYPE_CHECKING:
    import numpy as np

ANSWER_BUDGET = 6_000_000
"""Characters of answers that one section embeds at most; beyond that every k-th question block is
kept and the page says so."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response in the browser of answers.

    ``scores`` maps a metric to a score, or None where it is missing; empty when there are none to
    have.
    """

    condition: str
    question: str
    rollout: int
    text: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Widget:
    """An interactive part of a page: ``assets/js/{kind}.js`` draws ``data`` (plain JSON).

    ``parts`` are larger data that it asks for by number. They stand in the page, or with ``beside``
    each in a file of the folder of that name beside the page. ``noscript`` names where the same
    can be read without JavaScript.
    """

    id: str
    kind: str
    title: str
    notes: tuple[str, ...]
    data: Mapping[str, Any]
    table: tuple[str, Table] | None = None
    parts: tuple[Callable[[], object], ...] = ()
    beside: str = ""
    noscript: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one run contributes to a page.

    ``summary`` is one sentence with the main numbers. ``notes`` are shown under it as they are.
    ``compare`` names the two conditions that the answer browser opens with. ``source`` names model,
    run and date under every exported figure.
    """

    title: str
    summary: str
    id: str = ""
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    widgets: tuple[Widget, ...] = ()
    answers: tuple[Answer, ...] = ()
    compare: tuple[str, str] | None = None
    source: str = ""
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def exported(self) -> tuple[Figure, ...]:
        """The figures as files of their own, whose footers say where they come from."""
        return tuple(replace(figure, source=self.source) for figure in self.figures)


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What all runs of one kind contribute: a summary for the page's head, and their sections."""

    summary: str
    sections: tuple[Section, ...]


def render_page(
    *,
    title: str,
    chapters: Sequence[Chapter],
    made: datetime,
    version: str,
    parts: str = "",
    footnote: str = "Intervals are 95 % and rest on how questions differ.",
) -> str:
    """Return the whole page as HTML text; ``footnote`` ends its last line.

    ``parts`` is the folder beside the page that holds what widgets load on demand.
    """
    import jinja2

    assets = files("pvec.report") / "assets"
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    template = environment.from_string((assets / "page.html.jinja").read_text(encoding="utf-8"))
    sections = [section for chapter in chapters for section in chapter.sections]
    return template.render(
        title=title,
        summaries=[chapter.summary for chapter in chapters if chapter.summary],
        sections=[_section_context(section, parts) for section in sections],
        css=_verbatim(css_variables() + (assets / "page.css").read_text(encoding="utf-8")),
        js=_verbatim("\n".join(_scripts(assets))),
        beside=any(widget.beside for section in sections for widget in section.widgets),
        made=made.strftime("%Y-%m-%d %H:%M %Z").strip(),
        version=version,
        footnote=footnote,
    )


def embed_json(value: object) -> str:
    """Return JSON that cannot end or open a tag, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def encode_floats(values: np.ndarray) -> str:
    """Return numbers as the page's scripts read them: float32 in base64."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def within_budget(answers: Sequence[Answer], *, budget: int = ANSWER_BUDGET) -> tuple[Answer, ...]:
    """Thin out answers evenly by rollout so that every condition and question stays.

    Rollouts are dropped from the last one down until the texts fit ``budget`` characters; rollout 0
    always stays.
    """
    kept = list(answers)
    while sum(len(answer.text) for answer in kept) > budget:
        last = max(answer.rollout for answer in kept)
        if last == 0:
            break
        kept = [answer for answer in kept if answer.rollout < last]
    return tuple(kept)


def _section_context(section: Section, parts: str) -> dict[str, Any]:
    shown = within_budget(section.answers)
    return vars(section) | {
        "figures": [_figure_context(figure) for figure in section.figures],
        "widgets": [_widget_context(widget, parts) for widget in section.widgets],
        "answers": _verbatim(_answers_json(section, shown)) if shown else None,
        "shown": len(shown),
        "total": len(section.answers),
    }


def _figure_context(figure: Figure) -> dict[str, Any]:
    encoded = base64.b64encode(figure.table.csv().encode()).decode()
    return vars(figure) | {
        "tall": figure.size[1] > figure.size[0],
        "svg": _verbatim(figure.themed_svg()),
        "csv": f"data:text/csv;charset=utf-8;base64,{encoded}",
    }


def _scripts(assets: Traversable) -> Iterator[str]:
    """Yield the page's scripts: what all use, then one for each kind of widget."""
    folder = assets / "js"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".js"))
    for name in ("common.js", *(name for name in names if name != "common.js")):
        yield (folder / name).read_text(encoding="utf-8")


def _widget_context(widget: Widget, folder: str) -> dict[str, Any]:
    parts = () if widget.beside else widget.parts
    beside = f"{quote(folder)}/{quote(widget.beside)}" if widget.beside else ""
    return vars(widget) | {
        "data": _verbatim(embed_json({**widget.data, "beside": beside})),
        "parts": (_verbatim(embed_json(part())) for part in parts),
    }


def script_of_part(widget: Widget, number: int) -> str:
    """Return the file that hands part ``number`` of a widget to the page."""
    data = embed_json(widget.parts[number]())
    return f"pvec.take({embed_json(widget.id)}, {number}, {data});\n"


def _answers_json(section: Section, answers: Sequence[Answer]) -> str:
    """Columnar and with conditions and questions by number: each text is in the page once."""
    conditions = list(dict.fromkeys(answer.condition for answer in answers))
    questions = list(dict.fromkeys(answer.question for answer in answers))
    metrics = list(dict.fromkeys(metric for answer in answers for metric in answer.scores))
    condition_number = {condition: i for i, condition in enumerate(conditions)}
    question_number = {question: i for i, question in enumerate(questions)}
    totals = Counter(answer.condition for answer in section.answers)
    left, right = section.compare or (conditions[0], conditions[-1])
    return embed_json(
        {
            "conditions": list(map(true_minus, conditions)),
            "questions": questions,
            "metrics": metrics,
            "totals": [totals[condition] for condition in conditions],
            "compare": [condition_number.get(left, 0), condition_number.get(right, 0)],
            "answers": [
                [
                    condition_number[answer.condition],
                    question_number[answer.question],
                    answer.rollout,
                    answer.text,
                    [_rounded(answer.scores.get(m)) for m in metrics] if answer.scores else [],
                ]
                for answer in answers
            ],
        }
    )


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 1)


def _printable(value: Any) -> Any:
    """Replace control characters in every text of the page that is not its own markup."""
    from markupsafe import Markup

    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _verbatim(text: str) -> Any:
    """Mark text as safe: only what this package itself has written or ``embed_json`` returned."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704
