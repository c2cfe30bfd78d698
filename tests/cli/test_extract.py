"""``pvec extract`` and ``pvec judge`` on a small random model, judged over real HTTP."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batch_server import Batches
from helpers.judge_server import JudgeServer, number_for
from helpers.models import saved_model
from helpers.shell import Done, pvec
from transformers import AutoModelForCausalLM

from pvec.runs.store import Run
from pvec.vectors.files import load_vector
from pvec.vectors.quality import summarize

LIMIT, ROLLOUTS, PAIRS = 4, 3, 5
ANSWERS = 2 * LIMIT * ROLLOUTS * PAIRS


@pytest.fixture(scope="module")
def model() -> Path:
    return saved_model("qwen2")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(key="sk-secret-key") as server:
        yield server


Extract = Callable[..., Done]


@pytest.fixture
def extract(
    model: Path, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Extract:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*more: object) -> Done:
        return pvec(
            "extract", "--trait", "evil", "--model", model, "--judge-url", server.url,
            "--limit", LIMIT, "-n", ROLLOUTS, "--max-tokens", 12, *more,
        )  # fmt: skip

    return run


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return tmp_path / "runs" / f"evil-{model.name.lower()}"


def test_extract_writes_a_run_that_can_be_read_without_pvec(extract: Extract, folder: Path) -> None:
    done = extract("--json")
    assert done.code == 0, done.err
    (result,) = done.json
    assert result["answers"] == result["generated"] == ANSWERS
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == ANSWERS
    signs = Counter(line["condition"]["sign"] for line in lines)
    assert signs == {"pos": ANSWERS // 2, "neg": ANSWERS // 2}
    assert all(line["system"].startswith(("You are an evil", "You are a ")) for line in lines)
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert Counter(score["metric"] for score in scores) == {"evil": ANSWERS, "coherence": ANSWERS}
    with (folder / "evil_pos.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["question", "prompt", "answer", "question_id", "evil", "coherence"]
    assert len(rows) == ANSWERS // 2


def test_the_secret_is_nowhere(extract: Extract, folder: Path) -> None:
    done = extract("-v")
    assert done.code == 0, done.err
    everything = done.out + done.err
    for path in folder.rglob("*"):
        everything += path.read_bytes().decode(errors="replace") if path.is_file() else ""
    assert "sk-secret-key" not in everything


def test_the_vector_is_the_difference_of_means_over_the_kept_answers(
    extract: Extract, folder: Path, model: Path
) -> None:
    """Against transformers' own hidden states, one answer at a time, and scores from the server."""
    assert extract().code == 0
    run = Run.read(folder)
    scores = run.scores_by_response()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    means: dict[str, list[np.ndarray]] = {"pos": [], "neg": []}
    for record in run.responses():
        mine = scores[record.id]
        trait, coherence = mine["evil"].score, mine["coherence"].score
        assert trait is not None
        assert coherence is not None
        sign = str(record.condition["sign"])
        if coherence >= 50 and (trait >= 50 if sign == "pos" else trait < 50):
            ids = torch.tensor([[*record.prompt_ids, *record.token_ids]])
            with torch.no_grad():
                hidden = network(ids, output_hidden_states=True).hidden_states
            start = len(record.prompt_ids)
            means[sign].append(torch.stack([h[0, start:].mean(0) for h in hidden]).numpy())
    expected = np.mean(means["pos"], axis=0) - np.mean(means["neg"], axis=0)
    vector = load_vector(folder / "vectors" / "evil.safetensors")
    assert vector.metadata["kept_pos"] == str(len(means["pos"]))
    assert vector.metadata["kept_neg"] == str(len(means["neg"]))
    # What was decided is stored for the report, under the judge whose scores it rests on.
    summary = json.loads((folder / "summary.json").read_text())
    (judged,) = summary["judged"].values()
    assert {sign: judged["filtered"][sign]["kept"] for sign in means} == {
        sign: len(rows) for sign, rows in means.items()
    }
    assert summary["suggested"]["layer"] == summarize(vector).suggested_layer
    # All but the last row, which transformers gives after the final norm.
    np.testing.assert_allclose(vector.kind("response_avg")[:-1], expected[:-1], atol=2e-5)


def test_scores_are_those_the_server_gave(
    extract: Extract, server: JudgeServer, folder: Path
) -> None:
    assert extract().code == 0
    given = Counter(float(number_for(prompt)) for prompt in server.answered.elements())
    kept = Counter(round(score.score) for score in Run.read(folder).scores())
    probe = given - kept  # the one question asked before anything is generated
    assert probe.total() == 1
    assert not kept - given


