"""Persona vectors from streams of captured responses, their quality, and their arithmetic.

A vector set is ``[num_layers + 1, H]``, row ``l`` for layer ``l``: the mean over positive responses
minus the mean over negative ones (paper, section 2.2). Nothing here grows with the number of
responses: sums are kept by question, and a bounded sample of responses for measuring separation.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pvec.errors import InputError, ModelError
from pvec.stats import Interval
from pvec.types import SIGNS, Sign, SpanMeans, SpanName, VectorKind
from pvec.vectors.projection import project_layers, quantiles_of
from pvec.vectors.quality import half_cosines, held_out_areas, over_splits

SPAN_OF_KIND: dict[VectorKind, SpanName] = {
    "response_avg": "response",
    "prompt_avg": "prompt",
    "prompt_last": "prompt_last",
}

_MAX_QUESTIONS = 64
"""Sums are kept apart for this many questions; further ones share (only quality figures see it)."""

_SAMPLE_PER_QUESTION = 5
"""Responses per question and class whose activations are kept to measure separation."""


@dataclass(eq=False)
class _Cell:
    """The responses of one class to one question, for one kind of vector."""

    total: np.ndarray  # float64 [L + 1, H]
    count: int = 0
    sample: list[tuple[int, str, int, np.ndarray]] = field(default_factory=list)  # a heap

    def add(self, row_id: str, means: np.ndarray) -> None:
        self.total += means
        self.count += 1
        rank = -zlib.crc32(row_id.encode())  # by content, so that order of arrival is no matter
        self._keep((rank, row_id, self.count, means.astype(np.float32)))

    def merge(self, other: _Cell) -> None:
        for rank, row_id, number, means in other.sample:
            self._keep((rank, row_id, self.count + number, means))
        self.total += other.total
        self.count += other.count

    def sampled(self) -> list[np.ndarray]:
        """Return the kept activations in an order that does not depend on arrival."""
        return [means for *_, means in sorted(self.sample, key=lambda entry: entry[:2])]

    def _keep(self, entry: tuple[int, str, int, np.ndarray]) -> None:
        if len(self.sample) < _SAMPLE_PER_QUESTION:
            heapq.heappush(self.sample, entry)
        elif entry[:2] > self.sample[0][:2]:
            heapq.heapreplace(self.sample, entry)


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorSet:
    """What a trait's extraction ends in.

    ``vectors[kind]`` and ``mean_norm`` are float32 ``[L + 1, H]`` and ``[L + 1]`` (mean residual
    norm over response tokens, both classes); ``counts[kind][sign]`` responses made the vector,
    ``missing[kind][sign]`` had an empty span and did not.
    """

    vectors: Mapping[VectorKind, np.ndarray]
    mean_norm: np.ndarray
    counts: Mapping[VectorKind, Mapping[Sign, int]]
    missing: Mapping[VectorKind, Mapping[Sign, int]]


class VectorAccumulator:
    """Takes captured responses one by one and gives vectors and their quality."""

    def __init__(
        self, kinds: Sequence[VectorKind] = tuple(SPAN_OF_KIND), *, questions: Iterable[str] = ()
    ) -> None:
        """Start empty. ``questions`` that are known beforehand make the result independent of the
        order of arrival even where there are too many to keep apart, as ``merge`` needs it.
        """
        self._kinds = tuple(kinds)
        self._cells: dict[tuple[VectorKind, Sign], dict[str, _Cell]] = {
            (kind, sign): {} for kind in self._kinds for sign in SIGNS
        }
        self._slots: dict[str, str] = {}
        self._missing = dict.fromkeys(self._cells, 0)
        self._norm_total: np.ndarray | None = None
        self._norm_count = 0
        for question in questions:
            self._slot(question)

    def add(self, row: SpanMeans, *, sign: Sign, question: str) -> None:
        """Add one kept response, captured at every layer, to its class."""
        slot = self._slot(question)
        for kind in self._kinds:
            means = row.means[SPAN_OF_KIND[kind]]
            if np.isnan(means).all():
                self._missing[kind, sign] += 1
                continue
            if not np.isfinite(means).all():
                layer = row.layers[int(np.argmin(np.isfinite(means).all(axis=1)))]
                raise ModelError(
                    f"Response {row.id!r} has NaN or infinite activations at layer {layer}: load "
                    f"the model in bfloat16 or float32."
                )
            cells = self._cells[kind, sign]
            if slot not in cells:
                cells[slot] = _Cell(total=np.zeros(means.shape, dtype=np.float64))
            cells[slot].add(row.id, means)
        norms = row.norms["response"] if "response" in row.norms else row.norms["prompt"]
        if not np.isnan(norms).any():
            previous = 0.0 if self._norm_total is None else self._norm_total
            self._norm_total = previous + norms.astype(np.float64)
            self._norm_count += 1

    def merge(self, other: VectorAccumulator) -> None:
        """Add what another process accumulated; both must have been given the same questions."""
        assert self._slots == other._slots, "accumulators of different questions"
        for key, cells in other._cells.items():
            self._missing[key] += other._missing[key]
            for slot, cell in cells.items():
                target = self._cells[key].setdefault(slot, _Cell(total=np.zeros_like(cell.total)))
                target.merge(cell)
        if other._norm_total is not None:
            self._norm_total = other._norm_total + (
                0.0 if self._norm_total is None else self._norm_total
            )
            self._norm_count += other._norm_count

    def result(self) -> VectorSet:
        """Return vectors and counts. Raises ``InputError`` when a class has no response."""
        vectors = {kind: self._difference(kind).astype(np.float32) for kind in self._kinds}
        if self._norm_total is None:
            raise InputError("No response has any token: generate longer answers.")
        return VectorSet(
            vectors=vectors,
            mean_norm=(self._norm_total / self._norm_count).astype(np.float32),
            counts={k: {s: self._count(k, s) for s in SIGNS} for k in self._kinds},
            missing={k: {s: self._missing[k, s] for s in SIGNS} for k in self._kinds},
        )

    def stability(
        self, kind: VectorKind = "response_avg", *, splits: int = 100, seed: int = 0
    ) -> list[Interval]:
        """Return, per layer, the cosine of vectors from two random halves of the questions.

        Mean and central 95 % over random splits. NaN when fewer than two questions have both
        classes.
        """
        slots, totals, counts = self._matrices(kind)
        cosines = half_cosines(totals, counts, splits=splits, seed=seed)
        number = sum(int(c.sum()) for c in counts.values())
        return over_splits(cosines, n=number, groups=len(slots))

    def separation(
        self, kind: VectorKind = "response_avg", *, splits: int = 20, seed: int = 0
    ) -> list[Interval]:
        """Return, per layer, the cross-validated AUC of positive against negative responses.

        The vector comes from one half of the questions, the projected responses from the other.
        """
        slots, totals, counts = self._matrices(kind)
        samples = {sign: self._samples(kind, sign, slots) for sign in SIGNS}
        areas = held_out_areas(totals, counts, samples=samples, splits=splits, seed=seed)
        number = sum(len(samples[sign][0]) for sign in SIGNS)
        return over_splits(areas, n=number, groups=len(slots))

    def class_projections(self) -> dict[str, np.ndarray]:
        """Return where the two classes lie along ``response_avg``, per layer ``[L + 1]``.

        ``proj_response_pos`` and ``proj_response_neg`` are the mean projections of responses,
        ``proj_prompt_pos`` and ``proj_prompt_neg`` those of the prompts' last tokens; NaN where the
        vector is zero.
        """
        vector = self._difference("response_avg")  # [L + 1, H]
        spans: dict[str, VectorKind] = {"response": "response_avg", "prompt": "prompt_last"}
        return {
            f"proj_{name}_{sign}": project_layers(self._class_mean(kind, sign), vector).astype("f4")
            for name, kind in spans.items()
            for sign in SIGNS
        }

    def class_quantiles(self) -> dict[str, np.ndarray]:
        """Return how the two classes spread along ``response_avg``, per layer ``[L + 1]``.

        ``proj_response_pos_q05`` is below all but 5 % of the sampled positive responses'
        projections; NaN where the vector is zero.
        """
        vector = self._difference("response_avg")  # [L + 1, H]
        found: dict[str, np.ndarray] = {}
        for sign in SIGNS:
            slots = sorted(self._cells["response_avg", sign])
            _, samples = self._samples("response_avg", sign, slots)  # [N, L + 1, H]
            found.update(quantiles_of(sign, project_layers(samples, vector)))
        return found

    def _slot(self, question: str) -> str:
        if question not in self._slots:
            names = list(self._slots)
            full = len(names) >= _MAX_QUESTIONS
            if full:  # bounded memory: not remembered, always the same place
                return names[zlib.crc32(question.encode()) % _MAX_QUESTIONS]
            self._slots[question] = question
        return question

    def _count(self, kind: VectorKind, sign: Sign) -> int:
        return sum(cell.count for cell in self._cells[kind, sign].values())

    def _class_mean(self, kind: VectorKind, sign: Sign) -> np.ndarray:
        cells = self._cells[kind, sign]
        if not cells:
            word = {"pos": "positive", "neg": "negative"}[sign]
            raise InputError(
                f"No {word} response was kept, so there is no {kind} vector: generate more, lower "
                f"the thresholds, or check the judge's scores."
            )
        totals = np.sum([cells[slot].total for slot in sorted(cells)], axis=0)
        mean: np.ndarray = totals / self._count(kind, sign)
        return mean

    def _difference(self, kind: VectorKind) -> np.ndarray:
        difference: np.ndarray = self._class_mean(kind, "pos") - self._class_mean(kind, "neg")
        return difference

    def _matrices(
        self, kind: VectorKind
    ) -> tuple[list[str], dict[Sign, np.ndarray], dict[Sign, np.ndarray]]:
        """Return the questions with both classes, their sums ``[Q, L + 1, H]`` and counts."""
        self._difference(kind)  # refuses an empty class
        cells = {sign: self._cells[kind, sign] for sign in SIGNS}
        slots = sorted(set(cells["pos"]) & set(cells["neg"]))
        shape = next(iter(cells["pos"].values())).total.shape
        totals = {
            s: np.stack([cells[s][q].total for q in slots]) if slots else np.zeros((0, *shape))
            for s in SIGNS
        }
        counts = {s: np.array([cells[s][q].count for q in slots], dtype=np.int64) for s in SIGNS}
        return slots, totals, counts

    def _samples(
        self, kind: VectorKind, sign: Sign, slots: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the question numbers ``[N]`` and activations ``[N, L + 1, H]`` of the sample."""
        cells = self._cells[kind, sign]
        kept = [(q, m) for q, slot in enumerate(slots) for m in cells[slot].sampled()]
        shape = next(iter(cells.values())).total.shape
        means = np.stack([m for _, m in kept]) if kept else np.zeros((0, *shape), np.float32)
        return np.array([q for q, _ in kept], dtype=np.int64), means
