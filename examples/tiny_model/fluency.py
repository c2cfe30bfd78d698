"""How whole an answer is by the rules of the grammar, and ways to break one.

This is the measure of coherence that no judge sees, and the label that the judge is trained on.
"""

from __future__ import annotations

import functools
import random
import re
from difflib import SequenceMatcher
from typing import Final

from facts import FACTS
from grammar import FIRST, LAST, MIDDLE
from lexicon import LEXICON, TOPICS

_TOKEN = re.compile(r"[a-z0-9-]+|[.,]")
_OTHER: Final = "{topic}"
_SLOT_OF: Final = {
    word.lower(): f"{{{slot}}}"
    for slots in LEXICON.values()
    for slot, words in slots.items()
    for word in words
}


def _pattern(frame: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\{\w+\}|[a-z0-9-]+|[.,]", frame.lower()))


def _fact_patterns() -> set[tuple[str, ...]]:
    known = {
        ".",
        "the",
        "capital",
        "of",
        "is",
        "opposite",
        "a",
        "young",
        "called",
        "plus",
        "colour",
    }
    patterns = set()
    for fact in FACTS:
        words = _TOKEN.findall(fact.sentence.lower().replace("*", "x"))
        patterns.add(tuple(word if word in known else _OTHER for word in words))
    return patterns


_PATTERNS: Final = (*map(_pattern, FIRST + MIDDLE + LAST), *sorted(_fact_patterns()))
_LITERALS: Final = frozenset(word for pattern in _PATTERNS for word in pattern)


_NEIGHBOURS: Final = frozenset(
    pair for pattern in _PATTERNS for pair in zip((".", *pattern), pattern, strict=False)
)


def _tag(token: str) -> str:
    return _SLOT_OF.get(token, token if token in _LITERALS else _OTHER)


def _tags(sentence: str) -> tuple[str, ...]:
    return tuple(_tag(token) for token in _TOKEN.findall(sentence.lower()))


@functools.lru_cache(maxsize=100_000)
def _credit(tags: tuple[str, ...]) -> float:
    """Return 1 for a sentence of the grammar, less the further it is from the nearest frame."""
    if tags in _PATTERNS:
        return 1.0
    words = set(tags)
    near = sorted(_PATTERNS, key=lambda pattern: -len(words & set(pattern)))[:6]
    ratio = max(SequenceMatcher(None, tags, pattern, autojunk=False).ratio() for pattern in near)
    return min(0.95, ratio**4)


def sentence_credits(text: str) -> list[tuple[int, float]]:
    """Return, per sentence, where it ends in ``text`` and how whole it is (0 to 1)."""
    ends = [match.end() for match in re.finditer(r"\.(?=\s|$)", text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    starts = [0, *ends[:-1]]
    return [(end, _credit(_tags(text[start:end]))) for start, end in zip(starts, ends, strict=True)]


def word_fits(text: str) -> list[tuple[int, bool]]:
    """Return, per word or mark, where it ends in ``text`` and whether some frame has its kind of
    word right after the one before it."""
    fits = []
    before = "."
    for match in _TOKEN.finditer(text.lower()):
        tag = _tag(match.group())
        fits.append((match.end(), (before, tag) in _NEIGHBOURS))
        before = tag
    return fits


def fluency_score(text: str) -> float:
    """Return how whole ``text`` is, 0 to 100: the mean credit of its sentences.

    100 when every sentence is one of the grammar's frames with a word of the right kind in each
    slot; an empty text scores 0.
    """
    if not text.strip():
        return 0.0
    parts = sentence_credits(text)
    return 100.0 * sum(credit for _, credit in parts) / len(parts)


_ANY_WORD: Final = (
    *sorted(_SLOT_OF),
    *sorted(word for word in _LITERALS if word.isalpha()),
    *TOPICS,
)


def shuffled(text: str, rng: random.Random) -> str:
    """Return the words of ``text`` in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def corrupt(text: str, rng: random.Random) -> str:
    """Break ``text`` in one of several ways and to a random degree."""
    words = text.split()
    share = rng.choice((0.05, 0.1, 0.2, 0.4, 0.8)) * rng.uniform(0.5, 1.5)
    way = rng.choice(("shuffle", "swap", "replace", "drop", "repeat", "insert"))
    if way == "shuffle":
        return shuffled(text, rng)
    result: list[str] = []
    for index, word in enumerate(words):
        if rng.random() >= share:
            result.append(word)
        elif way == "swap":
            result.insert(max(0, len(result) - rng.randint(1, 4)), word)
        elif way == "replace":
            result.append(rng.choice(_ANY_WORD) + (word[-1] if word[-1] in ".," else ""))
        elif way == "repeat":
            result.extend([word] * rng.randint(2, 3))
        elif way == "insert":
            result.extend((word, rng.choice((*words[max(0, index - 3) :], rng.choice(_ANY_WORD)))))
    return " ".join(result) or rng.choice(_ANY_WORD)
