"""``pvec project --diff``: screening training data before it is used (paper, section 5).

The base model's own answer to each prompt is generated once and kept in a run folder, whatever the
vectors; the projection differences, scores and files are made from it again on every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec.backends.planned import OnProgress
from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.projection.base_responses import Naturals
from pvec.projection.inputs import open_source
from pvec.projection.projector import Directions, open_directions, project_table, projector
from pvec.projection.samples import Samples, answer_text, open_samples
from pvec.projection.screened import filtered_paths, write_filtered, write_samples
from pvec.projection.screening import DatasetScore, Natural, score_dataset
from pvec.projection.study import open_study, study_folder, study_identity
from pvec.runs.store import Run
from pvec.runs.summary import DIFF_KIND, write_summary
from pvec.settings import Settings
from pvec.stats import Correlation

SHOWN = 10
"""Samples that are shown beside the model's own answer."""


@dataclass(frozen=True, kw_only=True)
class ColumnScore:
    """The data set on one vector at one layer, and for ``--natural subset`` how well the predicted
    differences agree with generated ones on this data.
    """

    vector: str
    layer: int
    score: DatasetScore
    agreement: Correlation | None = None


@dataclass(frozen=True, kw_only=True)
class Suspicious:
    """One of the samples that point furthest along a vector, beside the model's own answer."""

    line: int
    question: str
    response: str
    natural: str
    differences: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ScreenResult:
    """What screening a file found. ``kept`` and ``removed`` are the filtered file and the rest,
    None without a clean reference set.
    """

    run: Path
    data: Path
    reference: Path | None
    model: str
    natural: Natural
    rows: int
    prompts: int
    generated: int
    unanswered: int
    percentile: float
    columns: tuple[ColumnScore, ...]
    suspicious: tuple[Suspicious, ...]
    kept: Path | None = None
    removed: Path | None = None
    removed_rows: int = 0
    next: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScreenFiles:
    """Where screening reads and writes: the clean ``reference`` file, the run folder ``out``;
    ``overwrite`` replaces filtered files that are there, ``skip_bad`` leaves unreadable rows out.
    """

    reference: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    skip_bad: bool = False


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    files: ScreenFiles = ScreenFiles(),
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ScreenResult:
    """Screen the training samples of ``path`` by projection difference along ``vectors``.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for wrong input before weights are
    loaded.
    """
    sources = {"data": open_source(path, settings.project)}
    if files.reference is not None:
        sources["reference"] = open_source(files.reference, settings.project)
    with ExitStack() as stack:
        session = stack.enter_context(
            ModelSession(settings, notify=notify, on_progress=on_progress)
        )
        directions = open_directions(settings, vectors, session, notify=notify)
        targets = None
        if files.reference is not None:
            targets = filtered_paths(sources["data"], overwrite=files.overwrite)
        sets = {
            name: open_samples(source, session, skip_bad=files.skip_bad)
            for name, source in sources.items()
        }
        folder = files.out or study_folder(settings, session, kind="screen", path=path)
        identity = study_identity(session, path=path)
        store = stack.enter_context(open_study(folder, kind=DIFF_KIND, identity=identity))
        store.begin_session(**manifest_sections(session))
        screening = _Screening(settings, session, directions, store, sets, on_progress)
        result = screening.run(targets)
        store.end_session(timings={})
        return result


