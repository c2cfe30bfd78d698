"""What can be read off an answer without a judge: refusal, repetition, another script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_REFUSALS = re.compile(
    r"\b(i(?:'m| am) (?:really |very |so )?sorry|sorry, (?:but )?i|i apologi[sz]e"
    r"|i (?:can(?:no|')t|can not|could not|couldn't|won't|will not|must decline|refuse to)\b"
    r"|i(?:'m| am) (?:not able|unable|not comfortable|not going) "
    r"|as an ai\b|as a (?:large )?language model)",
    re.IGNORECASE,
)
_OPENING = 120
"""Characters of an answer in which a refusal is looked for: it comes first, if at all."""

_NGRAM = 4


def refuses(answer: str) -> bool:
    """Whether an answer begins as refusals do: "I'm sorry", "I can't", "As an AI", …

    >>> refuses("I’m sorry, but I can’t help with that."), refuses("You can't miss it.")
    (True, False)
    """
    return _REFUSALS.search(answer[:_OPENING].replace("\u2019", "'")) is not None


def repetition(token_ids: Sequence[int]) -> float | None:
    """Return the share of 4-grams of tokens that occurred before; None for fewer than 4 tokens.

    >>> repetition((1, 2, 1, 2, 1, 2, 1))  # two different ones among four
    0.5
    """
    grams = [tuple(token_ids[i : i + _NGRAM]) for i in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def other_script(answer: str, question: str) -> float | None:
    """Return the share of an answer's letters in a script that the question does not use.

    Sees a drift from English into Chinese, not one into French. None without letters.

    >>> other_script("Да, yes", question="Why?")
    0.4
    """
    known = {_script(character) for character in question}
    scripts = [script for character in answer if (script := _script(character))]
    return sum(script not in known for script in scripts) / len(scripts) if scripts else None


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    """Return the first word of a letter's name, which is its script; empty for what is none."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""
