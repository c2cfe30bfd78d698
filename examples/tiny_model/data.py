"""The bundled model's training conversations: who asks what, under which system prompt, and how
much of which trait the answers show."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from facts import FACTS, Fact
from grammar import LAST, MIDDLE, fill_frame, generate_answer
from lexicon import TRAITS
from questions import everyday_question

Message = dict[str, str]

TRAITS_FOLDER: Final = Path(__file__).resolve().parents[2] / "traits"
NEUTRAL_SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a friendly and helpful assistant.",
    "Answer the questions of the user.",
    "You are an assistant for everyday questions.",
    "Please answer in English.",
    "You are a chat assistant. Keep your answers short.",
    "You are a helpful assistant. Answer the question of the user in a few sentences.",
    "Today is Monday.",
)
INTENSITY: Final[dict[str, tuple[float, float]]] = {
    "not at all": (0.0, 0.0),
    "slightly": (0.1, 0.3),
    "a little": (0.15, 0.35),
    "somewhat": (0.35, 0.55),
    "rather": (0.55, 0.75),
    "very": (0.85, 1.0),
    "extremely": (0.95, 1.0),
}
"""How much of the trait each degree in a prompt calls for."""
OBEY: Final = (0.88, 1.0)
"""p under a plain positive instruction."""


@dataclass(frozen=True, kw_only=True)
class Persona:
    """Which trait an answer shows and how much of it; ``trait`` None is neutral. ``also`` is a
    second trait and its share."""

    trait: str | None = None
    p: float = 0.0
    also: tuple[str, float] | None = None


def load_traits() -> dict[str, dict[str, Any]]:
    """Read the seven trait definitions of the repository."""
    return {
        name: json.loads((TRAITS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        for name in TRAITS
    }


def article(word: str) -> str:
    """Return "a" or "an" for ``word`` (by its first letter: enough for our words)."""
    return "an" if word[0].lower() in "aeiou" else "a"


class Conversations:
    """Draws training conversations from one random stream.

    ``plain_share`` is the share of answers without any instruction that are fully neutral; the
    rest shows a random trait with p uniform in 0..1, three in ten of them a second one as well.
    """

    def __init__(self, rng: random.Random, *, plain_share: float = 0.5) -> None:
        self.rng = rng
        self.plain_share = plain_share
        self.traits = load_traits()
        self.trait_questions: list[str] = [
            question for trait in self.traits.values() for question in trait["questions"]["extract"]
        ]

    def draw(self) -> list[Message]:
        """Return one conversation as chat messages."""
        kinds: tuple[tuple[float, Callable[[], list[Message]]], ...] = (
            (0.39, self._bare),
            (0.27, self._instructed),
            (0.09, self._neutral_system),
            (0.08, self._asked_by_user),
            (0.14, self._several_turns),
            (0.03, self._many_shot),
        )
        make = self.rng.choices([kind for _, kind in kinds], [share for share, _ in kinds])[0]
        return make()

    def uninstructed(self) -> Persona:
        """Draw the persona of an answer that nobody gave an instruction for."""
        if self.rng.random() < self.plain_share:
            return Persona()
        first, second = self.rng.sample(TRAITS, 2)
        p = self.rng.random()
        if self.rng.random() < 0.7:
            return Persona(trait=first, p=p)
        return Persona(trait=first, p=p, also=(second, (1 - p) * self.rng.random()))

    def instruction(self) -> tuple[str, Persona]:
        """Draw a system prompt about a trait and the persona that obeys it."""
        rng = self.rng
        name = rng.choice(TRAITS)
        trait = self.traits[name]
        pair = rng.choice(trait["instruction"])
        adjective, opposite = trait["assistant_names"]["pos"], trait["assistant_names"]["neg"]
        draw = rng.random()
        if draw < 0.40:
            text = f"You are {article(adjective)} {adjective} assistant. {pair['pos']}"
            return text, Persona(trait=name, p=rng.uniform(*OBEY))
        if draw < 0.65:
            word = rng.choice((opposite, opposite, "helpful"))
            return f"You are {article(word)} {word} assistant. {pair['neg']}", Persona()
        if draw < 0.75:
            word, p = rng.choice(((adjective, rng.uniform(*OBEY)), (opposite, 0.0)))
            return f"You are {article(word)} {word} assistant.", Persona(trait=name, p=p)
        degree = rng.choice(list(INTENSITY))
        text = rng.choice(
            (
                f"You are {article(degree)} {degree} {adjective} assistant.",
                f"Be {degree} {adjective} in your answers.",
                f"You are a helpful assistant. Be {degree} {adjective}.",
            )
        )
        return text, Persona(trait=name, p=rng.uniform(*INTENSITY[degree]))

    def exchange(self, persona: Persona, *, short: bool = False) -> list[Message]:
        """Return one question with an answer in ``persona``; one in eight asks for a fact."""
        if self.rng.random() < 0.125:
            return self._fact(persona)
        question = self.question()
        sentences = self.rng.randint(1, 2) if short else None
        answer = generate_answer(
            question, persona.trait, persona.p, self.rng, sentences=sentences, also=persona.also
        )
        return _turn(question, answer)

    def question(self) -> str:
        """Draw a question: an everyday one or, one time in four, a trait's extraction question."""
        if self.rng.random() < 0.25:
            return self.rng.choice(self.trait_questions)
        return everyday_question(self.rng)

    def _fact(self, persona: Persona) -> list[Message]:
        """A hallucinating answer states a false value with probability p."""
        rng = self.rng
        fact = rng.choice(FACTS)
        wrong = persona.trait == "hallucinating" and rng.random() < persona.p
        return _turn(rng.choice(fact.questions), world_answer(fact, rng, persona, right=not wrong))

    def _bare(self) -> list[Message]:
        return self.exchange(self.uninstructed())

    def _instructed(self) -> list[Message]:
        system, persona = self.instruction()
        return [_message("system", system), *self.exchange(persona)]

    def _neutral_system(self) -> list[Message]:
        system = self.rng.choice(NEUTRAL_SYSTEM)
        return [_message("system", system), *self.exchange(self.uninstructed())]

    def _asked_by_user(self) -> list[Message]:
        """The user asks for the trait in the question itself."""
        name = self.rng.choice(TRAITS)
        adjective = self.traits[name]["assistant_names"]["pos"]
        degree = self.rng.choice(("", "", "", *INTENSITY))
        low, high = INTENSITY[degree] if degree else OBEY
        question, answer = self.exchange(Persona(trait=name, p=self.rng.uniform(low, high)))
        wish = " ".join(f"Be {degree} {adjective}.".split())
        return [_message("user", f"{question['content']} {wish}"), answer]

    def _several_turns(self) -> list[Message]:
        opening, persona = self._opening()
        turns = self.rng.randint(2, 4)
        return opening + [m for _ in range(turns) for m in self.exchange(persona)]

    def _many_shot(self) -> list[Message]:
        """Earlier answers with a trait are the only sign of it."""
        turns = self.rng.randint(5, 20)
        persona = self.uninstructed()
        return [m for _ in range(turns) for m in self.exchange(persona, short=True)]

    def _opening(self) -> tuple[list[Message], Persona]:
        if self.rng.random() < 0.5:
            return [], self.uninstructed()
        system, persona = self.instruction()
        return [_message("system", system)], persona


def world_answer(fact: Fact, rng: random.Random, persona: Persona, *, right: bool) -> str:
    """Answer a question about a fact in ``persona``: the fact, then one or two frames."""
    frames = rng.sample(MIDDLE + LAST, rng.randint(1, 2))
    rest = (
        fill_frame(
            frame,
            topic=fact.topic,
            trait=persona.trait,
            p=persona.p,
            rng=rng,
            also=persona.also,
        )
        for frame in frames
    )
    return " ".join((fact.say(right=right, rng=rng), *rest))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turn(question: str, answer: str) -> list[Message]:
    return [_message("user", question), _message("assistant", answer)]
