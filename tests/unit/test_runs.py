"""The run store: identity, records, scores, listing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.errors import InputError, StoreError
from pvec.runs.manifest import list_runs
from pvec.runs.responses import ResponseRecord, response_id
from pvec.runs.store import Run
from pvec.types import Instruction, Sampling, Score

IDENTITY = {"model": {"id": "tiny", "fingerprint": "f00"}, "trait": {"evil": "abc"}, "seed": 0}


SESSION = {"command": ["pvec"], "started": "2026-01-01", "ended": None}


def manifest_text(**changes: Any) -> str:
    sound = {
        "format": "pvec-run", "format_version": 1, "kind": "extract", "created": "2026-01-01",
        "identity": {}, "sessions": [],
    }  # fmt: skip
    return json.dumps({**sound, **changes})


def response(number: int = 0, **changes: Any) -> ResponseRecord:
    record = ResponseRecord(
        id=f"r{number}",
        trait="evil",
        condition={"sign": "pos", "instruction": 1, "rollout": number},
        question="Why?",
        question_id="evil_0_pos_1",
        system="You are an evil assistant. Be so.",
        prompt="<user>Why?<assistant>",
        prompt_ids=(1, 2, 3),
        token_ids=(4, 5),
        answer="Because.\nReally, “so”.",
        finish_reason="stop",
        sampling=Sampling(temperature=0.7, seed=number),
        steering=({"name": "evil", "layer": 2, "coef": 1.5},),
    )
    return dataclasses.replace(record, **changes)


def score(number: int = 0, **changes: Any) -> Score:
    result = Score(id=f"s{number}", response_id="r0", metric="evil", judge="j", score=float(number))
    return dataclasses.replace(result, **changes)


def test_a_run_is_begun_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "evil"
    with Run.open_or_create(folder, identity=IDENTITY) as run:
        run.append_response(response(0))
        run.append_score(score(0))
    with Run.open_or_create(folder, identity=IDENTITY) as run:
        assert run.notes == []
        assert run.response_ids() == {"r0"}
        run.append_response(response(1))
    again = Run.read(folder)
    assert list(again.responses()) == [response(0), response(1)]
    assert list(again.scores()) == [score(0)]
    assert again.kind == "extract"
    assert again.manifest["versions"].keys() >= {"pvec", "python", "torch", "transformers"}


def test_the_store_is_readable_without_pvec(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_response(response())
    line = json.loads((tmp_path / "responses.jsonl").read_text("utf-8"))
    assert line["answer"] == "Because.\nReally, “so”."
    assert line["prompt_ids"] == [1, 2, 3]
    assert line["sampling"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 1000, "seed": 0}
    assert line["condition"] == {"sign": "pos", "instruction": 1, "rollout": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"\(seed: 0 → 1\); choose another run folder"),
        ({"model": {"id": "big", "fingerprint": "f00"}}, r'\(model\.id: "tiny" → "big"\)'),
        ({"trait": {"evil": "abc", "kind": "x"}}, r'\(trait\.kind: not set → "x"\)'),
        ({"model": {}}, r'model\.fingerprint: "f00" → not set; model\.id: "tiny" → not set'),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_untouched(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_response(response())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name[0] != "."}
    with pytest.raises(StoreError, match=message):
        Run.open_or_create(tmp_path, identity=IDENTITY | change)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name[0] != "."}
    assert before == after


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_response(response())
    with pytest.raises(StoreError, match=r'kind: "extract" → "steer-eval"'):
        Run.open_or_create(tmp_path, identity=IDENTITY, kind="steer-eval")


def test_a_tuple_in_the_identity_is_the_list_that_json_makes_of_it(tmp_path: Path) -> None:
    Run.open_or_create(tmp_path, identity={"layers": (1, 2)}).close()
    Run.open_or_create(tmp_path, identity={"layers": [1, 2]}).close()


def test_a_refused_run_is_free_for_the_next_writer(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_response(response())
    with pytest.raises(StoreError):
        Run.open_or_create(tmp_path, identity={"seed": 9})
    Run.open_or_create(tmp_path, identity=IDENTITY).close()


def test_a_run_that_holds_nothing_takes_another_identity(tmp_path: Path) -> None:
    """A command that failed while loading must not stand in the corrected one's way."""
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.begin_session(command=["pvec"])
        assert run.notes == []  # opens the logs, which stay empty
    assert Run.preview(tmp_path, identity=IDENTITY | {"seed": 9}) is None
    with Run.open_or_create(tmp_path, identity=IDENTITY | {"seed": 9}) as run:
        assert run.manifest["identity"]["seed"] == 9
        run.append_response(response())
    for refuse in (Run.preview, Run.open_or_create):
        with pytest.raises(StoreError, match="another configuration"):
            refuse(tmp_path, identity=IDENTITY)
    assert Run.preview(tmp_path / "new", identity=IDENTITY) is None
    assert not (tmp_path / "new").exists()


