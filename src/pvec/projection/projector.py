"""Projections of conversations on one loaded model: what every kind of projecting shares.

``pvec project`` hands it chunks of a file, the library a list, Ray's workers their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Conversation, Counts, SpanMaker, Turns
from pvec.errors import InputError
from pvec.models.decoder import describe_layer
from pvec.settings import Settings
from pvec.types import Progress, SpanMeans, SpanName, TokenSpans, VectorKind
from pvec.vectors.find import find_vector, load_vectors
from pvec.vectors.projection import ProjectionPlan
from pvec.vectors.quality import suggest_layer, suggest_prompt_layer
from pvec.vectors.vector import POST_FINAL_NORM, PersonaVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pvec.backends.base import Backend

_AT_ONCE = 64
"""Rows whose activations are projected together; few enough that theirs is little memory."""

Values = tuple[float | None, ...]
"""One row's projections in the order of the plan's columns; None where there is no token."""


class Suggest(Protocol):
    """Chooses the layer of a vector where none was asked for."""

    def __call__(self, vector: PersonaVector, *, kind: VectorKind) -> int:
        """Return the layer."""


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Projections of several conversations: ``rows[i]`` holds one tuple per turn that counts."""

    rows: list[list[Values]]
    counts: Counts


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """The vectors of a command, by the name their columns carry, and the layers asked for."""

    vectors: Mapping[str, PersonaVector]
    kind: VectorKind
    layers: tuple[int, ...]

    def plan(self, settings: Settings) -> ProjectionPlan:
        """Return the plan of the settings' types."""
        return self.plan_of(*settings.project.types)

    def plan_of(self, *kinds: str) -> ProjectionPlan:
        """Return the plan of these types of projection."""
        rows = {name: vector.kind(self.kind) for name, vector in self.vectors.items()}
        return ProjectionPlan.make(rows, layers=self.layers, kinds=kinds)  # type: ignore[arg-type]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these vectors from others of the same names."""
        return {name: vector.fingerprint for name, vector in self.vectors.items()}


class Projector:
    """Projects conversations on the vectors of a plan; one forward pass serves all of it.

    ``limit`` is the number of tokens the model reads (None: any); longer rows lose the beginning
    of their prompt, which is counted.
    """

    def __init__(
        self,
        backend: Backend,
        plan: ProjectionPlan,
        *,
        tokenizer: PreTrainedTokenizerBase,
        turns: Turns = "last",
        thinking: bool = False,
        limit: int | None = None,
    ) -> None:
        self.plan = plan
        self._backend = backend
        self._pooled = turns == "all"
        self._spans = SpanMaker(
            tokenizer=tokenizer, needed=plan.spans, turns=turns, thinking=thinking, limit=limit
        )

    def __call__(
        self, conversations: Sequence[Conversation], *, on_done: Callable[[int], None] = ignore
    ) -> Projected:
        """Return the projections of every conversation; ``on_done`` hears of finished sequences."""
        made = self._spans(conversations)
        values: dict[str, Values] = {}
        for identity, row in self._values(made.rows):
            values[identity] = row
            on_done(len(values))
        empty: Values = (None,) * len(self.plan.columns())
        rows = [
            [values.get(f"{number}:{turn}", empty) for turn in range(self._turns(spans))]
            for number, spans in enumerate(made.rows)
        ]
        return Projected(rows=rows, counts=made.counts)

    def _turns(self, spans: Sequence[TokenSpans]) -> int:
        return min(len(spans), 1) if self._pooled else len(spans)

    def _values(self, rows: Sequence[Sequence[TokenSpans]]) -> Iterator[tuple[str, Values]]:
        sequences = (one for spans in rows for one in spans if one.token_ids)
        captured: Iterable[SpanMeans] = self._backend.capture(sequences, layers=self.plan.layers)
        if self._pooled:
            captured = _pool(captured, rows)
        batch: list[SpanMeans] = []
        for one in captured:
            batch.append(one)
            if len(batch) == _AT_ONCE:
                yield from self._project(batch)
                batch = []
        if batch:
            yield from self._project(batch)

    def _project(self, batch: Sequence[SpanMeans]) -> Iterator[tuple[str, Values]]:
        means = {span: np.stack([one.means[span] for one in batch]) for span in self.plan.spans}
        table = self.plan.values(means)
        for one, row in zip(batch, table.tolist(), strict=True):
            yield one.id, tuple(None if value != value else value for value in row)  # noqa: PLR0124


def projector(
    session: ModelSession, plan: ProjectionPlan, settings: Settings, *, turns: Turns | None = None
) -> Projector:
    """Return the projector of a command; its first use loads the model."""
    return Projector(
        session.backend,
        plan,
        tokenizer=session.metadata.tokenizer,
        turns=turns or settings.project.turns,
        thinking=session.thinking,
        limit=session.metadata.context,
    )


def project_table(
    project: Projector,
    conversations: Iterator[Conversation],
    *,
    total: int,
    chunk_rows: int,
    stage: str,
    on_progress: Callable[[Progress], None] = ignore,
) -> np.ndarray:
    """Return projections ``[conversations, columns]`` in float64, NaN where there is none.

    One row per conversation: for plans of ``turns`` "last" or "all".
    """
    rows: list[np.ndarray] = []
    while chunk := list(islice(conversations, chunk_rows)):
        rows += [np.array(turns[0], dtype=np.float64) for turns in project(chunk).rows]
        on_progress(Progress(stage=stage, done=len(rows), total=total, unit="rows"))
    return np.stack(rows) if rows else np.zeros((0, len(project.plan.columns())))


