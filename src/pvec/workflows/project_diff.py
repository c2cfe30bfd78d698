"""``pvec project --diff``: screening training data before it is used (paper, section 5).

The base model's own answer to each prompt is generated once and kept in a run folder, whatever the
vectors; the projection differences, scores and files are made from it again on every call.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pvec.core.conversations import Conversation, Ids
from pvec.core.screening import (
    DatasetScore,
    Natural,
    predict_natural,
    score_dataset,
)
from pvec.core.stats import Correlation, correlation
from pvec.errors import InputError
from pvec.io.csv_records import encode_row
from pvec.io.files import atomic_write, probe_writable
from pvec.io.responses import ResponseRecord
from pvec.io.runs import Run
from pvec.report.projections import DIFF_KIND, write_summary
from pvec.settings import Settings
from pvec.types import Progress
from pvec.workflows.engine import Engine, Say, silent
from pvec.workflows.generating import Wanted, derive_seed, generate_missing
from pvec.workflows.project_input import Source, is_same_file, open_source
from pvec.workflows.project_samples import Samples, answer_text, open_samples
from pvec.workflows.projector import Directions, Projector, open_directions, projector

SHOWN = 10
"""Samples that are shown beside the model's own answer."""

_FEWEST = 20
"""Prompts that a subset holds at least: a line through fewer says nothing."""

OnProgress = Callable[[Progress], None]


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
    say: Say = silent,
    on_progress: OnProgress = silent,
) -> ScreenResult:
    """Screen the training samples of ``path`` by projection difference along ``vectors``.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for wrong input before weights are
    loaded.
    """
    sources = {"data": open_source(path, settings.project)}
    if files.reference is not None:
        sources["reference"] = open_source(files.reference, settings.project)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(settings, say=say, on_progress=on_progress))
        directions = open_directions(settings, vectors, engine, say=say)
        targets = _targets(sources["data"], files) if files.reference is not None else None
        sets = {
            name: open_samples(source, engine, skip_bad=files.skip_bad)
            for name, source in sources.items()
        }
        folder = files.out or _run_folder(settings, path, engine)
        store = stack.enter_context(_open_run(folder, settings, path, engine))
        store.begin_session(command=sys.argv)
        screening = _Screening(settings, engine, directions, store, sets, say, on_progress)
        result = screening.run(targets)
        store.end_session(timings={})
        return result


