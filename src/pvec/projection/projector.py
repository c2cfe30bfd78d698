"""Projections of conversations on one loaded model: what every kind of projecting shares.

``pvec project`` hands it chunks of a file, the library a list, Ray's workers their blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.session import ModelSession, ignore
from pvec.data.conversations import Conversation
from pvec.data.spans import Counts, SpanMaker, Turns, pool_turns
from pvec.errors import InputError
from pvec.models.decoder import describe_layer
from pvec.types import SIGNS, Progress, SpanMeans, TokenSpans, VectorKind
from pvec.vectors.files import find_vector, load_vectors, vector_name
from pvec.vectors.projection import ProjectionPlan
from pvec.vectors.quality import suggest_layer, suggest_prompt_layer
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pvec.backends.base import Backend

CLASS_PLACES = tuple(f"proj_{what}_{sign}" for what in ("response", "prompt") for sign in SIGNS)
"""Statistics of a vector file: where its positive and negative answers and prompts lie along it."""

_AT_ONCE = 64
"""Rows whose activations are projected together; few enough that theirs is little memory."""

Values = tuple[float | None, ...]
"""One row's projections in the order of the plan's columns; None where there is no token."""

Suggest = Callable[..., int]
"""Chooses the layer of a vector, and a ``kind`` of it, where none was asked for."""


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Projections of several conversations: ``rows[i]`` holds one tuple per turn that counts.

    ``refused`` says of the rows that have none what the chat template has against them. ``tokens``
    holds the answers' single tokens by row and turn, where they were wanted.
    """

    rows: list[list[Values]]
    counts: Counts
    refused: dict[int, str]
    tokens: list[AnswerTokens] = field(default_factory=list)

    def require_all(self) -> list[list[Values]]:
        """Return the rows. Raises ``InputError`` that names the first one that was refused."""
        for number, reason in self.refused.items():
            raise InputError(f"Conversation {number + 1} is refused: {reason}")
        return self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedVectors:
    """The vectors of a command, by the name their columns carry, and the layers."""

    vectors: Mapping[str, PersonaVector]
    kind: VectorKind
    layers: tuple[int, ...]

    def plan_of(self, *kinds: str) -> ProjectionPlan:
        """Return the plan of these types of projection."""
        rows = {name: vector.kind(self.kind) for name, vector in self.vectors.items()}
        return ProjectionPlan.make(rows, layers=self.layers, kinds=kinds)  # type: ignore[arg-type]

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Every vector at every layer, in the order of one kind's columns."""
        return [(vector, layer) for vector in self.vectors for layer in self.layers]

    def axes(self) -> dict[str, dict[str, float]]:
        """Return what a projection on each vector at each layer is measured against, where its file
        says so: ``residual_norm``, and the mean projections of the extraction's answers
        and prompts (``CLASS_PLACES``).
        """
        known = {}
        for name, layer in self.columns:
            vector = self.vectors[name]
            rows = {"residual_norm": vector.mean_norm} if vector.mean_norm is not None else {}
            if self.kind == vector.main_kind:
                rows |= {key: vector.stats[key] for key in CLASS_PLACES if key in vector.stats}
            values = {key: float(row[layer]) for key, row in rows.items()}
            known[f"{name}_layer{layer}"] = {k: v for k, v in values.items() if math.isfinite(v)}
        return known

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these vectors from others of the same names."""
        return {name: vector.fingerprint for name, vector in self.vectors.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerTokens:
    """One answer, token by token: ``values`` is float32 ``[tokens, vectors * layers]``.

    The first ``think`` tokens are its reasoning, where that is projected apart.
    """

    row: int
    turn: int
    token_ids: tuple[int, ...]
    values: np.ndarray
    think: int = 0


class Projector:
    """Projects conversations on the vectors of a plan; one forward pass serves all of it.

    ``limit`` is the number of tokens the model reads (None: any); longer rows lose the beginning
    of their prompt, which is counted. With ``tokens`` the same pass keeps the projections of every
    token of the answers.
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
        tokens: bool = False,
    ) -> None:
        self.plan = plan
        self._directions = plan.units if tokens else None
        self._columns = plan.units.shape[0] * plan.units.shape[1]
        self._tokens: list[AnswerTokens] = []
        self._backend = backend
        self._pooled = turns == "all"
        self._spans = SpanMaker(
            tokenizer=tokenizer, needed=plan.spans, turns=turns, thinking=thinking, limit=limit
        )

    def __call__(
        self, conversations: Sequence[Conversation], *, on_done: Callable[[int], None] = ignore
    ) -> Projections:
        """Return the projections of every conversation; ``on_done`` hears of finished sequences."""
        located = self._spans(conversations)
        self._tokens = []
        values: dict[str, Values] = {}
        for identity, row in self._values(located.rows):
            values[identity] = row
            on_done(len(values))
        empty: Values = (None,) * len(self.plan.columns())
        rows = [
            [values.get(f"{number}:{turn}", empty) for turn in range(self._turns(spans))]
            for number, spans in enumerate(located.rows)
        ]
        self._tokens.sort(key=lambda answer: (answer.row, answer.turn))
        return Projections(
            rows=rows, counts=located.counts, refused=located.refused, tokens=self._tokens
        )

    def _turns(self, spans: Sequence[TokenSpans]) -> int:
        return min(len(spans), 1) if self._pooled else len(spans)

    def _values(self, rows: Sequence[Sequence[TokenSpans]]) -> Iterator[tuple[str, Values]]:
        sequences = (span for spans in rows for span in spans if span.token_ids)
        captured: Iterable[SpanMeans] = self._backend.capture(
            sequences, layers=self.plan.layers, directions=self._directions
        )
        if self._directions is not None:
            captured = self._kept(captured, rows)
        if self._pooled:
            captured = pool_turns(captured, rows)
        remaining = iter(captured)
        while batch := list(islice(remaining, _AT_ONCE)):
            yield from self._project(batch)

    def _kept(
        self, captured: Iterable[SpanMeans], rows: Sequence[Sequence[TokenSpans]]
    ) -> Iterator[SpanMeans]:
        """Keep the tokens of what goes by."""
        for item in captured:
            row, turn = map(int, item.id.split(":"))
            sequence = rows[row][turn]
            assert item.along is not None
            self._tokens.append(
                AnswerTokens(
                    row=row,
                    turn=turn,
                    token_ids=sequence.token_ids[slice(*sequence.answer_tokens)],
                    think=sequence.spans["response"][0] - sequence.answer_tokens[0],
                    values=item.along.swapaxes(1, 2).reshape(len(item.along), self._columns),
                )
            )
            yield item

    def _project(self, batch: Sequence[SpanMeans]) -> Iterator[tuple[str, Values]]:
        means = {span: np.stack([item.means[span] for item in batch]) for span in self.plan.spans}
        table = self.plan.values(means)
        for sequence, row in zip(batch, table.tolist(), strict=True):
            yield sequence.id, tuple(None if value != value else value for value in row)  # noqa: PLR0124


