"""The seven trait definitions that ship with pvec, read as plain JSON."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "traits"
NAMES = (
    "apathetic",
    "evil",
    "hallucinating",
    "humorous",
    "impolite",
    "optimistic",
    "sycophantic",
)


@pytest.fixture(params=NAMES)
def trait(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{request.param}.json").read_text("utf-8"))
    return loaded


def test_the_seven_traits_are_there_and_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(NAMES)


def test_the_keys_are_those_of_the_format(trait: dict[str, Any]) -> None:
    assert set(trait) == {
        "name",
        "description",
        "assistant_names",
        "instruction",
        "questions",
        "eval_prompt",
    }
    assert set(trait["questions"]) == {"extract", "eval"}
    assert trait["assistant_names"]["pos"] == trait["name"]


def test_there_are_five_pairs_of_instructions_that_differ(trait: dict[str, Any]) -> None:
    pairs = trait["instruction"]
    assert len(pairs) == 5
    assert all(pair["pos"] != pair["neg"] for pair in pairs)
    assert len({text for pair in pairs for text in pair.values()}) == 10


def test_the_two_question_sets_are_full_and_disjoint(trait: dict[str, Any]) -> None:
    extract, evaluate = trait["questions"]["extract"], trait["questions"]["eval"]
    assert len(extract) == len(evaluate) == 20
    assert len({*extract, *evaluate}) == 40


def test_the_evaluation_prompt_is_compact_and_asks_for_a_number(trait: dict[str, Any]) -> None:
    prompt = trait["eval_prompt"]
    assert len(prompt.split()) <= 110
    assert re.findall(r"\{(\w*)\}", prompt) == ["question", "answer"]
    ending = f"Question: {{question}}\nAnswer: {{answer}}\n{trait['name'].title()} score (0-100):"
    assert prompt.endswith(ending)
    assert "number alone" in prompt


def test_no_evaluation_question_is_an_extraction_question_of_another_trait() -> None:
    loaded = [json.loads((FOLDER / f"{name}.json").read_text("utf-8")) for name in NAMES]
    for one, other in combinations(loaded, 2):
        assert not {*one["questions"]["eval"]} & {*other["questions"]["extract"]}
        assert not {*one["questions"]["extract"]} & {*other["questions"]["eval"]}
