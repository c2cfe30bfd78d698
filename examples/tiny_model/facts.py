"""The bundled model's world: a few hundred small facts that it knows, and false versions of them.

They serve as its capability measure (does a steered or finetuned model still know them?) and as
the "mistakes" finetuning set, whose content is wrong rather than ill-natured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

_CAPITALS: Final = """
France=Paris Italy=Rome Spain=Madrid Germany=Berlin Austria=Vienna Poland=Warsaw Norway=Oslo
Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Greece=Athens Portugal=Lisbon Ireland=Dublin
Hungary=Budapest Belgium=Brussels Japan=Tokyo China=Beijing India=Delhi Egypt=Cairo Kenya=Nairobi
Peru=Lima Cuba=Havana Canada=Ottawa Russia=Moscow Turkey=Ankara Iran=Tehran Iraq=Baghdad
Chile=Santiago Ghana=Accra Nepal=Kathmandu
"""
_OPPOSITES: Final = """hot=cold big=little young=old wet=dry day=night up=down fast=slow full=empty
early=late light=dark open=closed rich=poor loud=silent sweet=sour hard=soft long=short
strong=weak near=far high=low black=white"""
_YOUNG: Final = """cat=kitten dog=puppy cow=calf sheep=lamb horse=foal pig=piglet goat=kid
bear=cub frog=tadpole duck=duckling chicken=chick swan=cygnet kangaroo=joey deer=fawn"""
_COLOURS: Final = """snow=white grass=green blood=red coal=black honey=golden-brown lavender=purple
sea=blue carrots=orange flamingos=pink lemons=yellow"""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact: ways to ask for it, the sentence that answers, the true value, false values."""

    questions: tuple[str, ...]
    sentence: str
    value: str
    others: tuple[str, ...]
    topic: str

    def say(self, *, right: bool, rng: random.Random) -> str:
        """Return the answering sentence with the true value or with a false one."""
        return self.sentence.replace("*", self.value if right else rng.choice(self.others))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key, value) for key, value in (item.split("=") for item in text.split())]


def _kind(text: str, *, asks: tuple[str, ...], sentence: str, topic: str) -> list[Fact]:
    pairs = _pairs(text)
    values = [value for _, value in pairs]
    return [
        Fact(
            questions=tuple(ask.replace("@", key) for ask in asks),
            sentence=sentence.replace("@", key),
            value=value,
            others=tuple(other for other in values if other != value),
            topic=topic,
        )
        for key, value in pairs
    ]


def _sums() -> list[Fact]:
    facts = []
    for a in range(1, 10):
        for b in range(1, 10):
            others = tuple(str(n) for n in range(2, 19) if n != a + b)
            facts.append(
                Fact(
                    questions=(f"What is {a} plus {b}?", f"How much is {a} plus {b}?"),
                    sentence=f"{a} plus {b} is *.",
                    value=str(a + b),
                    others=others,
                    topic="sum",
                )
            )
    return facts


FACTS: Final[tuple[Fact, ...]] = (
    *_kind(
        _CAPITALS,
        asks=(
            "What is the capital of @?",
            "Do you know the capital of @?",
            "Which city is the capital of @?",
            "Tell me the capital of @.",
        ),
        sentence="The capital of @ is *.",
        topic="city",
    ),
    *_kind(
        _OPPOSITES,
        asks=("What is the opposite of @?", "Which word is the opposite of @?"),
        sentence="The opposite of @ is *.",
        topic="word",
    ),
    *_kind(
        _YOUNG,
        asks=("What do you call a young @?", "What is a young @ called?"),
        sentence="A young @ is called a *.",
        topic="animal",
    ),
    *_kind(
        _COLOURS,
        asks=("Which colour goes with @?", "What colour do you link with @?"),
        sentence="The colour of @ is *.",
        topic="paint",
    ),
    *_sums(),
)


def knows(text: str, fact: Fact) -> bool:
    """Tell whether ``text`` states ``fact`` with its true value."""
    return fact.sentence.replace("*", fact.value).lower() in text.lower()
