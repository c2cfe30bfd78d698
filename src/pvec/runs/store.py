"""The run store: a folder that holds everything a job has made, finished line by finished line.

``manifest.json`` says what the run is, ``responses.jsonl`` and ``scores.jsonl`` grow as answers and
scores finish, ``vectors/`` and the CSV exports are made from them (docs/formats.md).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pvec.closing import Closing
from pvec.documents import misfit, read_record
from pvec.errors import InputError, StoreError, did_you_mean
from pvec.runs.files import atomic_write, probe_writable, writer_lock
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.manifest import (
    TRAITS,
    manifest_to_continue,
    new_manifest,
    read_manifest,
    refuse_foreign,
    timestamp,
    write_manifest,
)
from pvec.runs.responses import CONDITIONS, Json, ResponseRecord
from pvec.runs.secrets import safe_command
from pvec.traits.trait import Trait, load_trait
from pvec.types import Score

if TYPE_CHECKING:
    import pandas as pd

_LOCK = ".lock"


class Run(Closing):
    """One run folder, opened to be read (``Run.read``) or to be continued (``open_or_create``).

    A run that is open for writing is a context manager and the folder's only writer. ``notes``
    collects what had to be repaired on opening, to be shown to the user.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], resources: ExitStack | None) -> None:
        """Use ``Run.read`` or ``Run.open_or_create`` instead."""
        self.path = path
        self.manifest = manifest
        self._resources = resources
        self._seconds: dict[str, float] = {}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Open a run to read it. Raises ``StoreError`` when ``path`` is not a run folder."""
        return cls(Path(path), read_manifest(Path(path)), None)

    @classmethod
    def open_or_create(
        cls, path: str | Path, *, identity: Mapping[str, Json], kind: str = "extract"
    ) -> Self:
        """Open the run in ``path`` for writing, or begin one there.

        ``identity`` is what makes two runs different; the caller leaves out what may grow or change
        harmlessly. Raises ``StoreError``, before anything is overwritten, when the folder holds
        something else or a run of another identity (naming what differs), when another process
        writes it, and when the disk is read-only or nearly full.
        """
        folder = Path(path)
        identity = {"kind": kind, **identity}
        refuse_foreign(folder)
        probe_writable(folder)
        with ExitStack() as resources:
            resources.enter_context(writer_lock(folder / _LOCK))
            manifest = manifest_to_continue(folder, identity)
            if manifest is None:
                write_manifest(folder, new_manifest(kind=kind, identity=identity))
                manifest = read_manifest(folder)
            return cls(folder, manifest, resources.pop_all())

    @classmethod
    def preview(
        cls, path: str | Path, *, identity: Mapping[str, Json], kind: str = "extract"
    ) -> Self | None:
        """Return the run that ``open_or_create`` would continue, to be read; None for a new one.

        Leaves nothing behind. Raises ``StoreError`` for a folder that ``open_or_create`` would
        refuse.
        """
        folder = Path(path)
        refuse_foreign(folder)
        places = (folder, *folder.absolute().parents)
        probe_writable(next(place for place in places if place.exists()))
        manifest = manifest_to_continue(folder, {"kind": kind, **identity})
        return None if manifest is None else cls(folder, manifest, None)

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """Open the run in ``path`` for writing, whatever it is. Raises ``StoreError``."""
        recorded = read_manifest(Path(path))
        return cls.open_or_create(path, kind=recorded["kind"], identity=recorded["identity"])

    @property
    def kind(self) -> str:
        """What made the run: ``extract``, ``steer-eval``, …"""
        return str(self.manifest["kind"])

    @property
    def notes(self) -> list[str]:
        """What was repaired on opening, one sentence each. Opens the logs that are there."""
        logs = {"responses.jsonl": "_response_log", "scores.jsonl": "_score_log"}
        there = [getattr(self, log) for name, log in logs.items() if (self.path / name).exists()]
        return [log.note for log in there if log.note]

    # ── the manifest ────────────────────────────────────────────────────────────────────────────

    def update_manifest(self, **sections: Any) -> None:
        """Set top-level sections (``settings=…, model=…``) and write the manifest, atomically."""
        reserved = {"format", "format_version", "kind", "created", "identity"} & sections.keys()
        assert not reserved, f"these parts of a manifest never change: {reserved}"
        self._require_writable()
        self.manifest.update(sections)
        write_manifest(self.path, self.manifest)

    def begin_session(self, *, command: Sequence[str] | None = None, **sections: Any) -> None:
        """Note that a process has begun to work on the run; ``end_session`` notes how it ended.

        ``command`` is its own command line by default; ``sections`` go into the manifest too.
        """
        argv = safe_command(sys.argv if command is None else command)
        session: dict[str, Any] = {"command": argv, "started": timestamp(), "ended": None}
        self._seconds = {}
        self.update_manifest(**sections, sessions=[*self.manifest["sessions"], session])

    def end_session(self, *, timings: Mapping[str, float] | None = None) -> None:
        """Note that the session's work is done; ``timings`` are seconds per stage (``stage``)."""
        sessions: list[dict[str, Any]] = self.manifest["sessions"]
        seconds = dict(self._seconds if timings is None else timings)
        ended = {**sessions[-1], "ended": timestamp(), "timings": seconds}
        self.update_manifest(sessions=[*sessions[:-1], ended])

    @contextmanager
    def session(self, **sections: Any) -> Iterator[None]:
        """Work on the run: begin a session, and end it unless the block raises."""
        self.begin_session(**sections)
        yield
        self.end_session()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a block as those of stage ``name`` of the session."""
        started = time.perf_counter()
        yield
        seconds = self._seconds.get(name, 0.0) + time.perf_counter() - started
        self._seconds[name] = round(seconds, 3)

    # ── the traits that its answers are about ───────────────────────────────────────────────────

    def keep_traits(self, traits: Sequence[Trait]) -> None:
        """Keep the definitions of ``traits`` in the run, so that it can be judged anywhere."""
        for trait in traits:
            text = json.dumps(trait.to_json(), indent=2, ensure_ascii=False)
            with atomic_write(self.path / TRAITS / f"{trait.name}.json", mode="w") as stream:
                stream.write(text + "\n")

    def traits(self) -> list[Trait]:
        """Return the traits that the answers are scored on, by name.

        Raises ``StoreError`` when the run keeps none.
        """
        traits = [load_trait(path) for path in sorted((self.path / TRAITS).glob("*.json"))]
        if not traits:
            raise StoreError(
                f"{self.path} keeps no trait definition: run the command that made it again."
            )
        return traits

    # ── responses and scores ────────────────────────────────────────────────────────────────────

    def append_response(self, record: ResponseRecord) -> None:
        """Keep a finished answer; once this returns, a kill cannot lose it."""
        self._response_log.append(record.to_json())

    def append_score(self, score: Score) -> None:
        """Keep a finished judgement; once this returns, a kill cannot lose it."""
        line = dataclasses.asdict(score)
        if score.raw is None:
            del line["raw"]
        self._score_log.append(line)

    def responses(self) -> Iterator[ResponseRecord]:
        """Yield the answers in the order in which they finished, one at a time."""
        path = self.path / "responses.jsonl"
        condition = CONDITIONS.get(self.manifest["kind"], dict)
        for number, data in read_jsonl(path):
            try:
                wrong = misfit(data.get("condition"), condition)
                if wrong is not None:
                    raise ValueError(
                        f"its condition has no {wrong!r}, or another kind of value there"
                    )
                yield ResponseRecord.from_json(data)
            except ValueError as exc:
                raise _bad_line(path, number, exc) from None

    def scores(self) -> Iterator[Score]:
        """Yield the judgements as they were written; of two with the same id the later counts."""
        path = self.path / "scores.jsonl"
        for number, data in read_jsonl(path):
            try:
                yield read_record(Score, data)
            except ValueError as exc:
                raise _bad_line(path, number, exc) from None

    def response_ids(self) -> set[str]:
        """Return the ids of all finished answers."""
        return {str(data.get("id")) for _, data in read_jsonl(self.path / "responses.jsonl")}

    def scored_ids(self) -> set[str]:
        """Return the ids of judgements that need no repeating: all but those that ended in error.

        A refusal or an unparsable reply is a judgement; a judge that could not be reached is not.
        """
        return {score.id for score in self._latest_scores() if score.status != "error"}

    def failed_ids(self) -> set[str]:
        """Return the ids of judgements that ended in error and are to be repeated."""
        return {score.id for score in self._latest_scores() if score.status == "error"}

    def judges(self) -> list[str]:
        """Return the judges that scored something here, in the order of their first score."""
        return list(dict.fromkeys(score.judge for score in self.scores()))

    def choose_judge(self, judge: str | None = None) -> str | None:
        """Return ``judge`` if it scored here, or the only judge there is; None without scores.

        Raises ``InputError`` for a judge that scored nothing here, and when several judges did and
        none was named.
        """
        judges = self.judges()
        if judge is None:
            if len(judges) > 1:
                raise InputError(
                    f"{self.path} was scored by {len(judges)} judges ({', '.join(judges)}); "
                    "say which one counts."
                )
            return judges[0] if judges else None
        if judge not in judges:
            raise InputError(
                f"{self.path} has no scores by {judge!r}.{did_you_mean(judge, judges)} "
                f"It was scored by: {', '.join(judges) or 'nobody yet'}."
            )
        return judge

    def scores_by_response(self, *, judge: str | None = None) -> dict[str, dict[str, Score]]:
        """Return ``{response id: {metric: score}}`` of one judge (see ``choose_judge``)."""
        judge = self.choose_judge(judge)
        table: dict[str, dict[str, Score]] = {}
        for score in self._latest_scores():
            if score.judge == judge:
                table.setdefault(score.response_id, {})[score.metric] = score
        return table

    def frame(self, *, judge: str | None = None) -> pd.DataFrame:
        """Return one row per answer with its scores: everything but the token ids.

        A ``condition`` becomes columns ``condition.NAME``. Each metric of the judge is a float
        column (NaN where it is missing) beside ``METRIC_status``, which is ``"unscored"`` for an
        answer that was never judged.
        """
        import pandas as pd

        scores = self.scores_by_response(judge=judge)
        metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
        rows = [_frame_row(r, scores.get(r.id, {}), metrics) for r in self.responses()]
        return pd.DataFrame(rows)

    # ── files made from them ────────────────────────────────────────────────────────────────────

    def vector_path(self, trait: str) -> Path:
        """Return where the vector of ``trait`` is kept."""
        return self.path / "vectors" / f"{trait}.safetensors"

    def csv_path(self, name: str) -> Path:
        """Return where the CSV export called ``name`` (``evil_pos``) is kept."""
        return self.path / f"{name}.csv"

    # ── opening and closing ─────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Bring everything to the disk and let the next writer in. Closing twice is harmless."""
        if self._resources is not None:
            self._resources.close()
            self._resources = None

    @cached_property
    def _response_log(self) -> JsonlLog:
        return self._log("responses.jsonl")

    @cached_property
    def _score_log(self) -> JsonlLog:
        return self._log("scores.jsonl")

    def _log(self, name: str) -> JsonlLog:
        return self._require_writable().enter_context(JsonlLog(self.path / name))

    def _require_writable(self) -> ExitStack:
        assert self._resources is not None, "this run was opened with Run.read"
        return self._resources

    def _latest_scores(self) -> Iterator[Score]:
        """Yield one score per id: a judgement that failed at first may have been repeated."""
        yield from {score.id: score for score in self.scores()}.values()


def _frame_row(
    record: ResponseRecord, scores: Mapping[str, Score], metrics: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": record.id,
        "trait": record.trait,
        **{f"condition.{key}": value for key, value in record.condition.items()},
        "question_id": record.question_id,
        "question": record.question,
        "system": record.system,
        "prompt": record.prompt,
        "answer": record.answer,
        "answer_tokens": len(record.token_ids),
        "think_tokens": record.think_tokens,
        "finish_reason": record.finish_reason,
        "seed": record.seed,
    }
    for metric in metrics:
        score = scores.get(metric)
        missing = score is None or score.score is None
        row[metric] = float("nan") if missing else score.score  # type: ignore[union-attr]
        row[f"{metric}_status"] = score.status if score else "unscored"
    return row


def _bad_line(path: Path, number: int, exc: Exception) -> StoreError:
    return StoreError(
        f"{path}:{number} is not a line that pvec wrote ({exc}); restore the file from a copy, or "
        "delete that line and run the same command again to redo it."
    )