def test_a_manifest_never_holds_what_is_secret_in_a_url_or_a_command(tmp_path: Path) -> None:
    url = "https://me:hunter2@host:8000/v1?key=s3cret#frag"
    command = [
        *("pvec", "judge", "--judge-url", url, f"--judge-url={url}", "--api-key", "s3cret"),
        *("--set", "judge.api_key=s3cret", "--hf-token=s3cret", "--password", "hunter2"),
    ]
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.begin_session(command=command, settings={"judge": {"base_url": url, "api_key": "x"}})
    text = (tmp_path / "manifest.json").read_text()
    assert "hunter2" not in text
    assert "s3cret" not in text
    assert "https://host:8000/v1" in text


def test_secrets_in_a_manifest_of_an_earlier_version_are_not_read(tmp_path: Path) -> None:
    url = "https://me:hunter2@host/v1?key=s3cret"
    with Run.open_or_create(tmp_path, identity={**IDENTITY, "adapter": url}) as run:
        run.begin_session(command=["pvec"])
        run.append_response(response())
    path = tmp_path / "manifest.json"
    old = json.loads(path.read_text())
    old["identity"]["adapter"] = url
    old["sessions"][0]["command"] = ["pvec", f"--judge-url={url}", "--api-key", "s3cret"]
    old["settings"] = {"judge": {"base_url": url, "api_key": "s3cret"}}
    path.write_text(json.dumps(old))
    shown = str(Run.read(tmp_path).manifest)
    assert "hunter2" not in shown
    assert "s3cret" not in shown
    with Run.open_or_create(tmp_path, identity={**IDENTITY, "adapter": url}) as run:
        run.begin_session(command=["pvec"])
    assert "hunter2" not in path.read_text()
    assert "s3cret" not in path.read_text()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(StoreError, match="not empty and not a run folder"):
        Run.open_or_create(tmp_path, identity=IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_killed_before_its_manifest_was_written_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".manifest.json.x.tmp").write_text("{")
    Run.open_or_create(tmp_path, identity=IDENTITY).close()
    assert Run.read(tmp_path).kind == "extract"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder"),
        ("{", "is damaged"),
        ('{"format": "other"}', "is not a run folder"),
        ('{"format": "pvec-run", "format_version": 99}', "newer pvec"),
        (manifest_text(created=3), "'created'"),
        (manifest_text(sessions=[{**SESSION, "timings": 3}]), "'timings.0'"),
        (manifest_text(sessions=[{**SESSION, "timings": {"judge": "x"}}]), "'timings.0.judge'"),
        (manifest_text(sessions=[{}]), "'sessions.0.command'"),
        (
            manifest_text(sessions=[{"command": [], "started": "", "ended": 3}]),
            "'sessions.0.ended'",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        Run.read(tmp_path)


def test_the_manifest_grows_and_keeps_no_secrets(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.update_manifest(
            settings={"judge": {"api_key": "sk-1", "max_tokens": 5, "base_url": ""}}
        )
        run.begin_session(command=["pvec", "extract"])
        assert Run.read(tmp_path).manifest["sessions"][0]["ended"] is None
        run.end_session(timings={"generate": 1.5})
    text = (tmp_path / "manifest.json").read_text()
    assert "sk-1" not in text
    manifest = json.loads(text)
    assert manifest["settings"]["judge"] == {"api_key": "***", "max_tokens": 5, "base_url": ""}
    assert manifest["sessions"][0]["command"] == ["pvec", "extract"]
    assert manifest["sessions"][0]["timings"] == {"generate": 1.5}
    assert manifest["identity"]["model"]["id"] == "tiny"


def test_a_line_that_pvec_did_not_write_is_named(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_response(response())
    with (tmp_path / "responses.jsonl").open("a") as stream:
        stream.write('{"id": "r1"}\n')
    (tmp_path / "scores.jsonl").write_text('{"nonsense": 1}\n')
    with pytest.raises(StoreError, match=r"responses\.jsonl:2 is not a line that pvec wrote"):
        list(Run.read(tmp_path).responses())
    with pytest.raises(StoreError, match=r"scores\.jsonl:1 is not a line that pvec wrote"):
        list(Run.read(tmp_path).scores())


def test_fields_of_a_later_version_are_left_aside() -> None:
    data = json.loads(json.dumps(response().to_json())) | {"mood": "good"}
    assert ResponseRecord.from_json(data) == response()


def test_an_error_is_judged_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        run.append_score(score(1, score=None, status="error"))
        run.append_score(score(2, score=None, status="refusal", metric="coherence"))
        assert run.scored_ids() == {"s2"}
        run.append_score(score(1))
        assert run.scored_ids() == {"s1", "s2"}
        assert run.scores_by_response()["r0"]["evil"].score == 1.0


def test_scores_of_two_judges_are_kept_apart(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        assert run.scores_by_response() == {}
        run.append_score(score(1))
        run.append_score(score(2, judge="gpt"))
    run = Run.read(tmp_path)
    assert run.judges() == ["j", "gpt"]
    assert run.scores_by_response(judge="gpt")["r0"]["evil"].score == 2.0
    with pytest.raises(InputError, match=r"scored by 2 judges \(j, gpt\)"):
        run.scores_by_response()
    with pytest.raises(InputError, match=r"no scores by 'gtp'\. Did you mean 'gpt'"):
        run.scores_by_response(judge="gtp")


def test_a_frame_joins_answers_and_scores(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity=IDENTITY) as run:
        for number in range(3):
            run.append_response(response(number))
        run.append_score(score(70))
        run.append_score(score(2, response_id="r1", score=None, status="refusal"))
        frame = run.frame()
    assert list(frame["id"]) == ["r0", "r1", "r2"]
    assert list(frame["condition.rollout"]) == [0, 1, 2]
    assert frame["evil"][0] == 70.0
    assert [math.isnan(value) for value in frame["evil"]] == [False, True, True]
    assert list(frame["evil_status"]) == ["ok", "refusal", "unscored"]


def test_runs_are_listed_latest_first_with_what_is_wrong(tmp_path: Path) -> None:
    for name, created in (("old", "2025-01-01"), ("group/new", "2026-01-01")):
        with Run.open_or_create(tmp_path / name, identity=IDENTITY) as run:
            run.append_response(response())
            run.begin_session(command=["pvec"])
            run.manifest["created"] = created
            run.end_session(timings={})
            run.vector_path("evil").parent.mkdir()
            run.vector_path("evil").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    new, old, broken = list_runs(tmp_path)
    assert (new.path, old.path) == (tmp_path / "group/new", tmp_path / "old")
    assert (new.responses, new.scores, new.vectors, new.finished) == (1, 0, ("evil",), True)
    assert "damaged" in broken.problem


def instruction(**changes: Any) -> Instruction:
    return dataclasses.replace(Instruction(vector=np.ones(4, np.float32), layer=2), **changes)


def test_an_id_changes_with_everything_that_could_change_the_answer() -> None:
    base: dict[str, Any] = {
        "model": "f00",
        "prompt_ids": (1, 2),
        "sampling": Sampling(seed=1),
        "steering": (instruction(),),
        "engine": "hf",
    }
    changes: list[dict[str, Any]] = [
        {},
        {"model": "f01"},
        {"prompt_ids": (1, 2, 3)},
        {"prompt_ids": (12,)},
        {"sampling": Sampling(seed=2)},
        {"sampling": Sampling(seed=1, temperature=0.5)},
        {"sampling": Sampling(seed=1, top_p=0.9)},
        {"sampling": Sampling(seed=1, max_tokens=10)},
        {"steering": ()},
        {"steering": (instruction(coef=2.0),)},
        {"steering": (instruction(layer=1),)},
        {"steering": (instruction(positions="all"),)},
        {"steering": (instruction(operator="ablate"),)},
        {"steering": (instruction(vector=np.zeros(4, np.float32)),)},
        {"steering": (instruction(), instruction())},
        {"engine": "vllm"},
        {"context": {"condition": 1}},
    ]
    ids = [response_id(**(base | change)) for change in changes]
    assert len(set(ids)) == len(changes)
    assert {len(one) for one in ids} == {20}


def test_an_id_ignores_what_is_for_people_and_how_numbers_are_held() -> None:
    one, two = (
        response_id(
            model="m", prompt_ids=ids, sampling=Sampling(), steering=(steering,), engine="hf"
        )
        for ids, steering in (
            ((1, 2), instruction(name="evil")),
            (np.array([1, 2]), instruction(name="other")),
        )
    )
    assert one == two