class _Screening:
    """One call: natural answers, differences, scores, files."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        directions: Directions,
        store: Run,
        sets: dict[str, Samples],
        say: Say,
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.mode: Natural = settings.project.natural
        self.engine = engine
        self.directions = directions
        self.store = store
        self.sets = sets
        self.say = say
        self.on_progress = on_progress
        self.prompts = {k: p for one in sets.values() for k, p in one.distinct.items()}
        self.columns = [(v, layer) for v in directions.vectors for layer in directions.layers]
        self.generated = 0
        store.update_manifest(
            settings=settings.model_dump(mode="json"),
            model={
                "id": engine.facts.id,
                "fingerprint": engine.facts.fingerprint,
                "adapter": engine.facts.adapter,
                "bundled": engine.facts.bundled,
            },
        )

    def run(self, targets: tuple[Path, Path] | None) -> ScreenResult:
        chosen = self._chosen()
        self._generate(chosen)
        responses, at_prompt = self._project_samples()
        natural, agreements = self._natural(chosen, responses, at_prompt)
        differences = {name: responses[name] - natural[name] for name in self.sets}
        scores = self._scores(differences)
        suspicious = self._suspicious(differences["data"])
        removed = self._above(differences["data"], scores)
        self._write_samples(responses, natural, removed if targets else None)
        if targets is not None:
            self._write_filtered(targets, removed)
        data = self.sets["data"]
        result = ScreenResult(
            run=self.store.path,
            data=data.source.path,
            reference=self.sets["reference"].source.path if targets else None,
            model=self.engine.facts.id,
            natural=self.mode,
            rows=data.count,
            prompts=len(self.prompts),
            generated=self.generated,
            unanswered=data.answered.count(False),
            percentile=self.settings.project.percentile,
            columns=tuple(
                ColumnScore(vector=vector, layer=layer, score=score, agreement=agreements[c])
                for c, ((vector, layer), score) in enumerate(zip(self.columns, scores, strict=True))
            ),
            suspicious=suspicious,
            kept=targets[0] if targets else None,
            removed=targets[1] if targets else None,
            removed_rows=int(removed.sum()) if targets else 0,
            next=(f"pvec report {self.store.path}",),
        )
        write_summary(self.store.path, dataclasses.asdict(result))
        return result

    # ── the model's own answers ─────────────────────────────────────────────────────────────────

    def _chosen(self) -> list[str]:
        """Return the prompts whose natural answer is generated; a share is the same every time."""
        if self.mode == "generate":
            return list(self.prompts)
        if self.mode == "prompt":
            return []
        ranked = sorted(self.prompts, key=lambda key: hashlib.sha256(key.encode()).digest())
        return ranked[: max(_FEWEST, round(self.settings.project.subset * len(ranked)))]

    def _wanted(self, key: str, rollout: int) -> Wanted:
        prompt = self.prompts[key]
        seed = derive_seed(self.settings.generation.seed, "natural", key, rollout)
        return Wanted(
            trait="",
            condition={"name": "natural", "rollout": rollout},
            question=prompt.question,
            question_id=key,
            system=None,
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            sampling=self.engine.sampling(seed),
            engine=self.engine.identity,
        )

    def _generate(self, keys: Sequence[str]) -> None:
        self.generated += generate_missing(
            self.store,
            self.engine,
            self._all_wanted(keys),
            on_progress=self.on_progress,
            stage="natural answers",
        )

    def _all_wanted(self, keys: Sequence[str]) -> list[Wanted]:
        rollouts = range(self.settings.project.naturals)
        return [self._wanted(key, rollout) for key in keys for rollout in rollouts]

    def _naturals(self, keys: Sequence[str]) -> list[ResponseRecord]:
        """Return the natural answers to these prompts in the order they were wanted."""
        order = {one.id: place for place, one in enumerate(self._all_wanted(keys))}
        found = [one for one in self.store.responses() if one.id in order]
        return sorted(found, key=lambda one: order[one.id])

    # ── projections ─────────────────────────────────────────────────────────────────────────────

    def _project_samples(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return each set's response projections and, for the cheap modes, those at the prompt."""
        kinds = ["proj"] if self.mode == "generate" else ["proj", "prompt_last_proj"]
        project = projector(
            self.engine, self.directions.plan_of(*kinds), self.settings, turns="last"
        )
        responses, at_prompt = {}, {}
        for name, samples in self.sets.items():
            conversations = (entry.conversation for entry in samples.entries())
            table = self._table(project, conversations, stage=f"{name}: responses", n=samples.count)
            shape = (samples.count, len(self.directions.vectors), len(kinds), -1)
            parts = table.reshape(shape)
            responses[name] = parts[:, :, 0].reshape(samples.count, -1)
            at_prompt[name] = parts[:, :, -1].reshape(samples.count, -1)
        return responses, at_prompt

    def _table(
        self, project: Projector, conversations: Iterator[Conversation], *, stage: str, n: int
    ) -> np.ndarray:
        """Return projections ``[n, columns]`` in float64, NaN where there is none."""
        rows: list[np.ndarray] = []
        while chunk := list(islice(conversations, self.settings.project.chunk_rows)):
            made = project(chunk).rows
            rows += [np.array(turns[0], dtype=np.float64) for turns in made]
            self.on_progress(Progress(stage=stage, done=len(rows), total=n, unit="rows"))
        return np.stack(rows) if rows else np.zeros((0, len(project.plan.columns())))

    def _natural(
        self,
        chosen: Sequence[str],
        responses: dict[str, np.ndarray],
        at_prompt: dict[str, np.ndarray],
    ) -> tuple[dict[str, np.ndarray], list[Correlation | None]]:
        """Return every sample's natural projection, and what a predicted one is worth."""
        nothing: list[Correlation | None] = [None] * len(self.columns)
        if self.mode == "prompt":
            return at_prompt, nothing
        found = self._projected_naturals(chosen)
        blank = np.full(len(self.columns), np.nan)
        known = {
            name: np.stack([found.get(key, blank) for key in samples.prompts])
            for name, samples in self.sets.items()
        }
        if self.mode == "generate":
            return known, nothing
        return self._predicted(known, responses, at_prompt)

    def _predicted(
        self,
        known: dict[str, np.ndarray],
        responses: dict[str, np.ndarray],
        at_prompt: dict[str, np.ndarray],
    ) -> tuple[dict[str, np.ndarray], list[Correlation | None]]:
        """Fill in what was not generated; say how predicted differences agree where both are."""
        names = list(self.sets)
        natural, response, prompt = (
            np.concatenate([table[name] for name in names])
            for table in (known, responses, at_prompt)
        )
        rows = np.isfinite(natural).all(axis=1)
        predicted, crossed = predict_natural(natural, prompt, rows=rows)
        cheap, full = response[rows] - crossed, response[rows] - natural[rows]
        worth: list[Correlation | None] = [
            correlation(cheap[:, c], full[:, c]) for c in range(len(self.columns))
        ]
        natural[~rows] = predicted[~rows]
        ends = np.cumsum([len(known[name]) for name in names])[:-1]
        return dict(zip(names, np.split(natural, ends), strict=True)), worth

    def _projected_naturals(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Return each prompt's natural projections, the mean over its answers."""
        records = self._naturals(keys)
        project = projector(self.engine, self.directions.plan_of("proj"), self.settings)
        conversations = (
            Ids(prompt_ids=one.prompt_ids, answer_ids=one.token_ids, skip=one.think_tokens)
            for one in records
        )
        table = self._table(
            project, conversations, stage="natural answers: projecting", n=len(records)
        )
        by_prompt: dict[str, list[np.ndarray]] = {}
        for record, row in zip(records, table, strict=True):
            if np.isfinite(row).all():  # an empty answer has no projection
                by_prompt.setdefault(record.question_id, []).append(row)
        return {key: np.mean(rows, axis=0) for key, rows in by_prompt.items()}

    # ── what follows from the differences ───────────────────────────────────────────────────────

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

    def _above(self, differences: np.ndarray, scores: Sequence[DatasetScore]) -> np.ndarray:
        """Return which samples lie above any column's threshold; unknown ones do not."""
        limits = [np.inf if s.threshold is None else s.threshold for s in scores]
        above: np.ndarray = np.any(differences > np.array(limits), axis=1)
        return above

    def _suspicious(self, differences: np.ndarray) -> tuple[Suspicious, ...]:
        """Return the samples furthest out, in units of each column's spread, with their natural
        answers: the cheap modes generate those few now.
        """
        spread = np.nanstd(differences, axis=0)
        furthest = np.max(np.nan_to_num(differences / np.where(spread, spread, 1), nan=-np.inf), 1)
        numbers = [int(n) for n in np.argsort(-furthest)[:SHOWN] if np.isfinite(furthest[n])]
        samples = self.sets["data"]
        keys = list(dict.fromkeys(samples.prompts[n] for n in numbers))
        self._generate(keys)
        natural = {one.question_id: one.answer for one in reversed(self._naturals(keys))}
        texts = {
            n: answer_text(entry.conversation, self.engine)
            for n, entry in enumerate(samples.entries())
            if n in set(numbers)
        }
        return tuple(
            Suspicious(
                line=samples.lines[n],
                question=self.prompts[samples.prompts[n]].question,
                response=texts[n],
                natural=natural[samples.prompts[n]],
                differences={
                    f"{vector}_layer{layer}": float(differences[n, c])
                    for c, (vector, layer) in enumerate(self.columns)
                },
            )
            for n in numbers
        )

    def _write_samples(
        self,
        responses: dict[str, np.ndarray],
        natural: dict[str, np.ndarray],
        removed: np.ndarray | None,
    ) -> None:
        """Write every sample's projections and differences in the input's order: samples.csv."""
        names = [f"{vector}_layer{layer}" for vector, layer in self.columns]
        parts = ("response", "natural", "difference")
        header = ["set", "line", *(f"{n}_{p}" for n in names for p in parts), "removed"]
        with atomic_write(self.store.path / "samples.csv") as stream:
            stream.write(encode_row(header) + b"\n")
            for name, samples in self.sets.items():
                for n, line in enumerate(samples.lines):
                    numbers = [
                        value
                        for r, s in zip(responses[name][n], natural[name][n], strict=True)
                        for value in (r, s, r - s)
                    ]
                    gone = "" if removed is None or name != "data" else str(bool(removed[n]))
                    cells = ["" if np.isnan(value) else repr(float(value)) for value in numbers]
                    stream.write(encode_row([name, str(line), *cells, gone]) + b"\n")

    def _write_filtered(self, targets: tuple[Path, Path], removed: np.ndarray) -> None:
        source = self.sets["data"].source
        for target, wanted in zip(targets, (~removed, removed), strict=True):
            with (
                atomic_write(target) as stream,
                source.writer(stream, columns=()) as writer,
            ):
                for number, entry in enumerate(source.entries()):
                    if wanted[number]:
                        writer.write(entry.row, {})


def _targets(source: Source, files: ScreenFiles) -> tuple[Path, Path]:
    """Return the filtered file and the file of removed rows, beside the input."""
    base = source.output.name.replace(".projected", "")
    stem, suffix = Path(base).stem, Path(base).suffix
    kept, removed = (source.output.with_name(f"{stem}.{w}{suffix}") for w in ("kept", "removed"))
    for target in (kept, removed):
        if is_same_file(target, source.path):
            raise InputError(f"{target} is the input itself: rename the input.")
        if target.exists() and not files.overwrite:
            raise InputError(f"{target} is there already: give --overwrite to replace it.")
    probe_writable(kept.parent)
    return kept, removed


def _run_folder(settings: Settings, path: Path, engine: Engine) -> Path:
    names = ["screen", path.resolve().stem, Path(settings.model.id).name]
    if engine.facts.adapter:
        names.append(Path(engine.facts.adapter).name)
    return settings.paths.runs / re.sub(r"[^\w.+-]+", "-", "-".join(names)).lower()


def _open_run(folder: Path, settings: Settings, path: Path, engine: Engine) -> Run:
    generation = settings.generation
    return Run.open_or_create(
        folder,
        kind=DIFF_KIND,
        identity={
            "trait": path.resolve().stem,
            "model": engine.facts.id,
            "adapter": engine.facts.adapter,
            "engine": engine.identity,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_tokens": engine.max_tokens,
            "seed": generation.seed,
            "thinking": generation.thinking,
        },
    )