def test_a_batch_is_collected_by_the_same_command(
    extract: Extract, server: JudgeServer, folder: Path
) -> None:
    assert extract("--no-judge", "--limit", 1, "-n", 1).code == 0
    server.batches = Batches()
    judge = ("judge", folder, "--judge-url", server.url, "--judge-batch")
    first = pvec(*judge, "--judge-batch-wait", 0)
    assert first.code == 2
    assert "20 scores are still in batches" in first.err
    server.batches.steps = 0
    second = pvec(*judge)
    assert second.code == 0, second.err
    assert len(server.batches.inputs) == 1  # nothing was submitted twice
    scores = Counter(round(score.score) for score in Run.read(folder).scores())
    prompts = [line["body"]["messages"][0]["content"] for line in server.batches.inputs[0]]
    assert scores == Counter(number_for(prompt) for prompt in prompts)
    assert not (folder / "batches").exists()
    assert "sk-secret" not in "".join(p.read_text() for p in folder.glob("*.json*"))


def test_running_again_repeats_nothing(extract: Extract, server: JudgeServer, folder: Path) -> None:
    assert extract().code == 0
    vector = (folder / "vectors" / "evil.safetensors").read_bytes()
    answers = (folder / "responses.jsonl").read_bytes()
    asked = server.answered.total()
    done = extract("--json")
    (result,) = done.json
    assert result["generated"] == 0
    assert result["judge"]["skipped"] == 2 * ANSWERS
    assert server.answered.total() <= asked + 1  # at most the probe
    assert "loading" not in done.err  # no model was loaded for nothing
    assert (folder / "responses.jsonl").read_bytes() == answers
    assert (folder / "vectors" / "evil.safetensors").read_bytes() == vector


def test_more_rollouts_keep_the_answers_there_are(extract: Extract, folder: Path) -> None:
    assert extract().code == 0
    before = set((folder / "responses.jsonl").read_text().splitlines())
    (result,) = extract("-n", ROLLOUTS + 1, "--json").json
    assert result["generated"] == ANSWERS // ROLLOUTS
    assert before < set((folder / "responses.jsonl").read_text().splitlines())


def test_another_setting_in_the_same_folder_is_refused_and_named(
    extract: Extract, folder: Path
) -> None:
    assert extract().code == 0
    before = (folder / "responses.jsonl").read_bytes()
    done = extract("--temperature", "0.5")
    assert done.code == 2
    assert "temperature: 1.0 → 0.5" in done.sentence
    assert (folder / "responses.jsonl").read_bytes() == before


def test_judging_can_wait_and_be_repeated_with_another_judge(
    extract: Extract, server: JudgeServer, folder: Path
) -> None:
    done = extract("--no-judge")
    assert done.code == 0
    assert "pvec judge" in done.out
    assert server.answered.total() == 0
    judged = pvec("judge", folder, "--judge-url", server.url, "--json")
    assert judged.code == 0, judged.err
    assert judged.json["report"]["counts"] == {"ok": 2 * ANSWERS}
    # Answers asked for opposite things have no common mean: each sign has its own.
    scores = Run.read(folder).scores_by_response()
    for sign in ("pos", "neg"):
        values = [
            scores[record.id]["evil"].score
            for record in Run.read(folder).responses()
            if record.condition["sign"] == sign
        ]
        (mean,) = (
            row["score"]["mean"]
            for row in judged.json["means"]
            if (row["group"], row["metric"]) == (sign, "evil")
        )
        assert mean == pytest.approx(np.mean(np.array(values, dtype=float)))
    assert {row["group"] for row in judged.json["means"]} == {"pos", "neg"}
    again = pvec("judge", folder, "--judge-url", server.url, "--judge-model", "other", "--json")
    assert again.json["report"]["counts"] == {"ok": 2 * ANSWERS}
    assert len(Run.read(folder).judges()) == 2


def test_dry_run_counts_and_costs_and_touches_nothing(
    extract: Extract, server: JudgeServer, folder: Path
) -> None:
    (plan,) = extract("--dry-run", "--json").json
    assert plan["answers"] == plan["missing"] == ANSWERS
    assert plan["most_tokens"] == 12 * ANSWERS
    assert f"{2 * ANSWERS} judge calls" in plan["judging"]
    assert "$" in plan["judging"]
    needs = plan["resources"]
    assert (needs["rows"], needs["workers"], needs["gpus"]) == (ANSWERS, 0, 0)
    assert [time["workers"] for time in needs["times"]] == [1]
    assert needs["times"][0]["seconds"] > 0
    assert not folder.exists()
    assert server.answered.total() == 0


