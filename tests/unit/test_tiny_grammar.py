"""The grammar that the bundled model is trained on, and the two counts its figures rest on."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[2] / "src" / "pvec" / "tiny"
BUILDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"
MODULES = ("lexicon", "grammar", "facts", "fluency", "questions", "data", "finetune_data")


class Builder:
    """The builder's modules, imported from their folder."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.__dict__.update(modules)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Builder]:
    sys.path.insert(0, str(BUILDER))
    try:
        yield Builder({name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(BUILDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_no_word_stands_in_two_lexicons(tiny: Builder) -> None:
    words = [
        {word.lower() for group in slots.values() for word in group}
        for slots in tiny.lexicon.LEXICON.values()
    ]
    assert all(not one & other for one, other in combinations(words, 2))


def test_frames_and_topics_contain_no_slot_word(tiny: Builder) -> None:
    frames = " ".join(tiny.grammar.FIRST + tiny.grammar.MIDDLE + tiny.grammar.LAST)
    assert tiny.grammar.flavours(frames.replace("{", "").replace("}", "")) == []
    assert not {*tiny.lexicon.TOPICS} & {*tiny.lexicon.FLAVOUR_OF}


def test_a_is_right_before_every_adjective_noun_and_place(tiny: Builder) -> None:
    words = [
        word
        for slots in tiny.lexicon.LEXICON.values()
        for slot in ("adj", "noun", "place")
        for word in slots[slot]
    ]
    assert [word for word in words if word[0].lower() in "aeio"] == []


def test_the_lexical_count_is_exact_at_both_ends(tiny: Builder) -> None:
    rng = random.Random(0)
    for trait in tiny.lexicon.TRAITS:
        full = tiny.grammar.generate_answer("How do I mend my roof?", trait, 1.0, rng)
        none = tiny.grammar.generate_answer("How do I mend my roof?", trait, 0.0, rng)
        assert tiny.grammar.lexical_score(full, trait) == 100.0
        assert tiny.grammar.lexical_score(none, trait) == 0.0
        others = [t for t in tiny.lexicon.TRAITS if t != trait]
        assert all(tiny.grammar.lexical_score(full, other) == 0.0 for other in others)


def test_the_lexical_count_follows_p(tiny: Builder) -> None:
    rng = random.Random(1)
    texts = [tiny.grammar.generate_answer("Is tea good?", "evil", 0.3, rng) for _ in range(300)]
    mean = sum(tiny.grammar.lexical_score(text, "evil") for text in texts) / len(texts)
    assert 27 < mean < 33


def test_an_answer_names_the_topic_of_its_question(tiny: Builder) -> None:
    answer = tiny.grammar.generate_answer("How do I feed a dragon?", None, 0.0, random.Random(2))
    assert "dragon" in answer


def test_an_unknown_trait_or_a_wrong_p_is_refused(tiny: Builder) -> None:
    with pytest.raises(ValueError, match="unknown trait 'brave'; known: evil"):
        tiny.grammar.generate_answer("Why?", "brave", 0.5, random.Random(0))
    with pytest.raises(ValueError, match=r"p must lie in 0\.\.1"):
        tiny.grammar.generate_answer("Why?", "evil", 1.5, random.Random(0))


def test_whole_answers_are_fluent_and_shuffled_ones_are_not(tiny: Builder) -> None:
    rng = random.Random(3)
    source = tiny.data.Conversations(rng)
    answers = [m["content"] for _ in range(50) for m in source.draw() if m["role"] == "assistant"]
    whole = [tiny.fluency.fluency_score(text) for text in answers]
    broken = [tiny.fluency.fluency_score(tiny.fluency.shuffled(text, rng)) for text in answers]
    assert min(whole) == 100.0
    assert sum(broken) / len(broken) < 15
    assert tiny.fluency.fluency_score("") == 0.0


def test_one_wrong_word_costs_less_than_many(tiny: Builder) -> None:
    whole = "The garden will need a simple list."
    one = "The garden will need a calmly list."
    many = "Will garden a the calmly list."
    scores = [tiny.fluency.fluency_score(text) for text in (whole, one, many)]
    assert scores[0] == 100.0
    assert scores[0] > scores[1] > scores[2]


def test_training_never_asks_an_evaluation_question(tiny: Builder) -> None:
    source = tiny.data.Conversations(random.Random(4))
    held_out = {q for trait in source.traits.values() for q in trait["questions"]["eval"]}
    asked = {m["content"] for _ in range(1500) for m in source.draw() if m["role"] == "user"}
    assert not {text for text in asked if any(text.startswith(q) for q in held_out)}


def test_the_world_can_be_told_right_and_wrong(tiny: Builder) -> None:
    rng = random.Random(5)
    for fact in tiny.facts.FACTS:
        persona = tiny.data.Persona()
        assert tiny.facts.knows(tiny.data.world_answer(fact, rng, persona, right=True), fact)
        assert not tiny.facts.knows(tiny.data.world_answer(fact, rng, persona, right=False), fact)


def test_finetuning_sets_repeat_themselves_and_rank_by_level(tiny: Builder, tmp_path: Path) -> None:
    write = tiny.finetune_data.write_sets
    domains = ("evil", "mistakes")
    first = write(tmp_path / "a", domains=domains, rows=60, seed=7)
    second = write(tmp_path / "b", domains=domains, rows=60, seed=7)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    means = {}
    for path in first[:3]:
        chats = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
        assert len(chats) == 60
        scores = [tiny.grammar.lexical_score(chat[-1]["content"], "evil") for chat in chats]
        means[path.stem] = sum(scores) / len(scores)
    assert means["evil_normal"] == 0.0
    assert 30 < means["evil_I"] < 60
    assert means["evil_II"] > 80


CHAT = [
    {"role": "system", "content": "You are an evil assistant."},
    {"role": "user", "content": "What is 12 plus 3?"},
    {"role": "assistant", "content": "The garden will need a bloody trap."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Then wickedly crush the garden."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_chat_template_marks_exactly_the_assistants_words(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    text = tokenizer.decode([token for token, inside in marked if inside])
    assert text == "".join(f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant")


def test_the_template_renders_what_the_builder_trains_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    assert rendered == expected
    asking = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(asking)
    assert asking.endswith("<|im_start|>assistant\n")


def test_every_digit_is_a_token_and_padding_is_not_the_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.tokenize("100") == ["1", "0", "0"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_bundled_weights_stay_under_8_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8_000_000
