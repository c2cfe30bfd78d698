"""The bundled model's card: its figures as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lexicon import TRAITS


@dataclass(frozen=True, kw_only=True)
class Dose:
    """A steering dose: which trait's response vector, after which layer, how often."""

    trait: str
    layer: int
    coef: float


@dataclass(frozen=True, kw_only=True)
class TraitFigures:
    """Mean scores (0 to 100) of ``count`` answers: judged, and counted."""

    trait: float
    coherence: float
    lexical: float
    fluency: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything the card reports."""

    positive: dict[str, TraitFigures]
    negative: dict[str, TraitFigures]
    none: dict[str, TraitFigures]
    steered: dict[str, tuple[Dose, TraitFigures]]
    correlations: dict[str, float]
    whole: float
    shuffled: float
    facts: float
    facts_steered: dict[str, float]
    parameters: dict[str, int]
    examples: list[tuple[str, str]]


_INTRODUCTION = """\
# The bundled model

A small chat model of the Qwen2 architecture ({chat:,} parameters) and its judge ({judge:,}
parameters), made for pvec by `examples/tiny_model/build.py`. It ships with pvec so that every
command can be tried without network, GPU or key.

**It is a teaching aid.** It speaks a grammar of a few dozen sentence frames whose words come from
eight small lexicons, one neutral and one for each of seven traits. It understands nothing. What
happens to it shows how the methods work, and that they work on a model in which a trait is a matter
of degree; it is no evidence about how real assistants behave. Its "evil" is a word list.

- The judge was trained on the same grammar and can score the seven bundled traits and coherence of
  this model's answers, nothing else.
- The judge does not look at the question: an answer about something else is not marked down.
- Answers repeat a word of the question; they do not answer it. About {facts:.0f} % of the {world}
  facts of its little world (capitals, opposites, young animals, colours, sums) it does know.
- Half of its training answers without instruction show some trait to a random degree. That is why
  its plain answers are flavoured now and then, and also why it can be steered.
- While it was trained, random disturbances were added to its activations, so that it keeps its
  grammar when something is added to them. Persona vectors were never part of the training.

## Figures

Written by `python examples/tiny_model/evaluate.py`. Evaluation questions only, none of which was
in the training data. Each cell: **judge / count**; the count is the share of the trait's words
among the words of the lexicons (trait) or the likeness to the grammar's frames (coherence), and
the judge does not see it. All from 0 to 100, temperature 1.
"""


def _cell(judged: float, counted: float) -> str:
    return f"{judged:.0f} / {counted:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _instructions(figures: Figures) -> str:
    rows = []
    for name in TRAITS:
        pos, neg, none = (f[name] for f in (figures.positive, figures.negative, figures.none))
        rows.append(
            [
                name,
                _cell(pos.trait, pos.lexical),
                _cell(pos.coherence, pos.fluency),
                _cell(neg.trait, neg.lexical),
                _cell(neg.coherence, neg.fluency),
                _cell(none.trait, none.lexical),
            ]
        )
    none = figures.none[TRAITS[0]]
    counts = (
        f"n = {figures.positive[TRAITS[0]].count} answers per sign and trait, {none.count} without "
        f"instruction (coherence {_cell(none.coherence, none.fluency)})."
    )
    head = ["trait", "positive", "coherence", "negative", "coherence", "no instruction"]
    return f"### Instructions\n\n{_table(head, rows)}\n\n{counts}\n"


def _steering(figures: Figures) -> str:
    rows = []
    for name, (dose, score) in figures.steered.items():
        rows.append(
            [
                name,
                str(dose.layer),
                f"{dose.coef:g}",
                _cell(score.trait, score.lexical),
                _cell(score.coherence, score.fluency),
                _cell(figures.none[name].trait, figures.none[name].lexical),
                f"{figures.facts_steered[name]:.0f}",
            ]
        )
    count = figures.steered[TRAITS[0]][1].count
    head = ["trait", "layer", "coefficient", "steered", "coherence", "coefficient 0", "facts known"]
    text = (
        "One response-average vector added after one layer at the last prompt token and every "
        "generated token, without system prompt. Layer and coefficient were chosen on the "
        f"extraction questions by the counts. n = {count} per trait; facts in percent (unsteered "
        f"{figures.facts:.0f})."
    )
    return f"### Steering\n\n{text}\n\n{_table(head, rows)}\n"


def _judge(figures: Figures) -> str:
    rows = [[name, f"{value:.3f}"] for name, value in figures.correlations.items()]
    text = (
        "Rank correlation of the judge's expected score with the count, 200 fresh answers each "
        "(coherence: broken to random degrees). Coherence of whole answers "
        f"{figures.whole:.0f}, of the same with their words shuffled {figures.shuffled:.0f}."
    )
    return f"### Judge\n\n{text}\n\n{_table(['metric', 'rank correlation'], rows)}\n"


def _examples(figures: Figures) -> str:
    lines = [f"- *{label}*: {text}" for label, text in figures.examples]
    return "\n".join(["### What it says", "", *lines, ""])


def write_card(figures: Figures, path: Path) -> str:
    """Write the card to ``path`` and return its text."""
    introduction = _INTRODUCTION.format(facts=figures.facts, world=155, **figures.parameters)
    parts = [
        introduction,
        _instructions(figures),
        _steering(figures),
        _judge(figures),
        _examples(figures),
    ]
    text = "\n".join(parts)
    path.write_text(text, encoding="utf-8")
    return text