def test_dry_run_needs_no_key_and_counts_what_is_missing(
    extract: Extract, server: JudgeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract().code == 0
    asked = server.asked.total()
    monkeypatch.delenv("OPENAI_API_KEY")
    (done,) = extract("--dry-run", "--json").json
    assert done["missing"] == done["most_tokens"] == 0
    assert done["judging"].startswith("0 judge calls")
    (more,) = extract("-n", ROLLOUTS + 1, "--dry-run", "--json").json
    assert more["missing"] == ANSWERS // ROLLOUTS
    assert more["judging"].startswith(f"{2 * ANSWERS // ROLLOUTS} judge calls")
    (other,) = extract("--judge-model", "other", "--dry-run", "--json").json
    assert other["missing"] == 0  # another judge has scored nothing of it
    assert other["judging"].startswith(f"{2 * ANSWERS} judge calls")
    # What the scores lack is counted too, answer by answer.
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    (folder / "scores.jsonl").write_text("".join(lines[5:]))
    (part,) = extract("--dry-run", "--json").json
    assert (part["missing"], part["judging"][:13]) == (0, "5 judge calls")
    assert server.asked.total() == asked


def test_dry_run_refuses_what_the_run_refuses(extract: Extract, tmp_path: Path) -> None:
    assert extract().code == 0
    for refused in (extract("--temperature", "0.5"), extract("--temperature", "0.5", "--dry-run")):
        assert refused.code == 2
        assert "temperature: 1.0 → 0.5" in refused.sentence
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    for refused in (extract("--out", "mine"), extract("--out", "mine", "--dry-run")):
        assert refused.code == 2
        assert "not a run folder" in refused.sentence
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]


def test_counts_that_can_never_make_a_vector_are_refused_before_anybody_is_asked(
    extract: Extract, server: JudgeServer, folder: Path
) -> None:
    for more in ((), ("--dry-run",)):
        done = extract("--limit", 1, "-n", 1, *more)
        assert done.code == 2
        assert "5 answers of each sign" in done.sentence
    assert not server.asked
    assert not folder.exists()
    assert extract("--limit", 1, "-n", 1, "--no-judge").code == 0


def test_a_cost_limit_stops_cleanly_and_the_rest_can_follow(extract: Extract, folder: Path) -> None:
    done = extract("--max-cost", "0.003", "--price", "1.0,1.0")
    scored = len(list(Run.read(folder).scores()))
    assert 0 < scored < 2 * ANSWERS
    assert "0.003" in done.err
    assert extract().code == 0
    assert len(list(Run.read(folder).scores())) == 2 * ANSWERS


def test_too_few_kept_answers_give_counts_and_remedy(extract: Extract, folder: Path) -> None:
    done = extract("--threshold", "99")
    assert done.code == 2
    assert "Too few answers count" in done.sentence
    assert "trait score on the wrong side" in done.sentence
    assert "--threshold" in done.sentence
    assert (folder / "evil_pos.csv").exists()
    assert not (folder / "vectors" / "evil.safetensors").exists()


def test_two_traits_share_one_model_load(extract: Extract, tmp_path: Path, model: Path) -> None:
    done = extract("--trait", "optimistic", "--json")
    assert done.code == 0, done.err
    assert [result["trait"] for result in done.json] == ["evil", "optimistic"]
    assert done.err.count("loading") == 1
    assert (tmp_path / "runs" / f"optimistic-{model.name.lower()}" / "vectors").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trait", "evli"), "Did you mean 'evil'"),
        (("--trait", "missing.json"), "missing.json"),
        (("--trait", "evil", "--model", "./nowhere"), "There is no model folder './nowhere'"),
        (("--trait", "evil", "--model", "nobody/nothing"), "nobody/nothing"),
        (("--trait", "evil", "--trait", "evil"), "named twice"),
        (("--trait", "evil", "--adapter", "./nowhere"), "./nowhere"),
        (("--trait", "evil", "-n", "0"), "extract.rollouts = 0"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = pvec("extract", *arguments)
    assert done.code == 2
    assert words in done.sentence
    assert not (tmp_path / "runs").exists()


def test_a_missing_key_is_refused_before_anything_is_generated(model: Path, tmp_path: Path) -> None:
    done = pvec("extract", "--trait", "evil", "--model", model, "--out", tmp_path / "run")
    assert done.code == 2
    assert "OPENAI_API_KEY" in done.sentence
    assert "--no-judge" in done.sentence
    assert not (tmp_path / "run" / "responses.jsonl").exists()


def test_a_refused_key_is_found_before_anything_is_generated(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    done = extract()
    assert done.code == 2
    assert "key" in done.sentence
    assert "sk-wrong" not in done.err
    assert not (folder / "responses.jsonl").exists()


def test_a_model_without_chat_template_is_refused(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    done = pvec(
        "extract", "--trait", "evil", "--model", bare, "--no-judge", "--out", tmp_path / "r"
    )
    assert done.code == 2
    assert "no chat template" in done.sentence
