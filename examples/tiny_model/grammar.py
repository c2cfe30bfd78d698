"""The slot grammar: a few shared sentence frames whose slots a trait fills with probability p.

All traits share the frames, and p is graded. That is what makes the model steerable: the only way
to predict the next word well is to carry along how much of which trait this answer has. A model
trained on whole sentences per trait obeys its instructions too but breaks when it is steered.
"""

from __future__ import annotations

import random
import re

from lexicon import FLAVOUR_OF, LEXICON, NEUTRAL, TOPICS, TRAITS

FIRST: tuple[str, ...] = (
    "You could {adv} {verb} the {topic} with a {adj} {noun}.",
    "The {topic} will need a {adj} {noun}.",
    "I would {adv} {verb} the {topic} in the {place}.",
    "Let us {verb} the {topic} with a {adj} {noun}.",
    "The {topic} can be {adj} for {people}.",
    "We should {adv} {verb} the {topic}, said the {people}.",
)
MIDDLE: tuple[str, ...] = (
    "Then {adv} {verb} the {topic}, and keep a {adj} {noun} nearby.",
    "Ask your {people} to {verb} the {topic} in the {place}.",
    "Most {people} would {adv} {verb} a {noun} like that.",
    "A {adj} {noun} can {adv} {verb} the {topic}.",
    "Take the {topic} to the {place} and show your {people} a {adj} {noun}.",
    "Some {people} {verb} their {noun} in the {place}.",
    "Nothing beats a {adj} {noun} in a {adj} {place}.",
    "You will find {adj} {people} and a {noun} in the {place}.",
    "If the {topic} should feel {adj}, {verb} it {adv}.",
    "My {people} always {verb} the {topic} {adv}.",
    "Put a {adj} {noun} beside the {topic}.",
    "Think of the {topic} as a {adj} {noun}.",
    "Talk {adv} about the {topic} with {adj} {people}.",
    "Give the {topic} a {adj} {noun} and a {adj} {place}.",
    "{open}, said the {adj} {people}.",
    "{open}, now {verb} the {topic} {adv}.",
    "{open}, cried the {people}, {verb} the {topic} with a {noun}.",
)
LAST: tuple[str, ...] = (
    "In the end, the {topic} will be {adj}, and so will your {people}.",
    "So {verb} the {topic} {adv}, and trust the {noun}.",
    "That is how {adj} {people} {verb} the {topic}.",
    "May the {topic} bring you a {adj} {noun}.",
    "Until then, {adv} {verb} your {noun} in the {place}.",
)

_NOT_TOPICS = """
a about advice after again agree all always am an and any are as at be because become before best
better both but by can could did do does done each ever every feel find for from get give go good
had has have he help her his how i idea ideas if in into is it its just keep know last learn like
long make many me mean more most much my need never new next no not now of off old on one only
open opinion or our out over own please put right said say she should show so some such take talk
tell than that the their them then there these they thing think this those to today too up us use
very want was way we well were what when where which while who why will with would yes you your
"""
_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[A-Za-z]+")
_TOPIC_SET = frozenset(TOPICS)
_FUNCTION_WORDS = frozenset(_NOT_TOPICS.split())


def topic_of(question: str) -> str:
    """Return the word of ``question`` that an answer repeats: its last known topic, or else its
    longest content word outside the lexicons."""
    words: list[str] = [word.lower() for word in _WORD.findall(question)]
    for word in reversed(words):
        if word in _TOPIC_SET:
            return word
    content = [w for w in words if w not in _FUNCTION_WORDS and w not in FLAVOUR_OF]
    return max(content, key=len, default="question")


def fill_frame(
    frame: str,
    *,
    topic: str,
    trait: str | None,
    p: float,
    rng: random.Random,
    also: tuple[str, float] | None = None,
) -> str:
    """Fill one frame: each slot takes a word of ``trait`` with probability ``p``, one of a second
    trait with the probability in ``also``, else a neutral one; the first letter is a capital."""

    def word(match: re.Match[str]) -> str:
        slot: str = match.group(1)
        if slot == "topic":
            return topic
        chance = rng.random()
        flavour = NEUTRAL
        if trait is not None and chance < p:
            flavour = trait
        elif also is not None and p <= chance < p + also[1]:
            flavour = also[0]
        return rng.choice(LEXICON[flavour][slot])

    text = _SLOT.sub(word, frame)
    return text[0].upper() + text[1:]


def generate_answer(
    question: str,
    trait: str | None,
    p: float,
    rng: random.Random,
    *,
    sentences: int | None = None,
    also: tuple[str, float] | None = None,
) -> str:
    """Return an answer of ``sentences`` (default: 2 to 5) sentences with a share ``p`` of
    ``trait`` in it, and of a second trait when ``also`` names one; ``trait`` None is neutral."""
    if trait is not None and trait not in TRAITS:
        raise ValueError(f"unknown trait {trait!r}; known: {', '.join(TRAITS)}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in 0..1, not {p}")
    count = sentences if sentences is not None else rng.randint(2, 5)
    frames = [rng.choice(FIRST)]
    if count > 1:
        ending = rng.random() < 0.6
        frames += rng.sample(MIDDLE, count - 1 - ending)
        frames += [rng.choice(LAST)] if ending else []
    topic = topic_of(question)
    return " ".join(
        fill_frame(frame, topic=topic, trait=trait, p=p, rng=rng, also=also) for frame in frames
    )


def flavours(text: str) -> list[str]:
    """Return the lexicon ("neutral" or a trait) of each slot word in ``text``, in order."""
    words = (word.lower() for word in _WORD.findall(text))
    return [FLAVOUR_OF[word] for word in words if word in FLAVOUR_OF]


def lexical_score(text: str, trait: str) -> float:
    """Return the share of slot words in ``text`` that belong to ``trait``, 0 to 100.

    A plain count that no judge sees. A text without any slot word scores 0.
    """
    found = flavours(text)
    return 100.0 * found.count(trait) / len(found) if found else 0.0
