"""What judging costs: prices, an estimate before, and a limit while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, TypeAdapter, ValidationError

from pvec.documents import read_json
from pvec.errors import InputError
from pvec.judges.reply import Usage

OWN_PRICES = Path(__file__).with_name("prices.json")
"""Prices by provider and model, with their date and source; providers change them."""


_MOST_DENSE = 1.0 / 3.0
"""Tokens per character, on the safe side of the usual quarter."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens. ``origin`` says where the price is from, and of when."""

    prompt: float
    completion: float
    origin: str = field(default="the price given", compare=False)

    def cost(self, *, prompt_tokens: float, completion_tokens: float) -> float:
        """Return US dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6

    def discounted(self, factor: float, reason: str) -> Price:
        """Return this price times ``factor``, for a ``reason`` that estimates name."""
        origin = f"{self.origin}, {reason}"
        return Price(
            prompt=factor * self.prompt, completion=factor * self.completion, origin=origin
        )


class _Provider(BaseModel):
    """The prices of one provider: ``models`` maps a name to dollars per million prompt and
    completion tokens, ``batch`` is what its batch endpoint charges of them.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    as_of: str
    batch: float = Field(default=0.5, gt=0, le=1)
    models: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]]


def known_price(model: str, *, batch: bool = False, prices: Path | None = None) -> Price | None:
    """Return the list price of a model, from ``prices`` (a file like pvec's own ``OWN_PRICES``)
    before pvec's own; a date or provider in its name is cut.

    Raises ``InputError`` for a file that is no such table.
    """
    bare = re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{8})$", "", model.rsplit("/", 1)[-1])
    for path in (prices, OWN_PRICES):
        for provider in _read_prices(path).values() if path else ():
            if bare in provider.models:
                prompt, completion = provider.models[bare]
                origin = f"prices of {provider.as_of}"
                price = Price(prompt=prompt, completion=completion, origin=origin)
                return price.discounted(provider.batch, "in a batch") if batch else price
    return None


def _read_prices(path: Path) -> dict[str, _Provider]:
    document = read_json(path)
    try:
        return TypeAdapter(dict[str, _Provider]).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{path} is no table of prices (at {place}: {first['msg'].lower()}): give each "
            'provider a "source", an "as_of" and "models" with dollars per million prompt and '
            'completion tokens, such as {"mine": {"source": "contract", "as_of": "2026-11", '
            '"models": {"gpt-4.1-mini": [0.40, 1.60]}}}.'
        ) from None


def parse_price(text: str) -> Price:
    """Read ``"0.40,1.60"``: dollars per million prompt and completion tokens.

    Raises ``InputError`` for anything else.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        raise InputError(
            f"{text!r} is not a valid price: "
            "give dollars per million tokens as PROMPT,COMPLETION, such as 0.40,1.60."
        )
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
    origin: str = "the price given"

    def __str__(self) -> str:
        tokens = f"{self.calls:,} judge calls, about {self.prompt_tokens:,} prompt tokens"
        if self.dollars is None:
            return f"{tokens}, cost unknown"
        return f"{tokens}, about ${self.dollars:.2f} at {self.origin}"


def estimate(
    prompts: Iterable[str],
    *,
    price: Price | None,
    count_tokens: Callable[[str], int] = rough_tokens,
    completion_tokens: int = 1,
    repeats: int = 1,
) -> Estimate:
    """Estimate what asking ``prompts`` costs, each ``repeats`` times; ``count_tokens`` may be a
    real tokenizer's.
    """
    per_chat = 8  # role markers around a single-turn chat
    counts = [count_tokens(prompt) + per_chat for prompt in prompts]
    calls, total = repeats * len(counts), repeats * sum(counts)
    written = completion_tokens * calls
    dollars = price.cost(prompt_tokens=total, completion_tokens=written) if price else None
    return Estimate(
        calls=calls,
        prompt_tokens=total,
        completion_tokens=written,
        dollars=dollars,
        origin=price.origin if price else "",
    )


class Budget:
    """Money spent and promised. A request reserves its estimate before it leaves.

    ``limit`` None means no limit; a limit needs a price.
    """

    def __init__(self, *, limit: float | None, price: Price | None) -> None:
        if limit is not None and price is None:
            raise InputError(
                "A cost limit needs a price and this judge's is unknown: "
                "give --price PROMPT,COMPLETION in dollars per million tokens."
            )
        self.limit = limit
        self.spent = 0.0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._price = price or Price(prompt=0.0, completion=0.0)
        self._reserved = 0.0
        self._characters = self._counted = 0

    def reserve(
        self, *, characters: int, completion_tokens: int, cautious: bool = False
    ) -> float | None:
        """Set money aside for one request; None when that would pass the limit.

        ``cautious`` is for requests of which many are sent before one comes back.
        """
        density = self._counted / self._characters if self._characters else _MOST_DENSE
        tokens = characters * max(density, _MOST_DENSE if cautious else 0.0)
        amount = self._price.cost(prompt_tokens=tokens, completion_tokens=completion_tokens)
        if self.limit is not None and self.spent + self._reserved + amount > self.limit:
            return None
        self._reserved += amount
        return amount

    def settle(
        self, reserved: float, usage: Usage | None, *, billed: bool = True, characters: int | None
    ) -> None:
        """Replace a reservation by what the server says was used, for a prompt of that many
        ``characters`` (None: unknown, which teaches nothing about later ones).

        Without ``usage`` the reservation counts as spent where it may be ``billed``.
        """
        if usage is None:
            self.release(reserved, billed=billed)
            return
        self._reserved -= reserved
        self.prompt_tokens += usage.prompt
        self.completion_tokens += usage.completion
        if characters is not None:
            self._characters += characters
            self._counted += usage.prompt
        self.spent += self._price.cost(
            prompt_tokens=usage.prompt, completion_tokens=usage.completion
        )

    def release(self, reserved: float, *, billed: bool) -> None:
        """End a reservation without a usage report; ``billed`` when it may still be charged."""
        self._reserved -= reserved
        if billed:
            self.spent += reserved
