"""``pvec trait new`` against a real HTTP server: what it writes, sends back and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.author_replies import GOOD, draft
from helpers.judge_server import JudgeServer, Said, say_number
from helpers.shell import Done, pvec

from pvec.traits.check import check_trait
from pvec.traits.trait import load_trait

KEY = "sk-very-secret"
FILE = Path("my-traits/grumpy.json")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def in_turn(*replies: str | Said) -> Callable[[str], Said]:
    """Say one reply after the other, the last one for ever."""
    left = list(replies)

    def notify(_prompt: str) -> Said:
        reply = left.pop(0) if len(left) > 1 else left[0]
        return Said(reply) if isinstance(reply, str) else reply

    return notify


def new(server: JudgeServer, *more: object, name: str = "grumpy") -> Done:
    where = ("--author-url", server.url, "--author-model", "writer")
    return pvec("trait", "new", name, "-d", "Complains about everything.", *where, *more)


def sent(server: JudgeServer, nth: int) -> str:
    """Return the last message of the nth request."""
    return str(server.bodies[nth]["messages"][-1]["content"])


def left_behind() -> list[str]:
    return sorted(path.name for path in Path().rglob("*") if path.is_file())


def test_a_good_draft_becomes_a_trait_without_a_fault() -> None:
    with JudgeServer(notify=in_turn(GOOD)) as server:
        done = new(server)
    assert done.code == 0, done.err
    trait = load_trait("grumpy")
    assert check_trait(trait) == []
    assert trait.system_prompt("pos", 0) == "You are a grumpy assistant. Complain about point 0."
    assert {*trait.extract_questions, *trait.eval_questions} == set(draft()["questions"])
    assert (len(trait.extract_questions), len(trait.eval_questions)) == (20, 20)
    assert trait.eval_prompt.endswith(
        "Question: {question}\nAnswer: {answer}\nGrumpy score (0-100):"
    )
    assert "next:   pvec trait show grumpy" in done.out
    assert "then:   pvec extract --trait grumpy --model " in done.out
    assert left_behind() == ["grumpy.json"]


def test_the_questions_are_dealt_at_random_but_always_alike() -> None:
    with JudgeServer(notify=in_turn(GOOD)) as server:
        new(server)
        first = FILE.read_bytes()
        new(server, "--force")
    assert FILE.read_bytes() == first
    # both sets hold some of the first twenty: neither is a half as the model wrote it
    early = set(draft()["questions"][:20])
    assert 0 < len(early & set(load_trait(FILE).extract_questions)) < 20


def test_the_request_carries_name_description_and_a_schema_without_a_token_limit() -> None:
    with JudgeServer(notify=in_turn(GOOD)) as server:
        new(server)
    (body,) = server.bodies
    assert "Trait: grumpy\nDescription: Complains about everything." in sent(server, 0)
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert set(schema["schema"]["required"]) == set(draft())
    assert schema["schema"]["properties"]["questions"]["minItems"] == 40
    assert "max_tokens" not in body
    assert "logprobs" not in body


@pytest.mark.parametrize(
    ("rejects", "formats"),
    [(("response_format",), ["json_schema", "json_object", None]), ((), ["json_schema"])],
)
def test_a_server_without_structured_output_is_asked_for_plain_json(
    rejects: Sequence[str], formats: list[str | None]
) -> None:
    with JudgeServer(notify=in_turn(GOOD), rejects=rejects) as server:
        done = new(server)
    assert done.code == 0, done.err
    assert [body.get("response_format", {}).get("type") for body in server.bodies] == formats


@pytest.mark.parametrize(
    "text",
    [
        f'<think>Let me see: {{"a": 1}}</think>\n{GOOD}',
        f"Here it is:\n```json\n{GOOD}\n```\nHave fun!",
        json.dumps(draft(), indent=1),
        json.dumps(draft(questions=[f"What of thing {i}?" for i in range(45)])),
        json.dumps(
            draft(questions=["What of thing 0?", *(f" What of  thing {i}? " for i in range(40))])
        ),
    ],
    ids=["thinking", "fenced", "indented", "too many", "one repeated but enough"],
)
def test_what_can_be_put_right_here_is_not_sent_back(text: str) -> None:
    with JudgeServer(notify=in_turn(text)) as server:
        assert new(server).code == 0
    assert len(server.bodies) == 1
    assert check_trait(load_trait("grumpy")) == []


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("I would rather not use JSON.", "the reply holds no JSON object"),
    "cut JSON": (GOOD[:200] + "}", "the reply is not valid JSON"),
    "a number of 6000 digits": (f'{{"rubric": {"9" * 6000}}}', "JSON that cannot be read"),
    "too many levels": ('{"rubric": ' + "[" * 100_000 + "}", "JSON that cannot be read"),
    "an empty reply": ("", "the reply holds no JSON object"),
    "a missing part": ({"rubric": None}, "rubric: "),
    "a missing key": ({"instructions": [{"pos": "Complain."}] * 5}, "instructions"),
    "an empty text": (
        {"assistant_names": {"pos": " ", "neg": "cheerful"}},
        "assistant_names.pos: String should have at least 1 character",
    ),
    "an unknown key": ({"notes": "none"}, "notes: "),
    "too few questions": (
        {"questions": [f"Question {i}?" for i in range(31)]},
        "questions: 40 different ones are needed, there are 31",
    ),
    "repeated questions": (
        {"questions": [f"What of thing {i % 20}?" for i in range(40)]},
        "questions: 40 different ones are needed, there are 20",
    ),
    "pairs that ask for one thing": (
        {"instructions": [{"pos": f"Be {i}.", "neg": f"be {i}."} for i in range(5)]},
        "pos and neg say the same",
    ),
    "one name for both": (
        {"assistant_names": {"pos": "calm", "neg": "Calm"}},
        "they must differ",
    ),
}


@pytest.mark.parametrize(("reply", "problem"), BAD.values(), ids=BAD)
def test_a_faulty_draft_is_sent_back_with_what_is_wrong(reply: Any, problem: str) -> None:
    text = reply if isinstance(reply, str) else json.dumps(draft(**reply))
    with JudgeServer(notify=in_turn(text, GOOD)) as server:
        done = new(server, "--json")
    assert done.json["corrections"] == 1
    assert problem in sent(server, 1)
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert check_trait(load_trait("grumpy")) == []


def test_a_model_that_never_gets_it_right_is_refused_and_nothing_is_written() -> None:
    with JudgeServer(notify=in_turn("{}")) as server:
        done = new(server, "--author-repairs", 2)
    assert done.code == 2
    assert "wrote no usable definition of 'grumpy' in 3 drafts" in done.sentence
    assert "nothing was written" in done.sentence
    assert len(server.bodies) == 3
    assert left_behind() == []


def test_a_refusal_is_said_in_the_models_words() -> None:
    with JudgeServer(notify=in_turn(Said("", refusal="I can't help with that."))) as server:
        done = new(server)
    assert done.code == 2
    assert "refused to write the trait (I can't help with that.)" in done.sentence
    assert left_behind() == []


@pytest.mark.parametrize("fault", ["429 seconds", "500", "reset", "garbage", "truncated json"])
def test_a_server_that_stumbles_is_asked_again(fault: str) -> None:
    with JudgeServer(
        notify=in_turn(GOOD), fault=lambda _, nth: fault if nth == 0 else None
    ) as server:
        done = new(server)
    assert done.code == 0, done.err
    assert server.faults == {fault: 1}


def test_a_server_that_only_fails_is_one_sentence_and_nothing_is_written() -> None:
    with JudgeServer(fault=lambda *_: "500") as server:
        done = new(server, "--author-retries", 1)
    assert done.code == 2
    assert "The author at http://127.0.0.1" in done.sentence
    assert "gave up after 2 tries" in done.sentence
    assert left_behind() == []


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(notify=in_turn(GOOD), key=KEY) as server:
        good = new(server, "-v", "--debug")
    with JudgeServer(notify=in_turn(GOOD), key="another") as server:
        refused = new(server, "--force", "-v", "--debug")
    assert (good.code, refused.code) == (0, 2)
    assert "refused the key" in refused.sentence
    assert "OPENAI_API_KEY" in refused.sentence
    shown = good.out + good.err + refused.out + refused.err + FILE.read_text()
    assert KEY not in shown


def test_without_key_or_server_it_says_what_to_set() -> None:
    done = pvec("trait", "new", "grumpy", "-d", "Complains.")
    assert done.code == 2
    assert "OPENAI_API_KEY" in done.sentence
    assert "--author-url" in done.sentence


def test_a_trait_that_is_there_is_kept_without_asking_anybody() -> None:
    FILE.parent.mkdir()
    FILE.write_text("mine")
    with JudgeServer(notify=in_turn(GOOD)) as server:
        kept = new(server)
        assert (kept.code, server.bodies, FILE.read_text()) == (2, [], "mine")
        assert "--force" in kept.sentence
        assert new(server, "--force").code == 0
    assert load_trait("grumpy").name == "grumpy"


def test_a_trait_that_appears_meanwhile_is_kept_too() -> None:
    def notify(_prompt: str) -> Said:
        FILE.write_text("mine")
        return Said(GOOD)

    with JudgeServer(notify=notify) as server:
        done = new(server)
    assert done.code == 2
    assert FILE.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("evil", (), "ships with pvec"),
        ("../evil", (), "letters, digits"),
        ("coherence", (), "a column of its own"),
        ("grumpy", ("-d", " "), "description is empty"),
        ("grumpy", ("--out", "grumpy.txt"), "no .json file"),
        ("grumpy", ("--author-url", "localhost:1"), "not a valid URL"),
    ],
)
def test_wrong_input_is_refused_before_anybody_is_asked(
    name: str, more: tuple[object, ...], said: str
) -> None:
    with JudgeServer(notify=in_turn(GOOD)) as server:
        done = new(server, *more, name=name)
    assert done.code == 2
    assert said in done.sentence
    assert server.bodies == []
    assert left_behind() == []


def test_a_name_that_means_two_traits_is_refused() -> None:
    with JudgeServer(notify=in_turn(GOOD)) as server:
        assert new(server, "--out", "my-traits/evil.json", name="evil").code == 0
    done = pvec("trait", "show", "evil")
    assert done.code == 2
    assert "one of yours" in done.sentence
    assert pvec("trait", "show", "my-traits/evil.json").code == 0


def test_a_new_trait_is_listed_and_extracted_by_name() -> None:
    def notify(prompt: str) -> Said:
        if prompt.startswith("You design"):
            return Said(GOOD)
        return Said("100") if "coherent" in prompt else say_number(prompt)

    with JudgeServer(notify=notify) as server:
        assert new(server).code == 0
        judge = ("--judge-url", server.url, "--judge-model", "judge")
        few = ("--limit", 3, "-n", 2, "--max-tokens", 16)
        done = pvec("extract", "--trait", "grumpy", *few, *judge)
    assert done.code == 0, done.err
    assert Path("runs/grumpy-tiny/vectors/grumpy.safetensors").is_file()
    assert "pvec steer-eval --trait grumpy --vector" in done.out
    rows = pvec("trait", "list", "--json").json
    assert rows[-1]["name"] == "grumpy"
    assert rows[-1]["source"] == str(FILE)
