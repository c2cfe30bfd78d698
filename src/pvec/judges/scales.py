"""From what a judge answered to a score between 0 and 100.

The score is the probability-weighted mean over the number tokens of the judge's first token
(paper, appendix B). When less than ``LEAST_MASS`` of the probability lies on valid answers, the
score is missing and the status says why; it is never 0. Pure functions: no network, no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pvec.types import JudgeScale, ScoreStatus

LEAST_MASS = 0.25
"""Below this probability on valid answers a score would rest on the tail of the distribution."""

REFUSAL_OPENINGS = ("REFUSAL", "Refusal", "I", "I'm", "Sorry", "Unfortunately")
"""What a refusal begins with; a number never does."""

_TOP: Mapping[JudgeScale, int] = {"0-100": 100, "0-10": 10}
_VERDICTS: Mapping[str, float] = {"YES": 100.0, "NO": 0.0}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A score from 0 to 100, or the reason for having none."""

    score: float | None
    status: ScoreStatus = "ok"
    detail: str = ""


def reply_values(scale: JudgeScale) -> dict[str, float]:
    """Return the replies that count on ``scale`` and the score (0-100) that each stands for."""
    if scale in _TOP:
        top = _TOP[scale]
        return {str(number): 100.0 * number / top for number in range(top + 1)}
    return dict(_VERDICTS)


def read_tokens(tokens: Iterable[tuple[str, float]], *, scale: JudgeScale) -> Reading:
    """Read a score from the ``(token, probability)`` pairs of one output position."""
    pairs = list(tokens)
    values = reply_values(scale)
    unknown = [token for token, probability in pairs if math.isnan(probability)]
    if any(_as_reply(token) in values for token in unknown):
        detail = f"the server gave no probability for {unknown[0]!r}"
        return Reading(score=None, status="unparsable", detail=detail)
    pairs = [pair for pair in pairs if pair[0] not in unknown]
    masses: dict[str, float] = {}
    for token, probability in pairs:
        reply = _as_reply(token)
        if reply in values:
            masses[reply] = masses.get(reply, 0.0) + probability
    reading = read_masses(masses, scale=scale)
    if reading.score is not None or not pairs:
        return reading
    likeliest = max(pairs, key=lambda pair: pair[1])[0]
    status: ScoreStatus = "refusal" if _opens_refusal(likeliest) else "unparsable"
    detail = f"{reading.detail}; most likely token {likeliest!r}"
    return Reading(score=None, status=status, detail=detail)


def read_masses(masses: Mapping[str, float], *, scale: JudgeScale) -> Reading:
    """Read a score from the probability of each valid reply (keys of ``reply_values``)."""
    values = reply_values(scale)
    total = math.fsum(masses.values())
    if total < LEAST_MASS:
        detail = f"only {total:.0%} of the probability is on valid answers"
        return Reading(score=None, status="unparsable", detail=detail)
    weighted = math.fsum(values[reply] * mass for reply, mass in masses.items())
    return Reading(score=min(max(weighted / total, 0.0), 100.0))


def read_text(text: str, *, scale: JudgeScale) -> Reading:
    """Read a score from a written answer; a think block before it is ignored.

    A single number counts ("75", "**75**/100", "Score: 75"); two different ones are unparsable
    unless one of them is labelled. ``binary-text`` looks for ``<answer>YES</answer>`` first.
    """
    written = _without_thinking(text).strip()
    score = _number(written, top=_TOP[scale]) if scale in _TOP else _verdict(written)
    if score is not None:
        return Reading(score=score)
    shown = repr(written if len(written) <= 60 else written[:57] + "...")
    if _is_refusal(written):
        return Reading(score=None, status="refusal", detail=f"the judge wrote {shown}")
    detail = f"the judge wrote {shown}" if written else "the judge wrote nothing"
    return Reading(score=None, status="unparsable", detail=detail)


def mean_reading(readings: Sequence[Reading]) -> Reading:
    """Return the mean of several readings of one answer; missing when half of them are.

    >>> mean_reading([Reading(score=40.0), Reading(score=60.0)]).score
    50.0
    """
    scores = [reading.score for reading in readings if reading.score is not None]
    missing = next((reading for reading in readings if reading.score is None), None)
    if missing is None:
        detail = next((reading.detail for reading in readings if reading.detail), "")
        return Reading(score=math.fsum(scores) / len(scores), detail=detail)
    if 2 * len(scores) <= len(readings):
        return missing
    detail = f"mean of {len(scores)} of {len(readings)} replies ({missing.detail})"
    return Reading(score=math.fsum(scores) / len(scores), detail=detail)


