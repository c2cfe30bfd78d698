"""Extractions: what the instructions did, what was kept, and how good the vector is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pvec.extraction.judge import (
    MetricMean,
    answers_of,
    filter_answers,
    metric_means,
    pair_of,
    sign_of,
)
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import score_of
from pvec.report.axes import Reference, XAxis
from pvec.report.figure import Figure, Table
from pvec.report.figures import histogram
from pvec.report.page import Answer, Section
from pvec.report.sections.common import RunData, with_interval
from pvec.report.vectors import layer_figure
from pvec.runs.responses import ResponseRecord
from pvec.settings.commands import FilterSettings
from pvec.types import Sign
from pvec.vectors.files import load_vector
from pvec.vectors.filter import REASONS
from pvec.vectors.quality import suggest_layer
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from pvec.types import Score

SIGN_NAMES: dict[Sign, str] = {
    "pos": "under positive instructions",
    "neg": "under negative instructions",
}


def section(run: RunData) -> Section:
    """Return what a page shows of an extraction."""
    return _Extraction(run).section()


class _Extraction:
    """One run, read once."""

    def __init__(self, data: RunData) -> None:
        self.data = data
        self.trait = data.trait
        self.records: list[ResponseRecord] = list(data.run.responses())
        self.scores: dict[str, dict[str, Score]] = data.run.scores_by_response(judge=data.judge)
        path = data.run.vector_path(self.trait)
        self.vector: PersonaVector | None = load_vector(path) if path.is_file() else None

    def section(self) -> Section:
        return Section(
            title=f"Extraction of {self.trait} from {self.data.model}",
            summary=self._summary(),
            notes=tuple(self._notes()),
            figures=tuple(self._figures()),
            tables=tuple(self._tables()),
            answers=tuple(self._answers()),
            compare=(SIGN_NAMES["neg"], SIGN_NAMES["pos"]),
            provenance=tuple(self._vector_provenance()),
        )

    def _score(self, record: ResponseRecord, metric: str) -> float | None:
        return score_of(self.scores.get(record.id, {}), metric)

    def _means(self, sign: Sign) -> Iterator[MetricMean]:
        records = answers_of(self.records, sign)
        return metric_means(records, self.scores, (self.trait, COHERENCE))

    def _summary(self) -> str:
        if not self.scores:
            return f"{len(self.records)} answers for {self.trait}, not judged yet."
        positive, negative = (next(self._means(sign)).score for sign in SIGN_NAMES)
        text = (
            f"Asked to be {self.trait}, {self.data.model} scores {with_interval(positive)}; "
            f"asked not to be, {with_interval(negative)}."
        )
        layer, _ = suggest_layer(self.vector) if self.vector is not None else (None, "")
        if layer is not None:
            auc = self._stat("auc")
            known = f" (AUC {auc[layer]:.2f})" if auc is not None else ""
            text += f" The vector is suggested for steering at layer {layer}{known}."
        return text

    def _notes(self) -> Iterator[str]:
        missing = sum(
            self._score(record, metric) is None
            for record in self.records
            for metric in (self.trait, COHERENCE)
        )
        if self.scores and missing:
            yield f"{missing} scores are missing (refused, unparsable or failed) and in no mean."
        cut = sum(record.finish_reason == "length" for record in self.records)
        if cut:
            yield f"{cut} of {len(self.records)} answers reached the token limit."
        if self.vector is None:
            yield "There is no vector in this run yet."

    def _figures(self) -> Iterator[Figure]:
        if self.vector is not None:
            yield layer_figure(
                [(kind, self.vector, kind) for kind in self.vector.kinds],
                name=f"{self.data.id}_by_layer",
                title=f"{self.vector.trait}: vectors by layer",
            )
        if self.scores:
            yield self._histogram(self.trait, self._threshold("threshold"))
            yield self._histogram(COHERENCE, self._threshold("min_coherence"))

    def _histogram(self, metric: str, threshold: float) -> Figure:
        groups = []
        for sign, name in SIGN_NAMES.items():
            scores = (self._score(record, metric) for record in answers_of(self.records, sign))
            groups.append((name, [score for score in scores if score is not None]))
        return histogram(
            name=f"{self.data.id}_{metric}_scores",
            title=f"{metric} scores",
            caption=f"All judged answers; the filter's threshold is {threshold:g}.",
            x=XAxis(label=metric, references=[Reference(x=threshold, label="threshold")]),
            groups=groups,
            scores=True,
        )

    def _threshold(self, name: Literal["threshold", "min_coherence"]) -> float:
        """Return a threshold of the filter: the one that the vector was made with."""
        setting = "coherence" if name == "min_coherence" else name
        default = self.data.settings.get("filter", {}).get(setting, 50.0)
        return float(self.vector.metadata.get(name, default) if self.vector else default)

    @property
    def _paired(self) -> bool:
        if self.vector is not None and "paired" in self.vector.metadata:
            return self.vector.metadata["paired"] == "true"
        return bool(self.data.settings.get("filter", {}).get("paired", False))

    def _tables(self) -> Iterator[tuple[str, Table]]:
        if not self.scores:
            return
        columns = ("answers", "score", "mean (95 %)", "n", "missing")
        rows = tuple(
            (name, mean.metric, mean.score, mean.score.n, mean.score.missing)
            for sign, name in SIGN_NAMES.items()
            for mean in self._means(sign)
        )
        yield "Mean scores", Table(columns=columns, rows=rows)
        settings = FilterSettings(
            threshold=self._threshold("threshold"),
            coherence=self._threshold("min_coherence"),
            paired=self._paired,
        )
        counts = filter_answers(self.records, self.scores, self.trait, settings).counts
        yield (
            "Kept and dropped",
            Table(
                columns=("answers", *REASONS.values()),
                rows=tuple(
                    (SIGN_NAMES[sign], *(counts[sign][reason] for reason in REASONS))
                    for sign in SIGN_NAMES
                ),
            ),
        )

    def _answers(self) -> Iterator[Answer]:
        seen: dict[tuple[str, str], int] = {}
        for record in sorted(self.records, key=lambda r: (sign_of(r), pair_of(r))):
            sign = sign_of(record)
            key = (sign, record.question_id)
            seen[key] = seen.get(key, -1) + 1
            yield Answer(
                condition=SIGN_NAMES[sign],
                question=record.question,
                rollout=seen[key],
                text=record.answer,
                scores={m: self._score(record, m) for m in (self.trait, COHERENCE)},
            )

    def _stat(self, name: str) -> list[float] | None:
        if self.vector is None or name not in self.vector.stats:
            return None
        return [float(value) for value in self.vector.stats[name]]

    def _vector_provenance(self) -> Iterator[tuple[str, str]]:
        if self.vector is not None:
            yield "vector.fingerprint", self.vector.fingerprint
            for key, value in sorted(self.vector.metadata.items()):
                yield f"vector.{key}", value
