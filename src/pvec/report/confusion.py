"""Two judges beside each other: which answers each found high."""

from __future__ import annotations

from pvec.judges.agreement import Agreement
from pvec.report.figure import Figure
from pvec.report.grids import Grid, heat_map


def confusion(agreement: Agreement) -> Figure:
    """Draw the four counts of a comparison in per cent of the answers that both judges scored."""
    found = agreement
    share = 100.0 / found.n
    high, low = f"≥ {found.threshold:g}", f"< {found.threshold:g}"
    return heat_map(
        Grid(
            columns=("second judge", (low, high)),
            rows=("first judge", (high, low)),
            values=(
                (found.only_first * share, found.both * share),
                (found.neither * share, found.only_second * share),
            ),
            value_label="% of answers",
            scale="quality",
            first_row="top",
        ),
        name=f"agreement_{found.metric}",
        title=f"Agreement on {found.metric}",
        caption=(
            f"First judge: {found.first}; second judge: {found.second}. {found.n} answers that "
            f"both scored; Cohen's kappa {found.kappa:.2f}, same "
            f"side of {found.threshold:g}: {found.agreement:.0%}, rank correlation "
            f"{found.spearman.r:.2f}."
        ),
    )