# -- tokens -----------------------------------------------------------------------------------


def _as_reply(token: str) -> str:
    """Return the reply a token stands for: " 75" is 75, "Yes" is YES."""
    word = token.strip()
    if word.isascii() and word.isdigit():
        return word.lstrip("0") or "0"
    return word.upper()


def _opens_refusal(token: str) -> bool:
    word = token.strip()
    # A tokenizer may split the word: "REF" + "USAL".
    return word in REFUSAL_OPENINGS or (len(word) >= 2 and "REFUSAL".startswith(word.upper()))


# -- text -------------------------------------------------------------------------------------

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_NUMBER = r"(?<![\w.])(-?\d+(?:\.\d+)?)(?!\w|\.\d)"
_LABELLED = re.compile(r"(?:score|rating|answer)\b\W{0,6}(?:is\W{0,4}|of\W{0,4})?" + _NUMBER, re.I)
_ANSWER_TAG = re.compile(r"<answer>\s*(\w+)\s*</answer>", re.IGNORECASE)
_REFUSING = re.compile(
    r"\W*(sorry|unfortunately|i(?:'|\u2019)?m (?:sorry|unable|not able)|i am (?:sorry|unable)"
    r"|i can(?:'|\u2019)?t|i cannot|i won(?:'|\u2019)?t|as an ai)\b",
    re.IGNORECASE,
)


def _without_thinking(text: str) -> str:
    if "</think>" in text and "<think>" not in text:  # the opening tag was part of the prompt
        return text.rsplit("</think>", 1)[1]
    return _THINKING.sub("", text)


def _number(text: str, *, top: int) -> float | None:
    found = _LABELLED.findall(text) or re.findall(_NUMBER, re.sub(rf"/\s*{top}\b", " ", text))
    numbers = {float(number) for number in found}
    if len(numbers) != 1:
        return None
    value = numbers.pop()
    return 100.0 * value / top if 0 <= value <= top else None


def _verdict(text: str) -> float | None:
    tagged: list[str] = _ANSWER_TAG.findall(text)
    word = tagged[-1] if tagged else text.strip(" .!*\n")
    return _VERDICTS.get(word.upper())


def _is_refusal(text: str) -> bool:
    tagged: list[str] = _ANSWER_TAG.findall(text)
    return "REFUSAL" in text or "refusal" in map(str.lower, tagged) or bool(_REFUSING.match(text))


# -- the digit tree -----------------------------------------------------------------------------


class ReplyTree:
    """The probability of each reply of a scale, exact for any way a tokenizer splits it.

    ``paths[reply]`` are the token ids of a reply. A reply that another one extends ("7" and "75",
    split into digits) is complete only when none of the extensions follows:
    P(reply is 7) = P("7") - P("7", "0") - ... - P("7", "9"). With one token per number nothing is
    subtracted, so both kinds of tokenizer are scored alike, and what follows a whole number (an end
    token, a full stop) does not matter, as it does not with a server's first-token logprobs.
    """

    def __init__(self, paths: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
        self.continuations: list[tuple[int, ...]] = []
        self._replies: list[str] = []
        owner: dict[tuple[int, ...], int] = {}
        for reply, spellings in paths.items():
            for path in spellings:
                if path not in owner:
                    owner[path] = len(self.continuations)
                    self.continuations.append(path)
                    self._replies.append(reply)
        self._parents = [_parent(path, owner) for path in self.continuations]

    def masses(self, logprobs: Sequence[float]) -> dict[str, float]:
        """Return P(reply) from ``logprobs[c]`` = log P(``continuations[c]`` | prompt)."""
        reached = [math.exp(logprob) for logprob in logprobs]
        complete = list(reached)
        for child, parent in enumerate(self._parents):
            if parent is not None:
                complete[parent] -= reached[child]
        masses: dict[str, float] = {}
        for reply, mass in zip(self._replies, complete, strict=True):
            # Rounding can leave a hair below zero.
            masses[reply] = masses.get(reply, 0.0) + max(mass, 0.0)
        return masses


def _parent(path: tuple[int, ...], owner: Mapping[tuple[int, ...], int]) -> int | None:
    """Return the index of the longest reply that ``path`` extends."""
    for length in range(len(path) - 1, 0, -1):
        if path[:length] in owner:
            return owner[path[:length]]
    return None