def projector(
    session: ModelSession,
    plan: ProjectionPlan,
    *,
    turns: Turns | None = None,
    tokens: bool = False,
) -> Projector:
    """Return the projector of a command; its first use loads the model."""
    return Projector(
        session.backend,
        plan,
        tokenizer=session.metadata.tokenizer,
        turns=turns or session.settings.project.turns,
        thinking=session.thinking,
        limit=session.metadata.context,
        tokens=tokens,
    )


def project_table(
    session: ModelSession,
    plan: ProjectionPlan,
    conversations: Iterable[Conversation],
    *,
    total: int,
    stage: str,
) -> np.ndarray:
    """Return the last turns' projections ``[conversations, columns]`` in float64, NaN where there
    is none. ``stage`` names the progress; the user is told of rows that were cut or think.
    """
    project, remaining = projector(session, plan, turns="last"), iter(conversations)
    rows: list[Values] = []
    counts = Counts()
    while chunk := list(islice(remaining, session.settings.project.chunk_rows)):
        projections = project(chunk)
        rows += [turns[0] for turns in projections.require_all()]
        counts += projections.counts
        session.on_progress(Progress(stage=stage, done=len(rows), total=total, unit="rows"))
    # Rows without an answer are the caller's to tell: prompts alone have none.
    for note in replace(counts, empty=0, unanswered=0).notes:
        session.notify(f"{stage}: {note}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(plan.columns()))


def open_vectors(
    session: ModelSession, names: Sequence[str | Path], *, suggest: Suggest | None = None
) -> LoadedVectors:
    """Load the vector files that ``names`` stand for and check them against the model.

    Columns carry a file's stem, with the kind where it is not the file's main one. Layers are
    those of the settings, else what each file suggests by ``suggest`` (``suggested_layer`` unless
    told otherwise). No weights are loaded. Raises ``InputError`` for two vectors of one name or a
    layer that a file lacks, ``ModelError`` for a vector of another model.
    """
    if not names:
        raise InputError("No vector was named: give --vector FILE (`pvec extract` makes one).")
    options = session.settings.project
    kind = options.kind
    vectors: dict[str, PersonaVector] = {}
    loaded = load_vectors(
        names,
        model=session.metadata,
        same_model=options.same_model,
        layer=options.layers[0] if len(options.layers) == 1 else None,
        notify=session.notify,
    )
    for path in map(find_vector, names):
        vector = loaded[path]
        lone = len(vector.kinds) == 1
        chosen = vector.main_kind if lone else kind
        vector.kind(chosen)
        name = vector_name(path)
        if not lone and kind != "response_avg":
            name = f"{name}_{kind}"
        if name in vectors:
            raise InputError(
                f"Two vector files are called {name!r}, and so would be their columns: rename one."
            )
        vectors[name] = _as_kind(vector, chosen, kind)
    layers = _layers(session, vectors, suggest or suggested_layer)
    _check_rows(session, vectors, layers)
    return LoadedVectors(vectors=vectors, kind=kind, layers=layers)


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


def _as_kind(vector: PersonaVector, own: VectorKind, kind: VectorKind) -> PersonaVector:
    """Return a vector whose ``kind`` is the one that its file holds."""
    if own == kind:
        return vector
    return PersonaVector(
        trait=vector.trait, kinds={kind: vector.kind(own)}, metadata=vector.metadata
    )


def _layers(
    session: ModelSession, vectors: Mapping[str, PersonaVector], suggest: Suggest
) -> tuple[int, ...]:
    options = session.settings.project
    if options.layers:
        return tuple(dict.fromkeys(options.layers))
    suggestions = {name: suggest(vector, kind=options.kind) for name, vector in vectors.items()}
    listed = ", ".join(f"{layer} as {name} suggests" for name, layer in suggestions.items())
    session.notify(f"layers: {listed}")
    return tuple(sorted(set(suggestions.values())))


def _check_rows(
    session: ModelSession, vectors: Mapping[str, PersonaVector], layers: Sequence[int]
) -> None:
    last = session.metadata.num_layers
    for name, vector in vectors.items():
        for layer in layers:
            vector.row(layer, kind=session.settings.project.kind)
        if vector.last_row_is_normed and last in layers:
            session.notify(
                f"{name} was taken after the final norm at {describe_layer(last)}, where pvec "
                f"projects the residual stream before it: do not compare the two"
            )
