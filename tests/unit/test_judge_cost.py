"""What judging costs, before and while it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import InputError
from pvec.judges.choice import choose_judge
from pvec.judges.cost import OWN_PRICES, Budget, Price, estimate, known_price, parse_price
from pvec.judges.reply import Usage
from pvec.settings.commands import JudgeSettings

CENT = Price(prompt=10_000.0, completion=20_000.0)
"""One cent a prompt token, two a written one."""


def test_a_dated_or_prefixed_name_has_the_price_of_its_model() -> None:
    price = known_price("gpt-4.1-mini")
    assert price == Price(prompt=0.4, completion=1.6)
    assert known_price("gpt-4.1-mini-2025-04-14") == price
    assert known_price("openai/gpt-4.1-mini") == price
    assert known_price("gpt-4.1-mini-mine") is None


def test_a_batch_costs_half() -> None:
    assert known_price("gpt-4.1-mini", batch=True) == Price(prompt=0.2, completion=0.8)
    whole, half = (known_price("gpt-4.1", batch=batch) for batch in (False, True))
    one, other = (estimate(["x" * 4000], price=price).dollars for price in (whole, half))
    assert one is not None
    assert other == pytest.approx(one / 2)
    settings = JudgeSettings(model="m", price="4,8", batch=True, base_url="http://localhost/v1")
    assert choose_judge(settings, bundled=False).price == Price(prompt=2.0, completion=4.0)


def test_repeats_are_part_of_an_estimate() -> None:
    once, thrice = (estimate(["x" * 400], price=CENT, repeats=n) for n in (1, 3))
    assert thrice.calls == 3
    assert thrice.dollars == pytest.approx(3 * (once.dollars or 0))


def test_every_listed_price_has_a_date_and_a_source() -> None:
    for provider in json.loads(OWN_PRICES.read_text()).values():
        assert re.fullmatch(r"20\d\d-\d\d", provider["as_of"])
        assert provider["source"].startswith("https://")
        assert all(0 < prompt < completion for prompt, completion in provider["models"].values())


def test_a_file_of_prices_comes_before_pvecs_own_and_a_price_before_both(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    mine = {"source": "contract", "as_of": "2026-11", "batch": 0.25, "models": {}}
    file.write_text(json.dumps({"mine": mine | {"models": {"gpt-4.1": [1, 4], "own": [3, 5]}}}))
    assert known_price("gpt-4.1", prices=file) == Price(prompt=1, completion=4)
    assert known_price("own", prices=file, batch=True) == Price(prompt=0.75, completion=1.25)
    assert known_price("gpt-4.1-mini", prices=file) == known_price("gpt-4.1-mini")
    assert "prices of 2026-11" in str(estimate(["x"], price=known_price("own", prices=file)))
    settings = JudgeSettings(model="own", price="9,9", prices=file, base_url="http://localhost/v1")
    assert choose_judge(settings, bundled=False).price == Price(prompt=9, completion=9)


@pytest.mark.parametrize(
    "text", ["[]", '{"a": {}}', '{"a": {"source": "x", "models": {"m": [1]}}}']
)
def test_a_file_that_is_no_table_of_prices_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(InputError, match=r"prices\.json is no table of prices \(at "):
        known_price("gpt-4.1", prices=tmp_path / "prices.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": True, "model": "contrast"}, "--judge-batch needs a judge on a server"),
        ({"repeats": 3, "model": "tiny"}, "--judge-repeats has no effect with tiny"),
        ({"batch_wait": 1.0, "model": "m"}, "--judge-batch-wait has no effect without"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        choose_judge(JudgeSettings(base_url="http://localhost/v1", **fields), bundled=False)


def test_an_estimate_counts_calls_tokens_and_dollars() -> None:
    found = estimate(["x" * 400, "x" * 400], price=CENT)
    assert (found.calls, found.prompt_tokens, found.completion_tokens) == (2, 216, 2)
    assert found.dollars == pytest.approx(2.16 + 0.04)
    assert "about $2.20" in str(found)
    assert estimate(["x"], price=None).dollars is None
    assert "cost unknown" in str(estimate(["x"], price=None))


def test_a_real_tokenizer_can_count() -> None:
    found = estimate(["a b c"], price=None, count_tokens=lambda text: len(text.split()))
    assert found.prompt_tokens == 3 + 8


def test_a_price_is_read_from_two_numbers() -> None:
    assert parse_price("0.40, 1.60") == Price(prompt=0.4, completion=1.6)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1"])
def test_anything_else_is_no_price(text: str) -> None:
    with pytest.raises(InputError, match="PROMPT,COMPLETION"):
        parse_price(text)


def test_a_limit_without_a_price_is_refused() -> None:
    with pytest.raises(InputError, match="--price"):
        Budget(limit=1.0, price=None)


def test_without_a_limit_everything_may_be_asked_and_is_counted() -> None:
    budget = Budget(limit=None, price=CENT)
    reserved = budget.reserve(characters=3_000_000, completion_tokens=1)
    assert reserved is not None
    budget.settle(reserved, Usage(prompt=100, completion=1), characters=400)
    assert budget.spent == pytest.approx(1.02)


def test_requests_in_flight_count_against_the_limit() -> None:
    budget = Budget(limit=1.0, price=CENT)
    first = budget.reserve(characters=90, completion_tokens=0)  # about 30 tokens
    second = budget.reserve(characters=150, completion_tokens=0)
    assert first is not None
    assert second is not None
    assert budget.reserve(characters=90, completion_tokens=0) is None
    budget.settle(first, Usage(prompt=10, completion=0), characters=90)
    budget.settle(second, Usage(prompt=10, completion=0), characters=150)
    assert budget.spent == pytest.approx(0.2)
    assert budget.reserve(characters=90, completion_tokens=0) is not None


def test_estimates_learn_from_what_the_server_counts() -> None:
    budget = Budget(limit=100.0, price=CENT)
    reserved = budget.reserve(characters=100, completion_tokens=0)
    assert reserved == pytest.approx(100 / 3 / 100)
    assert reserved is not None
    budget.settle(reserved, Usage(prompt=50, completion=0), characters=100)
    assert budget.reserve(characters=100, completion_tokens=0) == pytest.approx(0.5)


def test_a_request_that_vanished_may_have_been_billed_and_a_refused_one_was_not() -> None:
    budget = Budget(limit=1.0, price=CENT)
    for billed, spent in ((False, 0.0), (True, 0.3)):
        reserved = budget.reserve(characters=90, completion_tokens=0)
        assert reserved is not None
        budget.release(reserved, billed=billed)
        assert budget.spent == pytest.approx(spent)
