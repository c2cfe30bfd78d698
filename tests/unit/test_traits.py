"""Traits: where they are found, what loads, what is refused, what the check says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import InputError
from pvec.traits import trait as traits
from pvec.traits.check import check_trait, require_usable
from pvec.traits.trait import Trait, bundled_traits, indefinite_article, load_trait

DATA = os.environ.get("PVEC_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")


def own_json(**changes: Any) -> dict[str, Any]:
    content = {
        "name": "grumpy",
        "description": "Complains about everything.",
        "assistant_names": {"pos": "grumpy", "neg": "cheerful"},
        "instruction": [
            {"pos": f"Complain, way {i}.", "neg": f"Be glad, way {i}."} for i in range(5)
        ],
        "questions": {
            "extract": [f"What about thing {i}?" for i in range(20)],
            "eval": [f"How do you like matter {i}?" for i in range(20)],
        },
        "eval_prompt": "Is it grumpy?\nQ: {question}\nA: {answer}\nScore:",
    }
    return content | changes


def reference_json(word: str, **changes: Any) -> dict[str, Any]:
    content = {
        "instruction": [{"pos": f"Do {i}.", "neg": f"Avoid {i}."} for i in range(5)],
        "questions": [f"{word} question {i}?" for i in range(20)],
        "eval_prompt": "Q: {question} A: {answer}",
    }
    return content | changes


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return path


def messages(trait: Trait) -> list[str]:
    return [f"{finding.severity}: {finding}" for finding in check_trait(trait)]


def test_a_trait_file_of_ours_loads_whole(tmp_path: Path) -> None:
    trait = load_trait(write(tmp_path / "grumpy.json", own_json()))
    assert trait.name == "grumpy"
    assert trait.instructions[3].neg == "Be glad, way 3."
    assert trait.extract_questions[19] == "What about thing 19?"
    assert trait.eval_questions[0] == "How do you like matter 0?"
    assert (trait.assistant_pos, trait.assistant_neg) == ("grumpy", "cheerful")
    assert check_trait(trait) == []


def test_the_formats_page_shows_a_trait_that_loads_and_how_it_is_hashed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    trait = load_trait(write(tmp_path / "grumpy.json", example))
    shown = json.loads(example)
    hashed = {
        "assistant": list(shown["assistant_names"].values()),
        "eval": shown["questions"]["eval"],
        "eval_prompt": shown["eval_prompt"],
        "extract": shown["questions"]["extract"],
        "instruction": [list(pair.values()) for pair in shown["instruction"]],
        "name": shown["name"],
    }
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    assert trait.hash == hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def test_writing_a_trait_and_loading_it_again_is_the_identity(tmp_path: Path) -> None:
    trait = load_trait(write(tmp_path / "a.json", own_json()))
    again = load_trait(write(tmp_path / "b.json", trait.to_json()))
    assert dataclasses.replace(again, source=trait.source) == trait
    assert again.hash == trait.hash


def test_assistants_are_named_by_the_trait_when_the_file_does_not(tmp_path: Path) -> None:
    content = own_json()
    del content["assistant_names"]
    trait = load_trait(write(tmp_path / "grumpy.json", content))
    assert trait.system_prompt("pos", 0) == "You are a grumpy assistant. Complain, way 0."
    assert trait.system_prompt("neg", 4) == "You are a helpful assistant. Be glad, way 4."


@pytest.mark.parametrize(
    ("word", "article"),
    [
        ("evil", "an"), ("humorous", "a"), ("honest", "an"), ("useful", "a"), ("unique", "a"),
        ("unhelpful", "an"), ("unimaginative", "an"), ("optimistic", "an"), ("one-sided", "a"),
        ("onerous", "an"), ("European", "a"), ("hourly", "an"), ("utopian", "a"), ("utter", "an"),
        ("ushering", "an"), ("sycophantic", "a"),
    ],
)  # fmt: skip
def test_the_article_follows_the_sound(word: str, article: str) -> None:
    assert indefinite_article(word) == article


@pytest.mark.parametrize(
    "change",
    [
        {"name": "grumpier"},
        {"assistant_names": {"pos": "grumpy", "neg": "sunny"}},
        {"eval_prompt": "{question} {answer}"},
        {"questions": {"extract": ["One?"], "eval": ["Two?"]}},
        {"instruction": [{"pos": "a", "neg": "b"}]},
    ],
)
def test_the_hash_changes_with_whatever_changes_results(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    before = load_trait(write(tmp_path / "a.json", own_json()))
    after = load_trait(write(tmp_path / "b.json", own_json(**change)))
    assert before.hash != after.hash
    assert len(after.hash) == 16


def test_the_hash_ignores_description_and_place(tmp_path: Path) -> None:
    before = load_trait(write(tmp_path / "a.json", own_json()))
    after = load_trait(write(tmp_path / "b.json", own_json(description="Other words.")))
    assert before.hash == after.hash


def test_the_references_two_files_load_from_either_of_them(tmp_path: Path) -> None:
    write(tmp_path / "rude_extract.json", reference_json("Extraction"))
    write(tmp_path / "rude_eval.json", reference_json("Evaluation"))
    first, second = (load_trait(tmp_path / f"rude_{name}.json") for name in ("extract", "eval"))
    assert first.hash == second.hash
    assert first.name == "rude"
    assert first.extract_questions[0] == "Extraction question 0?"
    assert first.eval_questions[0] == "Evaluation question 0?"
    assert first.notes == ()
    assert first.system_prompt("pos", 1) == "You are a rude assistant. Do 1."


def test_the_references_two_folders_load_too(tmp_path: Path) -> None:
    extract = write(tmp_path / "trait_data_extract/rude.json", reference_json("Extraction"))
    write(tmp_path / "trait_data_eval/rude.json", reference_json("Evaluation"))
    trait = load_trait(extract)
    assert trait.eval_questions[0] == "Evaluation question 0?"
    assert load_trait(tmp_path / "trait_data_eval/rude.json").hash == trait.hash


def test_one_reference_file_gives_one_set_and_says_which_is_missing(tmp_path: Path) -> None:
    trait = load_trait(write(tmp_path / "rude_eval.json", reference_json("Evaluation")))
    assert trait.extract_questions == ()
    assert "extraction questions are missing" in trait.notes[0]
    assert len(trait.questions("eval")) == 20
    with pytest.raises(InputError, match=r"no extraction questions; put rude_extract.json beside"):
        trait.questions("extract")


def test_reference_files_that_disagree_are_said_to(tmp_path: Path) -> None:
    path = write(tmp_path / "rude_extract.json", reference_json("Extraction"))
    other = reference_json("Evaluation", eval_prompt="Other {question} {answer}")
    other["instruction"] = other["instruction"][::-1]
    write(tmp_path / "rude_eval.json", other)
    trait = load_trait(path)
    assert trait.eval_prompt == "Other {question} {answer}"
    assert trait.instructions[0].pos == "Do 0."
    assert ["instructions" in trait.notes[0], "prompts" in trait.notes[1]] == [True, True]


@needs_data
def test_a_real_reference_trait_loads_unchanged() -> None:
    assert DATA is not None
    path = Path(DATA) / "reference" / "evil_extract.json"
    content = json.loads(path.read_text())
    trait = load_trait(path)
    assert [pair.pos for pair in trait.instructions] == [p["pos"] for p in content["instruction"]]
    assert list(trait.extract_questions) == content["questions"]
    assert len(trait.eval_questions) == 20
    assert trait.eval_prompt == content["eval_prompt"]
    assert trait.system_prompt("pos", 0).startswith("You are an evil assistant. Your responses")
    require_usable(trait, uses="extract")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "traits"
    for name in ("evil", "grumpy", "optimistic"):
        write(folder / f"{name}.json", own_json(name=name))
    monkeypatch.setattr(traits, "_bundled_folder", lambda: folder)
    return folder


def test_a_bundled_trait_loads_by_its_name(bundled: Path) -> None:
    assert load_trait("optimistic").source == str(bundled / "optimistic.json")


def test_an_unknown_name_gets_the_nearest_ones(bundled: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean 'optimistic'.*evil, grumpy, optimistic"):
        load_trait("optimist")


@pytest.mark.parametrize("name", bundled_traits())
def test_every_trait_that_ships_is_faultless_and_called_as_its_file(name: str) -> None:
    trait = load_trait(name)
    assert trait.name == name
    assert check_trait(trait) == []


def test_seven_traits_ship() -> None:
    assert len({load_trait(name).hash for name in bundled_traits()}) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t\.json is empty"),
        ('{"name": "x",\n "questions": [}', r"t\.json:2 is not valid JSON"),
        ("[1, 2]", r"holds a JSON list"),
        (own_json(eval_promt="x"), r"t\.json:\d+ has the unknown key 'eval_promt'.*'eval_prompt'"),
        (own_json(questions={"extract": ["a"]}), r"t\.json:\d+ lacks the key 'eval'"),
        (own_json(name=""), r"calls its trait ''"),
        (own_json(name="../evil"), r"calls its trait '\.\./evil'; a trait's name goes into file"),
        (own_json(name="coherence"), r"a column of its own"),
        (own_json(name=3), r"t\.json:2 should have a text under 'name', not 3"),
        (own_json(instruction={"pos": "a"}), r"a list of objects under 'instruction'"),
        (own_json(instruction=[{"pos": "a", "neg": None}]), r"a text under 'neg', not null"),
        (reference_json("x", questions=["a", 4]), r"a list of texts under 'questions', not 4"),
        ({"instruction": [], "questions": []}, r"lacks the key 'eval_prompt'"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_by_file_and_line(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path / "t.json", content)
    with pytest.raises(InputError, match=message):
        load_trait(path)


def test_a_key_missing_deep_inside_is_found_on_its_line(tmp_path: Path) -> None:
    pairs = [{"pos": f"p{i}", "neg": f"n{i}"} for i in range(4)] + [{"pos": "last"}]
    path = write(tmp_path / "t.json", own_json(instruction=pairs))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"last"' in text)
    with pytest.raises(InputError, match=rf"t\.json:{line} lacks the key 'neg'"):
        load_trait(path)


def test_a_file_that_is_absent_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no trait file"):
        load_trait(tmp_path / "absent.json")
    (tmp_path / "bytes.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_trait(tmp_path / "bytes.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_trait(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": []}, "error: instruction: there are no instruction pairs"),
        ({"instruction": [{"pos": "a", "neg": "b"}]}, "warning: instruction: 1 pairs instead"),
        (
            {"instruction": [{"pos": "Be so.", "neg": "be  SO."}]},
            "error: instruction[0]: pos and neg say the same",
        ),
        ({"instruction": [{"pos": " ", "neg": "b"}]}, "error: instruction[0].pos: the text"),
        (
            {"questions": {"extract": ["Why?", "why? "], "eval": ["How?"]}},
            "warning: questions.extract[1]: the same question as questions.extract[0]",
        ),
        (
            {"questions": {"extract": ["Why?"], "eval": ["How?", "WHY?"]}},
            "warning: questions.eval[1]: the same question as one for extraction",
        ),
        (
            {"questions": {"extract": ["Why?"], "eval": ["WHY?"]}},
            "error: questions.eval[0]: the same question as one for extraction",
        ),
        ({"questions": {"extract": ["a"], "eval": []}}, "warning: questions.eval: there are no"),
        ({"questions": {"extract": [], "eval": []}}, "error: questions: there are no questions"),
        ({"eval_prompt": "{question} only"}, "error: eval_prompt: {answer} is missing"),
        (
            {"eval_prompt": "{question}\n{answer} }"},
            "error: eval_prompt: the brace '}' on its line 2 has no partner",
        ),
        ({"eval_prompt": "{question} {answer} {"}, "error: eval_prompt: the brace '{' on its"),
        ({"eval_prompt": " "}, "error: eval_prompt: the text is empty"),
        ({"assistant_names": {"pos": "calm", "neg": "Calm"}}, "error: assistant_names: pos and"),
        ({"description": ""}, "warning: description: there is none"),
    ],
)  # fmt: skip
def test_the_check_finds(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    trait = load_trait(write(tmp_path / "t.json", own_json(**change)))
    assert any(found.startswith(message) for found in messages(trait)), messages(trait)


def test_errors_come_first_and_make_a_trait_unusable(tmp_path: Path) -> None:
    change = {"description": "", "eval_prompt": "nothing"}
    trait = load_trait(write(tmp_path / "t.json", own_json(**change)))
    assert [finding.severity for finding in check_trait(trait)] == ["error", "error", "warning"]
    with pytest.raises(InputError, match=r"\{question\} is missing.*\(and 1 more\).*trait check"):
        require_usable(trait, uses="extract")


def test_what_a_command_does_not_use_does_not_stop_it(tmp_path: Path) -> None:
    shared = {"extract": ["Why?", "When?"], "eval": ["Where?", "WHY? ", "How?", "when?"]}
    trait = load_trait(write(tmp_path / "t.json", own_json(questions=shared)))
    assert trait.held_out_questions() == {0: "Where?", 2: "How?"}
    (note,) = require_usable(trait, uses="extract")
    assert "2 questions" in note
    shared["eval"] = ["why?", " "]
    trait = load_trait(write(tmp_path / "t.json", own_json(questions=shared)))
    assert "errors in parts that are not used" in require_usable(trait, uses="extract")[0]
    with pytest.raises(InputError, match=r"questions\.eval\[1\]: the text is empty"):
        require_usable(trait, uses="eval")
    shared["eval"] = ["why?"]
    trait = load_trait(write(tmp_path / "t.json", own_json(questions=shared)))
    with pytest.raises(InputError, match="every evaluation question"):
        trait.held_out_questions()
    trait = load_trait(write(tmp_path / "t.json", own_json(instruction=[])))
    assert require_usable(trait, uses="eval")
    with pytest.raises(InputError, match="no instruction pairs"):
        require_usable(trait, uses="extract")


def test_json_braces_in_a_judge_prompt_are_balanced(tmp_path: Path) -> None:
    prompt = 'Reply {"score": 5}. {question} {answer}'
    assert messages(load_trait(write(tmp_path / "t.json", own_json(eval_prompt=prompt)))) == []
