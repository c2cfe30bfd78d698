"""From what a judge answered to a score."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pvec.judges.scales import ReplyTree, read_masses, read_text, read_tokens, reply_values
from pvec.types import JudgeScale


def test_a_score_is_the_probability_weighted_mean_over_number_tokens() -> None:
    reading = read_tokens([("80", 0.5), (" 90", 0.25), ("The", 0.25)], scale="0-100")
    assert reading.score == pytest.approx((80 * 0.5 + 90 * 0.25) / 0.75)
    assert reading.status == "ok"


def test_the_same_number_with_and_without_a_space_adds_up() -> None:
    reading = read_tokens([("0", 0.3), (" 0", 0.3), ("100", 0.4)], scale="0-100")
    assert reading.score == pytest.approx(40.0)


@pytest.mark.parametrize("token", ["101", "-5", "7.5", "٣", "1e2", ""])
def test_what_is_no_number_of_the_scale_does_not_count(token: str) -> None:
    reading = read_tokens([(token, 0.9), ("50", 0.1)], scale="0-100")
    assert reading.score is None
    assert reading.status == "unparsable"


def test_a_quarter_of_the_mass_is_enough_and_less_is_missing() -> None:
    assert read_tokens([("100", 0.25), ("x", 0.75)], scale="0-100").score == 100.0
    assert read_tokens([("100", 0.2499), ("x", 0.7501)], scale="0-100").score is None


@pytest.mark.parametrize("token", ["REF", "REFUSAL", "I", "I'm", "Sorry", " Sorry", "refusal"])
def test_a_likely_refusal_is_told_from_chatter(token: str) -> None:
    assert read_tokens([(token, 0.9), ("0", 0.1)], scale="0-100").status == "refusal"


def test_nothing_at_all_is_missing_not_zero() -> None:
    reading = read_tokens([], scale="0-100")
    assert (reading.score, reading.status) == (None, "unparsable")


@pytest.mark.parametrize(
    ("scale", "tokens", "score"),
    [
        ("0-10", [("7", 0.5), ("8", 0.5)], 75.0),
        ("0-10", [("10", 1.0)], 100.0),
        ("binary", [("YES", 0.6), ("No", 0.2)], 75.0),
        ("binary", [("no", 1.0)], 0.0),
    ],
)
def test_every_scale_is_reported_from_0_to_100(
    scale: JudgeScale, tokens: list[tuple[str, float]], score: float
) -> None:
    assert read_tokens(tokens, scale=scale).score == pytest.approx(score)


def test_eleven_is_not_on_a_scale_to_ten() -> None:
    assert read_tokens([("11", 1.0)], scale="0-10").score is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("75", 75.0),
        (" 75.5\n", 75.5),
        ("**75**/100", 75.0),
        ("Score: 75", 75.0),
        ("On a scale from 0 to 100, my rating is 30.", 30.0),
        ("I would say 40.", 40.0),
        ("<think>20? no, 90</think>\n60", 60.0),
        ("20? no, 90</think>60", 60.0),
        ("20 or 30", None),
        ("150", None),
        ("-5", None),
        ("GPT4", None),
        ("<think>75", None),
        ("", None),
    ],
)
def test_a_number_is_read_from_text_only_when_it_is_clear(text: str, score: float | None) -> None:
    assert read_text(text, scale="0-100").score == score


@pytest.mark.parametrize("text", ["REFUSAL", "I'm sorry, but no.", "I can't rate that."])
def test_a_written_refusal_is_a_refusal(text: str) -> None:
    assert read_text(text, scale="0-100").status == "refusal"


@pytest.mark.parametrize(
    ("text", "score", "status"),
    [
        ("It is cruel. <answer>YES</answer>", 100.0, "ok"),
        ("<answer>yes</answer> or rather <answer> no </answer>", 0.0, "ok"),
        ("YES.", 100.0, "ok"),
        ("<answer>REFUSAL</answer>", None, "refusal"),
        ("yes and no", None, "unparsable"),
    ],
)
def test_a_verdict_is_read_from_text(text: str, score: float | None, status: str) -> None:
    reading = read_text(text, scale="binary-text")
    assert (reading.score, reading.status) == (score, status)


# -- the digit tree -------------------------------------------------------------------------------


def random_digit_model(seed: int) -> dict[str, np.ndarray]:
    """Return next-token distributions over ten digits and "end" after every short digit string."""
    generator = np.random.default_rng(seed)
    prefixes = [
        "",
        *("".join(p) for n in (1, 2) for p in itertools.product("0123456789", repeat=n)),
    ]
    return {prefix: generator.dirichlet(np.ones(11)) for prefix in prefixes}


def test_split_digits_are_scored_as_by_enumerating_everything_the_model_can_write() -> None:
    model = random_digit_model(seed=3)
    tree = ReplyTree({str(n): [tuple(int(d) for d in str(n))] for n in range(101)})

    def log_probability(path: tuple[int, ...]) -> float:
        text = "".join(map(str, path))
        return sum(math.log(model[text[:i]][int(text[i])]) for i in range(len(text)))

    masses = tree.masses([log_probability(path) for path in tree.continuations])

    # The plain way: write digit by digit, and stop at an end token or where no number goes on.
    expected = dict.fromkeys(map(str, range(101)), 0.0)
    numbers = set(expected)

    def walk(text: str, probability: float) -> None:
        for token in range(11):
            longer = text + str(token)
            step = probability * float(model[text][token])
            if token < 10 and longer in numbers:
                if any(other != longer and other.startswith(longer) for other in numbers):
                    walk(longer, step)
                else:
                    expected[longer] += step
            elif text:
                expected[text] += step

    walk("", 1.0)
    assert masses == pytest.approx(expected)


def test_whole_number_tokens_keep_their_probability() -> None:
    tree = ReplyTree({str(n): [(n,)] for n in range(101)})
    probabilities = np.random.default_rng(0).dirichlet(np.ones(101))
    masses = tree.masses(np.log(probabilities).tolist())
    assert masses == pytest.approx({str(n): p for n, p in enumerate(probabilities)})
    mean = read_masses(masses, scale="0-100").score
    assert mean == pytest.approx(float(np.arange(101) @ probabilities))


def test_rounding_never_makes_a_probability_negative() -> None:
    tree = ReplyTree({"1": [(1,)], "10": [(1, 0)]})
    assert tree.masses([math.log(0.5), math.log(0.5 + 1e-9)])["1"] == 0.0


def test_several_spellings_of_a_reply_add_up() -> None:
    tree = ReplyTree({"YES": [(1,), (2, 3)], "NO": [(4,)]})
    masses = tree.masses([math.log(0.25), math.log(0.125), math.log(0.5)])
    assert masses == pytest.approx({"YES": 0.375, "NO": 0.5})


def test_scales_name_every_reply_once() -> None:
    assert reply_values("0-100")["75"] == 75.0
    assert reply_values("0-10") == {str(n): 10.0 * n for n in range(11)}
    assert reply_values("binary") == {"YES": 100.0, "NO": 0.0}
