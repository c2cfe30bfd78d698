"""How well the contrast judge agrees with other judges, and how fast it is.

    python benchmarks/contrast.py published --data DIR --model MODEL
        the published answers of Qwen3-4B that GPT-4.1-mini judged (DIR/reference)
    python benchmarks/contrast.py bundled
        all traits on the bundled model: against the count of trait words and the bundled judge
    python benchmarks/contrast.py speed --model MODEL
        beside a plain loop: one forward pass for each answer and prompt

``published`` gives rank correlation and AUC by instruction pairs and tokens used; an answer is never
scored with the pair it was given under, and a calibrated score comes from a fit on the answers to
other questions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pvec.backends.base import Backend
from pvec.backends.hf.backend import HFBackend
from pvec.data.judged_csv import JudgedAnswer, read_judged_csv
from pvec.judges.calibration import Measured, cross_fitted
from pvec.models.chat import encode_pair, prompt_ids
from pvec.models.template import render_prompt
from pvec.stats import auc, correlation
from pvec.traits.trait import Trait, load_trait
from pvec.types import SIGNS, Message, Sign

Pair = tuple[tuple[int, ...], tuple[int, ...]]
REFERENCE_FILES = {sign: f"qwen3-4b_evil_{sign}_sample.csv" for sign in SIGNS}
TOKENS = (8, 16, 32, 64, 128)
THRESHOLD = 50.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("published", "bundled", "speed"):
        command = commands.add_parser(name)
        command.add_argument("--model", default="tiny")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--tokens", type=int, default=64)
        command.add_argument("--data", type=Path, default=Path("data"))
        command.add_argument("--answers", type=int, default=0, help="0: all of them")
        command.add_argument("--trait", default=None, help="instructions of this trait instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"published": published, "bundled": bundled, "speed": speed}[options.command](options)


# -- answers that GPT-4.1-mini judged --------------------------------------------------------------


def published(options: argparse.Namespace) -> None:
    """Compare with the published scores, by pairs and tokens."""
    reference = options.data / "reference"
    trait = load_trait(options.trait or reference / "evil_extract.json")
    answers: list[tuple[Sign, JudgedAnswer]] = [
        (sign, answer)
        for sign in SIGNS
        for answer in read_judged_csv(reference / REFERENCE_FILES[sign], trait="evil")
    ]
    if options.answers:
        answers = answers[:: max(len(answers) // options.answers, 1)]
    backend = HFBackend(options.model)
    started = time.process_time()
    table = differences(backend, trait, [answer for _, answer in answers], tokens=options.tokens)
    seconds = time.process_time() - started
    print(
        f"{options.model}: {len(answers)} answers, {len(trait.instructions)} pairs, first "
        f"{options.tokens} tokens: {seconds:.0f} CPU s, {len(answers) / seconds:.2f} answers/s"
    )
    scores = np.array([answer.trait_score for _, answer in answers], dtype=float)
    positive = np.array([sign == "pos" for sign, _ in answers])
    print("pairs tokens  Spearman  [95 %]          AUC at 50  among positive: Spearman  AUC")
    for pairs in range(1, len(trait.instructions)):
        for tokens in TOKENS:
            if tokens <= options.tokens:
                s = contrast(table, trait, answers, pairs=pairs, tokens=tokens)
                _show(f"{pairs:5d} {tokens:6d}", s, scores, positive)
    s = contrast(table, trait, answers, pairs=len(trait.instructions), tokens=options.tokens)
    measured = {
        str(number): Measured(question=answer.question, sign=sign, raw={"contrast": value})
        for number, ((sign, answer), value) in enumerate(zip(answers, s, strict=True))
    }
    fitted = cross_fitted("evil", measured)
    calibrated = np.array([fitted[name] for name in measured])
    _show("calibrated  ", calibrated, scores, positive)
    agree = float(((calibrated >= THRESHOLD) == (scores >= THRESHOLD)).mean())
    for name, group in (("positive", positive), ("negative", ~positive)):
        print(
            f"{name}: mean score {calibrated[group].mean():.1f} (GPT-4.1-mini "
            f"{scores[group].mean():.1f}), kept by the filter "
            f"{int(((calibrated >= THRESHOLD) == (name == 'positive'))[group].sum())} of "
            f"{int(group.sum())}"
        )
    print(f"same side of 50: {agree:.0%}")


def _show(label: str, s: np.ndarray, scores: np.ndarray, positive: np.ndarray) -> None:
    everything = correlation(s, scores, method="spearman")
    inside = correlation(s[positive], scores[positive], method="spearman")
    high = scores >= THRESHOLD
    print(
        f"{label}  {everything.r:8.2f}  [{everything.low:.2f}, {everything.high:.2f}]  "
        f"{auc(s[high], s[~high]):9.2f}  {inside.r:24.2f}  "
        f"{auc(s[positive & high], s[positive & ~high]):.2f}"
    )


def differences(
    backend: Backend, trait: Trait, answers: Sequence[JudgedAnswer], *, tokens: int
) -> list[np.ndarray]:
    """Return for each answer log P(token | positive) - log P(token | negative), ``[pairs, T]``."""
    pairs: list[Pair] = []
    for answer in answers:
        text = answer.answer.rpartition("</think>")[2].strip()
        pairs += prompts_and_answer(backend, trait, answer.question, text, tokens=tokens)
    found = dict(backend.answer_logprobs(pairs))
    rows = [found[number] for number in range(len(pairs))]
    width = 2 * len(trait.instructions)
    return [
        np.stack(rows[start : start + width : 2]) - np.stack(rows[start + 1 : start + width : 2])
        for start in range(0, len(rows), width)
    ]


def prompts_and_answer(
    backend: Backend, trait: Trait, question: str, answer: str, *, tokens: int
) -> Iterator[Pair]:
    """Yield the answer after each of the trait's system prompts: positive, negative, positive …"""
    asked: Message = {"role": "user", "content": question}
    encoded = encode_pair(
        backend.tokenizer, prompt=render_prompt(backend.tokenizer, [asked]), answer=answer
    )
    ids = encoded.token_ids[encoded.prompt_length :][:tokens]
    for number in range(len(trait.instructions)):
        for sign in SIGNS:
            system: Message = {"role": "system", "content": trait.system_prompt(sign, number)}
            yield prompt_ids(backend.tokenizer, [system, asked]), ids


def contrast(
    table: Sequence[np.ndarray],
    trait: Trait,
    answers: Sequence[tuple[Sign, JudgedAnswer]],
    *,
    pairs: int,
    tokens: int,
) -> np.ndarray:
    """Return s of each answer: its first ``tokens``, the first ``pairs`` pairs but its own."""
    values = []
    for rows, (sign, answer) in zip(table, answers, strict=True):
        others = [
            number
            for number, pair in enumerate(trait.instructions)
            if (pair.pos if sign == "pos" else pair.neg) not in answer.prompt
        ]
        values.append(rows[others[:pairs], :tokens].mean())
    return np.array(values)


# -- the bundled model -----------------------------------------------------------------------------


def bundled(options: argparse.Namespace) -> None:
    raise SystemExit("not yet")


# -- speed -----------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Time pvec and a plain loop on the same pairs in this process, in CPU seconds."""
    raise SystemExit("not yet")


Clock = Callable[[], float]

if __name__ == "__main__":
    main()
