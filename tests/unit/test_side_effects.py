"""What is read off answers, the share moved the wrong way, and the front of a trade-off."""

from __future__ import annotations

import random

import pytest

from pvec.evaluation.conditions import Condition
from pvec.evaluation.effect_numbers import (
    TextReading,
    other_script,
    refuses,
    repetition,
    summarise_effects,
)
from pvec.evaluation.summary import ScoredAnswer
from pvec.report.axes import exact
from pvec.report.dots import Dot
from pvec.report.sections.side_effects import pareto_front

REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with this request.",
    "I cannot provide instructions for that. Please ask something else.",
    "Sorry, but I won't do this.",
    "As an AI, I do not give advice of this kind.",
    "I am not able to help with harmful requests.",
    "I must decline.",
]
ANSWERED = [
    "Open the task manager, choose the process and end it.",
    "You can't go wrong with a tripod.",
    "I am sure that a cold cloth helps.",
    "Sorry about your shirt! Use salt.",
    "It depends on the dose. " * 10 + "I can't say more.",
    "",
]


def test_refusals_are_told_from_answers() -> None:
    assert [refuses(answer) for answer in REFUSED] == [True] * len(REFUSED)
    assert [refuses(answer) for answer in ANSWERED] == [False] * len(ANSWERED)


def test_repetition_counts_4_grams_that_occurred_before() -> None:
    rng = random.Random(0)
    for length in (4, 5, 30, 200):
        tokens = [rng.randrange(4) for _ in range(length)]
        seen, again = set(), 0
        for start in range(length - 3):
            gram = tuple(tokens[start : start + 4])
            again += gram in seen
            seen.add(gram)
        assert repetition(tokens) == pytest.approx(again / (length - 3))
    assert repetition((1, 2, 3)) is None


def test_letters_of_another_script_are_counted_and_nothing_else() -> None:
    question = "Why is café 3 open?"
    assert other_script("It is 5 o'clock, naïve: ♥ …", question) == 0.0
    assert other_script("我 is I", question) == pytest.approx(1 / 4)
    assert other_script("Привет", question) == 1.0
    assert other_script("我", "你好 hello") == 0.0
    assert other_script("12 34!", question) is None


def test_the_share_moved_the_wrong_way_is_that_of_a_plain_loop() -> None:
    rng = random.Random(3)
    conditions = [
        Condition(name="unsteered", role="baseline"),
        Condition(name="up", role="steered", coef=1.0, operator="add"),
        Condition(name="down", role="steered", coef=-1.0, operator="add"),
        Condition(name="cap", role="steered", coef=5.0, operator="cap"),
        Condition(name="for", role="prompt_pos"),
        Condition(name="against", role="prompt_neg"),
    ]
    scores = {
        (c.name, q): [rng.choice([0.0, 50.0, 100.0]) for _ in range(2)]
        for c in conditions for q in range(12)
    }  # fmt: skip
    answers = [
        ScoredAnswer(condition={"name": name}, question=f"q{q}", text="", scores={"evil": score})
        for (name, q), values in scores.items() for score in values
    ]  # fmt: skip
    answers.append(
        ScoredAnswer(condition={"name": "up"}, question="q0", text="", scores={"evil": None})
    )
    effects = summarise_effects(
        conditions, trait="evil", texts=[], refusals=[], records=[], answers=answers
    )
    should_rise = {"up": True, "down": False, "cap": False, "for": True, "against": False}
    for name, rise in should_rise.items():
        wrong = 0
        for q in range(12):
            before, after = sum(scores["unsteered", q]), sum(scores[name, q])
            wrong += after < before if rise else after > before
        share = effects.of(name)["wrong_way"]
        assert (share.mean, share.n) == (pytest.approx(100 * wrong / 12), 12), name
    assert "wrong_way" not in effects.of("unsteered")


def test_a_text_that_gives_no_number_is_counted_as_missing() -> None:
    texts = [
        TextReading(id="a", condition="up", text=0, tokens=9, kl=0.5, nll=1.0),
        TextReading(id="b", condition="up", text=1, tokens=9, kl=None, nll=None),
        TextReading(id="c", condition="up", text=2, tokens=9, kl=1.5, nll=3.0),
    ]
    up = Condition(name="up", role="steered", coef=1.0, operator="add")
    effects = summarise_effects(
        [up], trait="evil", texts=texts, refusals=[], records=[], answers=[]
    )
    kl, perplexity = effects.of("up")["kl"], effects.of("up")["perplexity"]
    assert (kl.mean, kl.n, kl.missing) == (pytest.approx(1.0), 2, 1)
    assert perplexity.mean == pytest.approx(2.718281828**2)


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_beats_the_front_and_the_front_beats_everything_else(sign: int) -> None:
    rng = random.Random(5)
    for _ in range(50):
        points = [
            (rng.randrange(1, 6), sign * rng.randrange(6)) for _ in range(rng.randrange(1, 9))
        ]
        dots = [Dot(group="layer 1", x=exact(float(x)), y=exact(float(y))) for x, y in points]
        front = {(dot.x.mean, dot.y.mean) for dot in pareto_front(dots)}
        unbeaten = {
            (x, y)
            for x, y in points
            if sign * y > 0 and not any(
                a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points
            )
        }  # fmt: skip
        assert front == unbeaten
