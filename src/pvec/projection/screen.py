"""``pvec screen``: screening training data before it is used (paper, section 5).

The projection difference of a sample is the projection of its response minus that of the base
model's own response to the same prompt. Those are generated once and kept in a run folder, whatever
the vectors; differences, scores and files are made from them again on every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pvec.backends.planned import OnProgress
from pvec.backends.run_session import RunSession, use_run_date
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Chat, Ids, Pair
from pvec.judges.cost import rough_tokens
from pvec.judges.plan import RunPlan, plan_run
from pvec.notebook import HtmlResult
from pvec.projection import base_responses
from pvec.projection.base_responses import BaseResponses
from pvec.projection.inputs import (
    Prompt,
    Samples,
    Source,
    answer_text,
    open_run,
    open_samples,
    open_source,
    study_folder,
    study_identity,
)
from pvec.projection.output import filtered_paths, write_filtered
from pvec.projection.projector import LoadedVectors, open_vectors
from pvec.projection.screen_scores import (
    ColumnScore,
    by_column,
    choose_samples,
    furthest,
    project_samples,
    sample_kinds,
    score_columns,
    write_browsed,
)
from pvec.runs.files import atomic_write
from pvec.runs.summary import DIFF_KIND, write_summary
from pvec.settings import Settings
from pvec.types import DEFAULT_OUTPUT, OutputOptions

SAMPLES = "samples.csv"


@dataclass(frozen=True, kw_only=True)
class SuspiciousSample:
    """One of the samples that point furthest along a vector, beside the model's own answer."""

    line: int
    question: str
    response: str
    natural: str
    differences: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ScreenResult(HtmlResult):
    """The result of screening a file. ``kept`` and ``removed`` are the filtered file and the rest,
    None without a clean reference set.
    """

    run: Path
    data: Path
    reference: Path | None
    model: str
    natural: base_responses.Source
    rows: int
    prompts: int
    generated: int
    unanswered: int
    percentile: float
    columns: tuple[ColumnScore, ...]
    suspicious: tuple[SuspiciousSample, ...]
    kept: Path | None = None
    removed: Path | None = None
    removed_rows: int = 0
    next: tuple[str, ...] = ()


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    reference: Path | None = None,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ScreenResult:
    """Screen the training samples of ``path`` by projection difference along ``vectors``.

    ``reference`` is a clean file, whose percentile is the threshold of the filter; ``output`` names
    the run folder and whether filtered files are replaced. Raises ``InputError``, ``ModelError`` or
    ``StoreError`` for wrong input before weights are loaded.
    """
    sources = _sources(path, reference, settings)
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        loaded = open_vectors(session, vectors)
        targets, folder, sets = _checked(session, sources, output=output)
        identity = study_identity(session, path)
        with open_run(session, folder, kind=DIFF_KIND, identity=identity) as work:
            work.store.update_manifest(projection_axes=loaded.axes())
            result = _Screening(work, loaded, sets).run(targets)
            write_summary(folder, dataclasses.asdict(result))
    return result


def plan(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    reference: Path | None = None,
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
) -> RunPlan:
    """Say how many base responses ``run`` would generate; loads no weights and writes nothing.

    The cheap modes generate up to ten more, to the prompts of the samples that they show.
    """
    sources = _sources(path, reference, settings)
    with ModelSession(settings, notify=notify) as session:
        open_vectors(session, vectors)
        _, folder, sets = _checked(session, sources, output=output)
        prompts = _prompts(sets)
        keys = base_responses.chosen(prompts, settings.project)
        return plan_run(
            session,
            folder,
            kind=DIFF_KIND,
            identity=study_identity(session, path),
            planned=base_responses.planned_responses(session, [prompts[key] for key in keys]),
            metrics=(),
            judged=False,
            captures=True,
            further_tokens=sum(map(_rough_length, sets.values())),
        )


def _sources(path: Path, reference: Path | None, settings: Settings) -> dict[str, Source]:
    paths = {"data": path, **({} if reference is None else {"reference": reference})}
    return {name: open_source(place, settings.project) for name, place in paths.items()}


def _checked(
    session: ModelSession, sources: Mapping[str, Source], *, output: OutputOptions
) -> tuple[tuple[Path, Path] | None, Path, dict[str, Samples]]:
    """Return where filtered rows go, the run folder, and the samples; raises what is wrong."""
    targets, data = None, sources["data"]
    if "reference" in sources:
        targets = filtered_paths(data, overwrite=output.overwrite)
    folder = study_folder(session, "screen", path=data.path, out=output.out)
    use_run_date(session, folder)
    return (
        targets,
        folder,
        {
            name: open_samples(source, session, skip_bad=output.skip_bad)
            for name, source in sources.items()
        },
    )


def _prompts(sets: Mapping[str, Samples]) -> dict[str, Prompt]:
    return {key: prompt for samples in sets.values() for key, prompt in samples.distinct.items()}


def _rough_length(samples: Samples) -> int:
    """Estimate the tokens of the samples, whose texts are not tokenised before they are needed."""
    return sum(
        len(conversation.prompt_ids) + len(conversation.answer_ids)
        if isinstance(conversation, Ids)
        else rough_tokens(_full_text(conversation))
        for conversation in samples.conversations()
    )


