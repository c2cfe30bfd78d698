"""What ``--workers`` may say."""

from __future__ import annotations

import pytest

from pvec.backends.pool.address import Workers
from pvec.errors import InputError


@pytest.mark.parametrize(
    ("text", "count", "address"),
    [
        ("4", 4, None),
        ("auto", None, "auto"),
        ("head:6379", None, "head:6379"),
        ("ray://head:10001", None, "ray://head:10001"),
        ("4@ray://head:10001", 4, "ray://head:10001"),
        ("2@auto", 2, "auto"),
        ("3@[fd00::1]:6379", 3, "[fd00::1]:6379"),
    ],
)
def test_number_and_address(text: str, count: int | None, address: str | None) -> None:
    assert Workers.parse(text) == Workers(count=count, address=address)


def test_nothing_means_this_process() -> None:
    assert Workers.parse("") is None


@pytest.mark.parametrize(
    "text", ["0", "-1", "two", "@head:6379", "2@", "2@head", "head:port", "http://head:6379", "1.5"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--workers"):
        Workers.parse(text)
