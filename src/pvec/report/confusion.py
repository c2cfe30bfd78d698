"""Two judges beside each other: which answers each found high."""

from __future__ import annotations

from dataclasses import replace

from pvec.extraction.agreement import Agreement
from pvec.report.figure import Figure
from pvec.report.grids import Grid, heat_map
from pvec.report.sections.common import correlation_text
from pvec.report.style import number


def confusion(agreement: Agreement, *, source: str = "") -> Figure:
    """Draw the four counts of a comparison in per cent of the answers that both judges scored.

    ``source`` names model, run and date in the footer.
    """
    found = agreement
    share = 100.0 / found.n
    high, low = f"≥ {found.threshold:g}", f"< {found.threshold:g}"
    figure = heat_map(
        Grid(
            columns=("second judge", (low, high)),
            rows=("first judge", (high, low)),
            values=(
                (found.only_first * share, found.both * share),
                (found.neither * share, found.only_second * share),
            ),
            value_label="% of answers",
            scale="quality",
            digits=1,
            first_row="top",
        ),
        name=f"agreement_{found.metric}",
        title=f"Agreement on {found.metric}",
        caption=(
            f"First judge: {found.first}; second judge: {found.second}. {found.n:,} answers that "
            f"both scored; Cohen's kappa {number(found.kappa, 2)}, same "
            f"side of {found.threshold:g}: {found.agreement:.1%}, rank correlation "
            f"{correlation_text(vars(found.spearman))}."
        ),
    )
    return replace(figure, source=source)