def open_directions(
    settings: Settings,
    names: Sequence[str | Path],
    session: ModelSession,
    *,
    suggest: Suggest | None = None,
    notify: Notify = ignore,
) -> Directions:
    """Read the vector files that ``names`` stand for and check them against the model.

    Columns carry a file's stem, with the kind where it is not the file's main one. Layers are
    those of the settings, else what each file suggests by ``suggest`` (``suggested_layer`` unless
    told otherwise). No weights are loaded. Raises
    ``InputError`` for two vectors of one name or a layer that a file lacks, ``ModelError`` for a
    vector of another model.
    """
    if not names:
        raise InputError("No vector was named: give --vector FILE (`pvec extract` makes one).")
    metadata, kind = session.metadata, settings.project.kind
    vectors: dict[str, PersonaVector] = {}
    loaded = load_vectors(names, model=metadata, same_model=settings.project.same_model)
    for path in map(find_vector, names):
        vector = loaded[path]
        lone = len(vector.kinds) == 1
        chosen = vector.main_kind if lone else kind
        vector.kind(chosen)
        name = path.stem if lone or kind == "response_avg" else f"{path.stem}_{kind}"
        if name in vectors:
            raise InputError(
                f"Two vector files are called {name!r}, and so would be their columns: rename one."
            )
        vectors[name] = _as_kind(vector, chosen, kind)
    layers = _layers(settings, vectors, suggest or suggested_layer, notify=notify)
    _check_rows(vectors, layers, kind, num_layers=metadata.num_layers, notify=notify)
    return Directions(vectors=vectors, kind=kind, layers=layers)


def suggested_layer(vector: PersonaVector, *, kind: VectorKind = "response_avg") -> int:
    """Return the layer that a vector's file suggests (``suggest_layer``).

    Raises ``InputError`` for a file that holds no residual norms.
    """
    layer, _ = suggest_layer(vector, kind=kind)
    if layer is None:
        raise InputError(
            f"The vector of {vector.trait!r} holds no residual norms to choose a layer by: say at "
            f"which layer to project (--layer)."
        )
    return layer


def suggested_prompt_layer(vector: PersonaVector, *, kind: VectorKind = "response_avg") -> int:
    """Return the layer to read prompts at before they are answered (``suggest_prompt_layer``).

    The vector's own layer where its file does not say how prompts differ. Raises as
    ``suggested_layer`` does.
    """
    layer = suggest_prompt_layer(vector, kind=kind)
    return suggested_layer(vector, kind=kind) if layer is None else layer


def _as_kind(vector: PersonaVector, found: VectorKind, wanted: VectorKind) -> PersonaVector:
    """Return a vector whose kind ``wanted`` is the one that its file holds."""
    if found == wanted:
        return vector
    return PersonaVector(
        trait=vector.trait, kinds={wanted: vector.kind(found)}, metadata=vector.metadata
    )


def _layers(
    settings: Settings, vectors: Mapping[str, PersonaVector], suggest: Suggest, *, notify: Notify
) -> tuple[int, ...]:
    if settings.project.layers:
        return tuple(dict.fromkeys(settings.project.layers))
    kind = settings.project.kind
    found = {name: suggest(vector, kind=kind) for name, vector in vectors.items()}
    notify("layers: " + ", ".join(f"{layer} as {name} suggests" for name, layer in found.items()))
    return tuple(sorted(set(found.values())))


def _check_rows(
    vectors: Mapping[str, PersonaVector],
    layers: Sequence[int],
    kind: VectorKind,
    *,
    num_layers: int,
    notify: Notify,
) -> None:
    for name, vector in vectors.items():
        for layer in layers:
            vector.row(layer, kind=kind)
        normed = vector.metadata.get("last_row") == POST_FINAL_NORM
        if normed and num_layers in layers:
            notify(
                f"{name} was taken after the final norm at {describe_layer(num_layers)}, where "
                f"pvec projects the residual stream before it: do not compare the two"
            )


def _pool(
    captured: Iterable[SpanMeans], rows: Sequence[Sequence[TokenSpans]]
) -> Iterator[SpanMeans]:
    """Yield one ``SpanMeans`` per row: the mean over the tokens of all its turns' spans."""
    waiting = {f"{number}:0": sum(bool(s.token_ids) for s in r) for number, r in enumerate(rows)}
    weights = {s.id: {name: b - a for name, (a, b) in s.spans.items()} for r in rows for s in r}
    sums: dict[str, dict[SpanName, np.ndarray]] = {}
    totals: dict[str, dict[SpanName, int]] = {}
    for one in captured:
        row = one.id.partition(":")[0] + ":0"
        total, amount = sums.setdefault(row, {}), totals.setdefault(row, {})
        for span, mean in one.means.items():
            tokens = weights[one.id][span]
            part = np.nan_to_num(mean.astype(np.float64)) * tokens if not tokens else mean * tokens
            total[span] = total.get(span, 0.0) + part.astype(np.float64)
            amount[span] = amount.get(span, 0) + tokens
        waiting[row] -= 1
        if not waiting[row]:
            means = {
                span: value / amount[span] if amount[span] else np.full_like(value, np.nan)
                for span, value in sums.pop(row).items()
            }
            del totals[row]
            yield SpanMeans(id=row, layers=one.layers, means=means, norms={})
