"""Figures for notebooks: those of the reports, as matplotlib figures.

``pvec.plot.figures(result)`` draws what ``pvec report`` shows of a run; the other functions draw
vectors and tokens that no run holds. Show one with ``%matplotlib inline`` and its name on the last
line of a cell, or save it with ``savefig``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError
from pvec.report.axes import XAxis, exact
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.report import sections_of
from pvec.report.vectors import cosine_figure, layer_figure
from pvec.vectors.projection import cosine
from pvec.vectors.vector import DEFAULT_KIND

__all__ = ["cosines", "figures", "layers", "tokens"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvec.types import VectorKind
    from pvec.vectors.vector import PersonaVector

    Vectors = Mapping[str, PersonaVector] | Sequence[PersonaVector] | PersonaVector


def figures(run: Any, *, judge: str | None = None) -> dict[str, Figure]:
    """Return the figures of a run's report, by their names.

    ``run`` is a result of ``pvec.extract``, ``pvec.evaluate``, ``pvec.screen`` or ``pvec.train``,
    or a run folder. ``judge`` chooses among several judges' scores. Raises ``InputError`` or
    ``StoreError`` for a folder that ``pvec report`` would not show.

    >>> drawn = pvec.plot.figures("runs/evil-tiny")
    >>> sorted(drawn)
    ['by_layer', 'coherence_scores', 'evil_scores']
    """
    path = Path(getattr(run, "run", run))
    return {
        figure.name.removeprefix(f"{section.id}_"): figure.canvas()
        for section in sections_of([path], judge=judge)
        for figure in section.exported
    }


def layers(vectors: Vectors, *, kind: VectorKind = DEFAULT_KIND) -> Figure:
    """Return norm, separation and stability of vectors by layer, with the suggested layer of one.

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> [axis.get_ylabel() for axis in pvec.plot.layers(vector).axes]
    ['norm', 'norm / residual', 'separation (AUC)', 'split-half cosine']
    """
    named = _named(vectors)
    return layer_figure([(name, vector, kind) for name, vector in named.items()]).canvas()


def cosines(vectors: Vectors, *, layer: int, kind: VectorKind = DEFAULT_KIND) -> Figure:
    """Return the cosines between vectors at a layer as a matrix.

    Raises ``InputError`` for a layer that a vector does not have.

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> drawn = pvec.plot.cosines({"one": vector, "the same": vector}, layer=3)
    >>> [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    ['one', 'the same']
    """
    named = _named(vectors)
    for name, vector in named.items():
        if not 0 <= layer <= vector.num_layers:
            raise InputError(f"The vector {name!r} has no layer {layer}: 0 to {vector.num_layers}.")
    rows = [vector.kind(kind)[layer] for vector in named.values()]
    return cosine_figure(list(named), [[float(cosine(a, b)) for b in rows] for a in rows]).canvas()


def tokens(
    readings: Iterable[tuple[str, Mapping[str, float]]], *, vectors: Vectors | None = None
) -> Figure:
    """Return the projections of an answer token by token, as ``pvec.monitor`` yields them.

    With the ``vectors`` it was given, each has axes of its own with the mean projections of its
    extraction's negative and positive answers. Raises ``InputError`` when there is no token.

    >>> drawn = pvec.plot.tokens([("Crush", {"evil_layer3": 2.5}), (" them", {"evil_layer3": 4})])
    >>> drawn.axes[0].get_xlabel()
    'token of the answer'
    """
    read = list(readings)
    if not read:
        raise InputError("There is no token to draw: give what pvec.monitor yields.")
    places = range(1, len(read) + 1)
    lines = [
        Line(label=name, x=places, points=[exact(values[name]) for _, values in read])
        for name in read[0][1]
    ]
    known = {} if vectors is None else _named(vectors)
    panels = [
        Panel(label=one.label, lines=[one], levels=_levels(one.label, known)) for one in lines
    ]
    return line_chart(
        name="tokens",
        title="Projections token by token",
        caption="".join(text for text, _ in read),
        x=XAxis(label="token of the answer"),
        panels=panels if known else [Panel(label="projection", lines=lines)],
    ).canvas()


def _levels(column: str, vectors: Mapping[str, PersonaVector]) -> list[Level]:
    """Return where the extraction's answers lie on the axis of ``NAME_layerL``, where known."""
    name, _, layer = column.rpartition("_layer")
    stats = vectors[name].stats if name in vectors else {}
    return [
        Level(label=f"{word} answers", value=exact(float(stats[key][int(layer)])))
        for word, key in (("negative", "proj_response_neg"), ("positive", "proj_response_pos"))
        if key in stats
    ]


def _named(vectors: Vectors) -> dict[str, PersonaVector]:
    """Return vectors by name; those of one trait are numbered."""
    if isinstance(vectors, Mapping):
        return dict(vectors)
    listed = list(vectors) if isinstance(vectors, Sequence) else [vectors]
    traits = [vector.trait for vector in listed]
    return {
        trait if traits.count(trait) == 1 else f"{trait} {number}": vector
        for number, (trait, vector) in enumerate(zip(traits, listed, strict=True), start=1)
    }