def _full_text(conversation: Chat | Pair) -> str:
    if isinstance(conversation, Pair):
        return conversation.prompt + conversation.answer
    return "".join(message["content"] for message in conversation.messages)


class _Screening:
    """One call: base responses, differences, scores, files.

    Arrays are ``[samples, columns]`` over the samples of all files, a column per vector and layer.
    """

    def __init__(self, work: RunSession, vectors: LoadedVectors, sets: dict[str, Samples]) -> None:
        import pandas as pd

        self.session = work.session
        self.store = work.store
        self.folder = work.store.path
        self.vectors = vectors
        self.sets = sets
        self.frame = pd.concat(
            pd.DataFrame({"set": name, "line": samples.lines, "prompt": samples.prompts})
            for name, samples in sets.items()
        )
        self.screened = (self.frame["set"] == "data").to_numpy()
        self.base = BaseResponses(work, vectors, _prompts(sets))
        self.options = work.settings.project

    def run(self, targets: tuple[Path, Path] | None) -> ScreenResult:
        self.base.generate(base_responses.chosen(self.base.prompts, self.options))
        responses, at_prompt = project_samples(
            self.session,
            self.vectors.plan_of(*sample_kinds(self.base.source)),
            chain.from_iterable(samples.conversations() for samples in self.sets.values()),
            total=len(self.frame),
        )
        prompts = self.frame["prompt"].to_numpy()
        base, agreements = self.base.projections(prompts.tolist(), responses, at_prompt)
        differences = responses - base
        columns = score_columns(
            self.vectors.columns,
            differences[self.screened],
            prompts=prompts[self.screened].tolist(),
            clean=differences[~self.screened] if targets else None,
            clean_prompts=prompts[~self.screened].tolist(),
            percentile=self.options.percentile,
            agreements=agreements,
        )
        data, removed = self.sets["data"], None
        thresholds = (column.score.threshold for column in columns)
        limits = np.array([np.inf if limit is None else limit for limit in thresholds])
        suspicious = self._shown(differences[self.screened], limits)
        if targets is not None:
            removed = np.any(differences[self.screened] > limits, axis=1)  # not unknown ones
            write_filtered(targets, data.source, removed=removed)
        self._write_samples(responses, base, removed)
        return ScreenResult(
            run=self.folder,
            data=data.source.path,
            reference=self.sets["reference"].source.path if targets else None,
            model=self.session.metadata.id,
            natural=self.base.source,
            rows=len(data.prompts),
            prompts=len(self.base.prompts),
            generated=self.base.generated,
            unanswered=data.answered.count(False),
            percentile=self.options.percentile,
            columns=columns,
            suspicious=suspicious,
            kept=targets[0] if targets else None,
            removed=targets[1] if targets else None,
            removed_rows=0 if removed is None else int(removed.sum()),
            next=(f"pvec report {self.folder}",),
        )

    def _shown(self, differences: np.ndarray, limits: np.ndarray) -> tuple[SuspiciousSample, ...]:
        """Return the samples furthest out, in units of each column's spread, with the base model's
        answers (the cheap modes generate those few now), and write those that are kept for reading.
        """
        numbers = furthest(differences)
        samples, prompts = self.sets["data"], self.base.prompts
        shown = self.base.generate(list(dict.fromkeys(samples.prompts[n] for n in numbers)))
        records = [*shown, *self.store.responses()]  # of several to one prompt, the first
        answers = {record.question_id: record.answer for record in reversed(records)}
        browsed = choose_samples(differences, limits)
        needed = {*numbers, *browsed}
        texts = {
            n: answer_text(conversation, self.session)
            for n, conversation in enumerate(samples.conversations())
            if n in needed
        }
        write_browsed(self.folder, samples, {n: texts[n] for n in browsed}, natural=answers)
        return tuple(
            SuspiciousSample(
                line=samples.lines[n],
                question=prompts[samples.prompts[n]].question,
                response=texts[n],
                natural=answers[samples.prompts[n]],
                differences=by_column(self.vectors.columns, differences[n]),
            )
            for n in numbers
        )

    def _write_samples(
        self, responses: np.ndarray, base: np.ndarray, removed: np.ndarray | None
    ) -> None:
        """Write ``samples.csv``: every sample's projections and differences in the input's order.

        ``removed`` says which samples of the set ``data`` were, None without a threshold.
        """
        frame = self.frame.drop(columns="prompt")
        for c, (vector, layer) in enumerate(self.vectors.columns):
            response, own = responses[:, c], base[:, c]
            parts = {"response": response, "natural": own, "difference": response - own}
            for part, values in parts.items():
                frame[f"{vector}_layer{layer}_{part}"] = values
        marks = np.full(len(frame), "", dtype=object)
        if removed is not None:
            marks[self.screened] = removed
        frame["removed"] = marks
        with atomic_write(self.folder / SAMPLES, mode="w") as stream:
            frame.to_csv(stream, index=False)
