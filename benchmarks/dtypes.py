"""How far a model's vectors, projections and scores in bfloat16 lie from those in float32.

    pvec extract --trait optimistic --model FOLDER --dtype float32 --judge-model contrast --out RUN
    python benchmarks/dtypes.py RUN --model FOLDER

The answers of an extraction are captured and measured by the contrast judge's formula twice, in
either number format; nothing but the format differs. Vectors are compared by the cosine of each
layer, projections on the float32 vector by their error as a share of the distance between positive
and negative answers, and scores, calibrated on float32's measurements, by their mean difference
with a 95 % interval over questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser_of

from pvec.backends.hf.backend import HFBackend
from pvec.judges.calibration import Measured, TraitFit, fit
from pvec.judges.contrast import other_systems
from pvec.models.chat import prompt_ids, spans_from_ids
from pvec.models.files import ModelSpec
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.stats import paired_difference
from pvec.traits.trait import Trait
from pvec.types import Message, Sign, VectorKind
from pvec.vectors.accumulate import SPAN_OF_KIND

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """What one format gave: ``means[kind]`` is ``[answers, L + 1, H]``, ``s`` ``[answers]``."""

    means: Mapping[VectorKind, np.ndarray]
    s: np.ndarray


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=2, help="instruction pairs of the judge")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that the judge measures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run.read(args.run)
    (trait,) = run.traits()
    records = [record for record in run.responses() if record.token_ids]
    signs: list[Sign] = ["pos" if r.condition["sign"] == "pos" else "neg" for r in records]
    exact, short = (
        measured(args.model, dtype, trait, records, pairs=args.pairs, tokens=args.tokens)
        for dtype in ("float32", "bfloat16")
    )
    positive = np.array([sign == "pos" for sign in signs])
    print(f"{args.model}: {len(records)} answers, {int(positive.sum())} of them positive")
    for kind in SPAN_OF_KIND:
        compare(kind, exact.means[kind], short.means[kind], positive)
    scores(trait.name, exact.s, short.s, signs, [record.question for record in records])


def measured(
    model: str, dtype: Any, trait: Trait, records: Sequence[ResponseRecord], *, pairs: int,
    tokens: int,
) -> Found:  # fmt: skip
    """Capture and judge the answers in one number format."""
    with HFBackend(ModelSpec(model=model, dtype=dtype)) as backend:
        rows = {
            row.id: row
            for row in backend.capture(
                spans_from_ids(r.id, prompt_ids=r.prompt_ids, answer_ids=r.token_ids)
                for r in records
            )
        }
        means = {
            kind: np.stack([rows[record.id].means[span] for record in records])
            for kind, span in SPAN_OF_KIND.items()
        }
        return Found(means, contrasts(backend, trait, records, pairs=pairs, tokens=tokens))


def contrasts(
    backend: HFBackend, trait: Trait, records: Sequence[ResponseRecord], *, pairs: int, tokens: int
) -> np.ndarray:
    """Return s of every answer, in nats per token."""
    queries: list[Pair] = []
    for record in records:
        asked: Message = {"role": "user", "content": record.question}
        for both in other_systems(trait, record)[:pairs]:
            for system in both:
                said: Message = {"role": "system", "content": system}
                ids = prompt_ids(backend.tokenizer, [said, asked])
                queries.append((ids, record.token_ids[:tokens]))
    found = dict(backend.answer_logprobs(queries))
    means = np.array([found[number].mean() for number in range(len(queries))], dtype=float)
    return (means[0::2] - means[1::2]).reshape(len(records), -1).mean(axis=1)


def compare(kind: str, exact: np.ndarray, short: np.ndarray, positive: np.ndarray) -> None:
    """Print the cosine of the vectors by layer, and the error of the projections."""
    ours = exact[positive].mean(axis=0) - exact[~positive].mean(axis=0)  # [L + 1, H]
    theirs = short[positive].mean(axis=0) - short[~positive].mean(axis=0)
    lengths = np.linalg.norm(ours, axis=1)
    layers = np.flatnonzero(lengths > 0.0)
    cosine = (ours * theirs).sum(axis=1)[layers] / (
        lengths[layers] * np.linalg.norm(theirs, axis=1)[layers]
    )
    unit = ours[layers] / lengths[layers, None]
    along, shorter = (np.einsum("nlh,lh->nl", rows[:, layers], unit) for rows in (exact, short))
    error = np.abs(shorter - along) / lengths[layers]  # lengths: between the classes' means
    worst = int(layers[cosine.argmin()])
    print(
        f"{kind}: cosine {cosine.min():.5f} (layer {worst}) to {cosine.max():.5f}; error of a "
        f"projection, as a share of what lies between the classes: median {np.median(error):.4f}, "
        f"95 % below {np.quantile(error, 0.95):.4f}, largest {error.max():.4f}"
    )


def scores(
    trait: str, exact: np.ndarray, short: np.ndarray, signs: Sequence[Sign], questions: list[str]
) -> None:
    """Print how far the calibrated scores are apart."""
    rows = zip(questions, signs, exact, strict=True)
    chosen = fit(trait, [Measured(question=q, sign=g, raw={"contrast": s}) for q, g, s in rows])
    assert isinstance(chosen, TraitFit)
    ours, theirs = (
        np.array([chosen.score({"contrast": float(s)}) for s in values])
        for values in (exact, short)
    )
    apart = paired_difference(theirs, groups=questions, baseline=ours, baseline_groups=questions)
    print(
        f"scores: bfloat16 - float32 = {apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}], "
        f"largest of one answer {np.abs(theirs - ours).max():.1f}; "
        f"{int(((theirs >= 50.0) != (ours >= 50.0)).sum())} of {len(ours)} on another side of 50"
    )


if __name__ == "__main__":
    main()
