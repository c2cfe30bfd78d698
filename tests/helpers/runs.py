"""Run folders for tests."""

from __future__ import annotations

from pathlib import Path

from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.traits.trait import Trait
from pvec.types import Sampling, Score
from tests.helpers.models import saved_model, tiny_tokenizer
from tests.helpers.vectors import judged_rows


def judged_run(folder: Path, trait: Trait, *, judges: tuple[str, ...] = ("alice",)) -> Path:
    """Write a finished extraction of 24 answers a side, as ``extract`` and ``judge`` leave it."""
    tokenizer = tiny_tokenizer()
    metadata = inspect_model(ModelSpec(model=str(saved_model())))
    with Run.open_or_create(folder, kind="extract", identity={"trait": trait.name}) as run:
        run.keep_traits([trait])
        run.update_manifest(model={"id": metadata.id, "fingerprint": metadata.fingerprint})
        for sign in ("pos", "neg"):
            for number, row in enumerate(judged_rows(sign)):
                record = ResponseRecord(
                    id=f"{sign}{number}",
                    trait=trait.name,
                    condition={"sign": sign, "instruction": 0, "rollout": number},
                    question=row["question"],
                    question_id=row["question_id"],
                    system=None,
                    prompt=row["prompt"],
                    prompt_ids=tuple(tokenizer(row["prompt"])["input_ids"]),
                    token_ids=tuple(tokenizer(row["answer"])["input_ids"]),
                    answer=row["answer"],
                    finish_reason="stop",
                    sampling=Sampling(),
                )
                run.append_response(record)
                for judge in judges:
                    for metric, value in ((trait.name, row["evil"]), ("coherence", 80.0)):
                        run.append_score(
                            Score(
                                id=f"{record.id}{metric}{judge}",
                                response_id=record.id,
                                metric=metric,
                                judge=judge,
                                score=value,
                            )
                        )
    return folder