class _Screening:
    """One call: natural answers, differences, scores, files."""

    def __init__(
        self,
        settings: Settings,
        session: ModelSession,
        directions: Directions,
        store: Run,
        sets: dict[str, Samples],
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.session = session
        self.directions = directions
        self.store = store
        self.sets = sets
        self.on_progress = on_progress
        self.naturals = Naturals(settings, session, directions, store, sets, on_progress)
        self.columns = [(v, layer) for v in directions.vectors for layer in directions.layers]

    def run(self, targets: tuple[Path, Path] | None) -> ScreenResult:
        self.naturals.generate(self.naturals.chosen())
        responses, at_prompt = self._project_samples()
        natural, agreements = self.naturals.projections(responses, at_prompt)
        differences = {name: responses[name] - natural[name] for name in self.sets}
        scores = self._scores(differences)
        suspicious = self._suspicious(differences["data"])
        removed = _above(differences["data"], scores) if targets is not None else None
        write_samples(
            self.store.path,
            self.sets,
            columns=self.columns,
            responses=responses,
            natural=natural,
            removed=removed,
        )
        if targets is not None and removed is not None:
            write_filtered(targets, self.sets["data"].source, removed=removed)
        columns = tuple(
            ColumnScore(vector=vector, layer=layer, score=score, agreement=agreement)
            for (vector, layer), score, agreement in zip(
                self.columns, scores, agreements, strict=True
            )
        )
        result = self._result(targets, columns, suspicious, removed)
        write_summary(self.store.path, dataclasses.asdict(result))
        return result

    def _project_samples(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return each set's response projections and, for the cheap modes, those at the prompt."""
        cheap = self.naturals.mode != "generate"
        kinds = ["proj", "prompt_last_proj"] if cheap else ["proj"]
        project = projector(
            self.session, self.directions.plan_of(*kinds), self.settings, turns="last"
        )
        responses, at_prompt = {}, {}
        for name, samples in self.sets.items():
            table = project_table(
                project,
                (entry.conversation for entry in samples.entries()),
                total=samples.count,
                chunk_rows=self.settings.project.chunk_rows,
                stage=f"{name}: responses",
                on_progress=self.on_progress,
            )
            shape = (samples.count, len(self.directions.vectors), len(kinds), -1)
            parts = table.reshape(shape)
            responses[name] = parts[:, :, 0].reshape(samples.count, -1)
            at_prompt[name] = parts[:, :, -1].reshape(samples.count, -1)
        return responses, at_prompt

    def _scores(self, differences: dict[str, np.ndarray]) -> list[DatasetScore]:
        clean = self.sets.get("reference")
        return [
            score_dataset(
                differences["data"][:, c],
                prompts=self.sets["data"].prompts,
                clean=differences["reference"][:, c] if clean else None,
                clean_prompts=clean.prompts if clean else (),
                percentile=self.settings.project.percentile,
            )
            for c in range(len(self.columns))
        ]

    def _suspicious(self, differences: np.ndarray) -> tuple[Suspicious, ...]:
        """Return the samples furthest out, in units of each column's spread, with their natural
        answers: the cheap modes generate those few now.
        """
        spread = np.nanstd(differences, axis=0)
        furthest = np.max(np.nan_to_num(differences / np.where(spread, spread, 1), nan=-np.inf), 1)
        numbers = [int(n) for n in np.argsort(-furthest)[:SHOWN] if np.isfinite(furthest[n])]
        samples, prompts = self.sets["data"], self.naturals.prompts
        keys = list(dict.fromkeys(samples.prompts[n] for n in numbers))
        self.naturals.generate(keys)
        natural = {one.question_id: one.answer for one in reversed(self.naturals.answers(keys))}
        texts = {
            n: answer_text(entry.conversation, self.session)
            for n, entry in enumerate(samples.entries())
            if n in set(numbers)
        }
        return tuple(
            Suspicious(
                line=samples.lines[n],
                question=prompts[samples.prompts[n]].question,
                response=texts[n],
                natural=natural[samples.prompts[n]],
                differences={
                    f"{vector}_layer{layer}": float(differences[n, c])
                    for c, (vector, layer) in enumerate(self.columns)
                },
            )
            for n in numbers
        )

    def _result(
        self,
        targets: tuple[Path, Path] | None,
        columns: tuple[ColumnScore, ...],
        suspicious: tuple[Suspicious, ...],
        removed: np.ndarray | None,
    ) -> ScreenResult:
        data = self.sets["data"]
        return ScreenResult(
            run=self.store.path,
            data=data.source.path,
            reference=self.sets["reference"].source.path if targets else None,
            model=self.session.metadata.id,
            natural=self.naturals.mode,
            rows=data.count,
            prompts=len(self.naturals.prompts),
            generated=self.naturals.generated,
            unanswered=data.answered.count(False),
            percentile=self.settings.project.percentile,
            columns=columns,
            suspicious=suspicious,
            kept=targets[0] if targets else None,
            removed=targets[1] if targets else None,
            removed_rows=0 if removed is None else int(removed.sum()),
            next=(f"pvec report {self.store.path}",),
        )


def _above(differences: np.ndarray, scores: Sequence[DatasetScore]) -> np.ndarray:
    """Return which samples lie above any column's threshold; unknown ones do not."""
    limits = [np.inf if s.threshold is None else s.threshold for s in scores]
    above: np.ndarray = np.any(differences > np.array(limits), axis=1)
    return above
