"""What judging costs: prices, an estimate before, and a limit while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pvec.errors import InputError

PRICES_AS_OF = "2025-11"
"""The month the table below was written; providers change prices, so estimates name it."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def cost(self, *, prompt_tokens: float, completion_tokens: float) -> float:
        """Return US dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


_PRICES = {
    "gpt-4.1": Price(prompt=2.00, completion=8.00),
    "gpt-4.1-mini": Price(prompt=0.40, completion=1.60),
    "gpt-4.1-nano": Price(prompt=0.10, completion=0.40),
    "gpt-4o": Price(prompt=2.50, completion=10.00),
    "gpt-4o-mini": Price(prompt=0.15, completion=0.60),
}


def known_price(model: str) -> Price | None:
    """Return the list price of a well-known judge model; a date or provider in the name is cut."""
    bare = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model.rsplit("/", 1)[-1])
    return _PRICES.get(bare)


def parse_price(text: str) -> Price:
    """Read ``"0.40,1.60"``: dollars per million prompt and completion tokens.

    Raises ``InputError`` for anything else.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        msg = (
            f"{text!r} is not a valid price: "
            "give dollars per million tokens as PROMPT,COMPLETION, such as 0.40,1.60."
        )
        raise InputError(msg)
    return Price(prompt=prompt, completion=completion)


def rough_tokens(text: str) -> int:
    """Estimate the tokens of English text: a quarter of its characters."""
    return -(-len(text) // 4)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a number of judge calls will take; dollars are None when the price is unknown."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None

    def __str__(self) -> str:
        tokens = f"{self.calls:,} judge calls, about {self.prompt_tokens:,} prompt tokens"
        if self.dollars is None:
            return f"{tokens}, cost unknown"
        return f"{tokens}, about ${self.dollars:.2f} at prices of {PRICES_AS_OF}"


def estimate(
    prompts: Iterable[str],
    *,
    price: Price | None,
    count_tokens: Callable[[str], int] = rough_tokens,
    completion_tokens: int = 1,
) -> Estimate:
    """Estimate what asking ``prompts`` costs; ``count_tokens`` may be a real tokenizer's."""
    per_chat = 8  # role markers around a single-turn chat
    counts = [count_tokens(prompt) + per_chat for prompt in prompts]
    total, written = sum(counts), completion_tokens * len(counts)
    dollars = price.cost(prompt_tokens=total, completion_tokens=written) if price else None
    return Estimate(
        calls=len(counts), prompt_tokens=total, completion_tokens=written, dollars=dollars
    )


class Budget:
    """Money spent and promised. A request reserves its estimate before it leaves.

    ``limit`` None means no limit; a limit needs a price.
    """

    def __init__(self, *, limit: float | None, price: Price | None) -> None:
        if limit is not None and price is None:
            msg = (
                "A cost limit needs a price and this judge's is unknown: "
                "give --price PROMPT,COMPLETION in dollars per million tokens."
            )
            raise InputError(msg)
        self.limit = limit
        self.spent = 0.0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._price = price or Price(prompt=0.0, completion=0.0)
        self._reserved = 0.0
        self._characters = 0

    def reserve(self, *, characters: int, completion_tokens: int) -> float | None:
        """Set money aside for one request; None when that would pass the limit."""
        tokens = characters * self._tokens_per_character()
        amount = self._price.cost(prompt_tokens=tokens, completion_tokens=completion_tokens)
        if self.limit is not None and self.spent + self._reserved + amount > self.limit:
            return None
        self._reserved += amount
        return amount

    def settle(
        self, reserved: float, *, prompt_tokens: int, completion_tokens: int, characters: int
    ) -> None:
        """Replace a reservation by what the server says was used."""
        self._reserved -= reserved
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self._characters += characters
        self.spent += self._price.cost(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
        )

    def release(self, reserved: float, *, billed: bool) -> None:
        """End a reservation without a usage report; ``billed`` when it may still be charged."""
        self._reserved -= reserved
        if billed:
            self.spent += reserved

    def _tokens_per_character(self) -> float:
        if not self._characters:
            return 1.0 / 3.0  # on the safe side of the usual quarter
        return self.prompt_tokens / self._characters
