"""``pvec screen``, ``monitor`` and ``shift`` on a small random model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.judge_server import JudgeServer, number_for
from helpers.models import save_adapter, saved_model
from helpers.shell import Done, pvec
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from pvec.runs.store import Run
from pvec.vectors.files import load_vector, save_vector
from pvec.vectors.vector import PersonaVector

Call = Callable[..., Done]
LAYER = 2
SAMPLES = 12


@pytest.fixture(scope="module")
def model() -> Path:
    return saved_model("qwen2")


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = PersonaVector(trait="evil", kinds={"response_avg": rows})
    return save_vector(one, tmp_path_factory.mktemp("vectors") / "evil.safetensors")


@pytest.fixture
def project(model: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, base: bool = True) -> Done:
        head: tuple[object, ...] = ("--model", model) if base else ()
        if arguments[0] in ("screen", "monitor"):
            head += ("--max-tokens", 8)
        return pvec(*arguments, *head, "--vector", vector, "--layer", LAYER, "-q")

    return run


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        yield server


def write_samples(path: Path, *, answers: str, count: int = SAMPLES) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": f"{answers} {'word ' * (i % 4)}"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# ── screening ───────────────────────────────────────────────────────────────────────────────────


def test_a_difference_is_the_response_minus_the_models_own(
    project: Call, tmp_path: Path, model: Path, vector: Path
) -> None:
    """Against transformers' states, of the text in the file and of the answers in the run."""
    data = write_samples(tmp_path / "data.jsonl", answers="start early")
    done = project("screen", data, "--out", "run")
    assert done.code == 0, done.err
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    v = torch.from_numpy(load_vector(vector).row(LAYER))
    natural = {record.prompt: record for record in Run.read("run").responses()}
    assert len(natural) == SAMPLES

    def along(prompt: list[int], answer: list[int], *, skip: int = 0) -> float:
        with torch.no_grad():
            states = network(torch.tensor([prompt + answer]), output_hidden_states=True)
        mean = states.hidden_states[LAYER][0, len(prompt) + skip :].mean(0)
        return float(mean @ v / v.norm())

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = data.read_text().splitlines()
    for row, line in zip(rows_of(tmp_path / "run" / "samples.csv"), lines, strict=True):
        user, assistant = json.loads(line)["messages"]
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(assistant["content"], add_special_tokens=False)["input_ids"]
        own = natural[prompt]
        thought = own.think_tokens
        expected = along(ids, answer) - along(ids, list(own.token_ids), skip=thought)
        if thought == len(own.token_ids):  # nothing but thinking: no natural response
            assert row["evil_layer2_difference"] == ""
            continue
        assert float(row["evil_layer2_difference"]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_thinking_that_is_left_out_of_training_answers_is_told(
    model: Path, vector: Path, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", answers="<think>plan</think> start", count=3)
    options = ("--model", model, "--vector", vector, "--layer", LAYER, "--max-tokens", 8)
    done = pvec("screen", data, *options, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    told = " ".join(done.err.split())
    assert "responses: 3 answers think: their" in told
    assert "tokens of thinking are left out" in told


def test_the_filter_takes_what_lies_above_the_clean_percentile(
    project: Call, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", answers="start early")
    clean = write_samples(tmp_path / "clean.jsonl", answers="soup and bread, with")
    done = project(
        "screen", data, "--reference", clean, "--percentile", 60, "--out", "run", "--json"
    )
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "run" / "samples.csv")
    differences = {
        name: np.array([float(r["evil_layer2_difference"]) for r in rows if r["set"] == name])
        for name in ("data", "reference")
    }
    threshold = np.percentile(differences["reference"], 60)
    (column,) = done.json["columns"]
    assert column["score"]["threshold"] == pytest.approx(threshold)
    wins = stats.mannwhitneyu(differences["data"], differences["reference"]).statistic
    assert column["score"]["auc"] == pytest.approx(wins / SAMPLES**2)
    gone = differences["data"] > threshold
    lines = data.read_bytes().splitlines(keepends=True)
    kept, removed = tmp_path / "data.kept.jsonl", tmp_path / "data.removed.jsonl"
    assert kept.read_bytes() == b"".join(x for x, g in zip(lines, gone, strict=True) if not g)
    assert removed.read_bytes() == b"".join(x for x, g in zip(lines, gone, strict=True) if g)
    again = project("screen", data, "--reference", clean, "--out", "run")
    assert again.code == 2
    assert "is there already" in again.sentence


def test_natural_answers_are_generated_once_and_serve_any_vector(
    project: Call, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", answers="start early")
    assert project("screen", data, "--out", "run", "--json").json["generated"] == SAMPLES
    rows = np.random.default_rng(9).normal(size=(4, 32)).astype(np.float32)
    other = PersonaVector(trait="humorous", kinds={"response_avg": rows})
    save_vector(other, tmp_path / "humorous.safetensors")
    again = project("screen", data, "--out", "run", "--vector", "humorous.safetensors", "--json")
    assert again.json["generated"] == 0
    assert [column["vector"] for column in again.json["columns"]] == ["humorous", "evil"]


def test_cheap_modes_generate_little_and_say_what_they_are_worth(
    project: Call, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data.jsonl", answers="start early", count=40)
    subset = project(
        "screen", data, "--natural", "subset", "--subset", 0.6, "--out", "a", "--json"
    ).json
    assert subset["generated"] <= 24 + 10  # and those of the most suspicious samples
    assert -1 <= subset["columns"][0]["agreement"]["r"] <= 1
    assert subset["columns"][0]["agreement"]["n"] == 24
    prompt = project("screen", data, "--natural", "prompt", "--out", "b", "--json").json
    assert prompt["generated"] <= 10
    rows = rows_of(tmp_path / "b" / "samples.csv")
    assert project("project", data, "--projection-type", "prompt_last_proj").code == 0
    lines = (tmp_path / "data.projected.jsonl").read_text().splitlines()
    column = next(k for k in json.loads(lines[0]) if k.endswith("prompt_last_proj_layer2"))
    expected = [json.loads(line)[column] for line in lines]
    natural = [float(row["evil_layer2_natural"]) for row in rows]
    np.testing.assert_allclose(natural, expected, rtol=1e-4, atol=1e-5)


# ── monitoring ──────────────────────────────────────────────────────────────────────────────────


def write_prompts(path: Path) -> Path:
    lines = [
        {
            "messages": [
                {"role": "system", "content": f"You are {degree} evil."},
                {"role": "user", "content": f"question {i}?"},
            ],
            "condition": degree,
        }
        for degree in ("not", "slightly", "very")
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_prompts_are_answered_judged_and_correlated(
    project: Call, tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    options = ("--judge-url", server.url, "-n", 2, "--out", "run", "--json")
    done = project("monitor", prompts, *options)
    assert done.code == 0, done.err
    found = done.json
    assert (found["prompts"], found["conditions"], found["generated"]) == (12, 3, 24)
    assert server.asked
    assert number_for("x") <= 100  # scores are this server's
    rows = rows_of(tmp_path / "run" / "prompts.csv")
    x = [float(row["prompt_last_proj_layer2"]) for row in rows]
    y = [float(row["score"]) for row in rows]
    (column,) = found["columns"]
    assert column["overall"]["r"] == pytest.approx(stats.pearsonr(x, y).statistic)
    groups = [row["condition"] for row in rows]
    centred = [
        frame["value"] - frame.groupby("condition")["value"].transform("mean")
        for frame in (pd.DataFrame({"value": v, "condition": groups}) for v in (x, y))
    ]
    assert column["within"]["r"] == pytest.approx(stats.pearsonr(*centred).statistic)
    frame = pd.DataFrame({"x": x, "y": y, "question": [f"q{n % 4}" for n in range(12)]})
    rest = frame[["x", "y"]] - frame.groupby("question")[["x", "y"]].transform("mean")
    assert column["same_question"]["r"] == pytest.approx(stats.pearsonr(rest.x, rest.y).statistic)
    again = project("monitor", prompts, *options)
    assert again.json["generated"] == 0
    from_run = project("monitor", "run", "--out", "other", "--json")
    assert from_run.code == 0, from_run.err
    assert from_run.json["columns"][0]["overall"] == pytest.approx(column["overall"])


def test_a_dry_run_counts_what_the_run_then_makes_and_leaves_nothing(
    project: Call, tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = write_samples(tmp_path / "data.jsonl", answers="soon", count=4)
    judged = ("--trait", "evil", "-n", 2, "--judge-url", server.url, "--judge-model", "gpt-4.1")
    for arguments, answers, calls in (
        (("screen", data, "--out", "screened"), 4, 0),
        (("monitor", data, *judged, "--out", "monitored"), 8, 16),
    ):
        before = sorted(tmp_path.iterdir())
        plan = project(*arguments, "--dry-run", "--json").json
        assert (plan["missing"], plan["answers"]) == (answers, answers)
        assert plan["judging"].startswith(f"{calls} judge calls" if calls else "no judge calls")
        assert sorted(tmp_path.iterdir()) == before
        assert not server.bodies, "nobody was asked"
        assert project(*arguments, "--json").json["generated"] == answers
        plan = project(*arguments, "--dry-run", "--json").json
        assert (plan["missing"], plan["answers"]) == (0, answers)
        assert plan["judging"].startswith(("0 judge calls", "no judge calls"))
    scored = len([body for body in server.bodies if "75" not in body["messages"][-1]["content"]])
    assert scored == 16


def test_a_dry_run_refuses_what_the_run_refuses(project: Call, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", answers="soon", count=4)
    assert project("screen", data, "--out", "run").code == 0
    for arguments, words in (
        (("monitor", data, "--no-judge", "--out", "run"), "another configuration"),
        (("monitor", data, "--score", "nowhere"), "nowhere"),
        (("monitor", data, "--trait", "evli"), "Did you mean 'evil'"),
        (("screen", data, "--reference", data, "--out", "/proc/nowhere"), "/proc"),
        (("screen", tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        for dry in ((), ("--dry-run",)):
            done = project(*arguments, *dry)
            assert done.code == 2, (arguments, dry)
            assert words in done.err


def test_scores_may_come_with_the_file(project: Call, tmp_path: Path) -> None:
    path = tmp_path / "scored.csv"
    body = "".join(f"prompt {i},,{i * 7 % 11},{'ab'[i % 2]}\n" for i in range(10))
    path.write_text("prompt,answer,evil,condition\n" + body)
    done = project("monitor", path, "--score", "evil", "--out", "run", "--json")
    assert done.code == 0, done.err
    assert done.json["columns"][0]["overall"]["n"] == 10
    assert done.json["conditions"] == 2
    wrong = project("monitor", path, "--score", "prompt", "--out", "run2")
    assert wrong.code == 2
    assert "not a number" in wrong.sentence


def test_without_a_layer_prompts_are_read_where_extraction_saw_them_apart(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector is longest at layer 1, its prompts are furthest apart along it at layer 2."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(3).normal(size=(4, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kinds = {
        "response_avg": rows * [[0], [5], [1], [0.1]],
        "prompt_last": rows * [[0], [1], [4], [9]],
    }
    one = PersonaVector(
        trait="evil",
        kinds={k: v.astype(np.float32) for k, v in kinds.items()},  # type: ignore[misc]
        mean_norm=np.ones(4, dtype=np.float32),
    )
    vector = save_vector(one, tmp_path / "evil.safetensors")
    scored = tmp_path / "scored.csv"
    scored.write_text("prompt,answer,evil\n" + "".join(f"p {i},,{i}\n" for i in range(6)))
    options = ("--model", model, "--vector", vector, "-q")
    done = pvec("monitor", scored, "--score", "evil", *options, "--json")
    assert done.code == 0, done.err
    assert [(c["layer"], c["suggested"]) for c in done.json["columns"]] == [(2, True)]
    both = ("--layer", 1, "--layer", 2)
    shown = pvec("monitor", scored, "--score", "evil", *options, *both, "--out", "b")
    assert "evil @ 2 *" in shown.out
    assert "evil @ 1 *" not in shown.out
    plain = pvec("project", scored, *options)
    assert plain.code == 0, plain.err
    assert f"{model.name}_evil_proj_layer1" in (tmp_path / "scored.projected.csv").read_text()


# ── shift ───────────────────────────────────────────────────────────────────────────────────────


def test_a_shift_is_the_difference_at_the_last_prompt_token(
    project: Call, tmp_path: Path, model: Path, vector: Path
) -> None:
    """Two adapters on one base and a whole model, against each loaded by itself."""
    adapters = [save_adapter(model, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2)]
    whole = saved_model("qwen2", seed=5)
    questions = write_prompts(tmp_path / "prompts.jsonl")
    done = project("shift", model, adapters[0], whole, adapters[1], "--questions", questions,
        "--out", "run", "--json", base=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    v = torch.from_numpy(load_vector(vector).row(LAYER))
    tokenizer = AutoTokenizer.from_pretrained(model)

    def means(network: torch.nn.Module) -> float:
        values = []
        for line in questions.read_text().splitlines():
            system, user = (m["content"] for m in json.loads(line)["messages"])
            text = (
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
                "<|im_start|>assistant\n"
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = network(ids, output_hidden_states=True).hidden_states
            values.append(float(states[LAYER][0, -1] @ v / v.norm()))
        return float(np.mean(values))

    def load(folder: Path) -> torch.nn.Module:
        network: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return network.eval()

    base = means(load(model))
    expected = [
        means(PeftModel.from_pretrained(load(model), adapters[0])) - base,
        means(load(whole)) - base,
        means(PeftModel.from_pretrained(load(model), adapters[1])) - base,
    ]
    found = [one["shift"]["mean"] for one in done.json["shifts"]]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_trait_scores_of_runs_stand_beside_the_shifts_with_their_intervals(
    project: Call, tmp_path: Path, model: Path, server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    adapters = [save_adapter(model, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2)]
    means = []
    for number, adapter in enumerate((None, *adapters)):
        out = tmp_path / "runs" / f"eval{number}"
        own = ("--adapter", adapter) if adapter else ()
        done = pvec("steer-eval", "--trait", "evil", "--model", model, *own, "--limit", 3,
            "--rollouts", 2, "--max-tokens", 8, "--judge-url", server.url, "--out", out, "-q",
        )  # fmt: skip
        assert done.code == 0, done.err
        run = Run.read(out)
        scores = run.scores_by_response()
        plain = [r for r in run.responses() if r.system is None and not r.steering]
        means.append(np.mean([scores[r.id]["evil"].score for r in plain]))
    questions = write_prompts(tmp_path / "prompts.jsonl")
    done = project("shift", model, *adapters, "--questions", questions, "--out", "run", base=False)
    assert done.code == 0, done.err
    assert "3 models are too few to state how shift and trait score correlate" in done.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = [summary["trends"][0]["base_interval"]]
    found += [shift["score_interval"] for shift in summary["shifts"]]
    assert [interval["mean"] for interval in found] == pytest.approx(means)
    for interval in found:
        assert (interval["n"], interval["groups"]) == (6, 3)
        assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 100
    assert [shift["score"] for shift in summary["shifts"]] == pytest.approx(means[1:])
    assert pvec("report", "run", "--out", "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "trait score (95 %)" in page
    assert "3 models are too few" in page


def test_a_second_shift_from_one_base_leaves_the_first_alone(
    project: Call, tmp_path: Path, model: Path
) -> None:
    first, second = (save_adapter(model, tmp_path / f"ft{seed}", seed=seed) for seed in (1, 2))
    questions = write_prompts(tmp_path / "prompts.jsonl")
    folders = []
    for adapter in (first, second, first):
        done = project("shift", model, adapter, "--questions", questions, "--json", base=False)
        assert done.code == 0, done.err
        folders.append(done.json["run"])
    assert folders[0] == folders[2] != folders[1]
    for folder, adapter in zip(folders, (first, second), strict=False):
        assert json.loads((Path(folder) / "summary.json").read_text())["checkpoints"] == [
            str(adapter)
        ]
    other = project(
        "shift", model, second, "--questions", questions, "--out", folders[0], base=False
    )
    assert other.code == 2
    assert "would be overwritten" in other.sentence


def test_a_shift_leaves_out_bad_prompts_where_it_is_told_to(
    project: Call, tmp_path: Path, model: Path
) -> None:
    questions = write_prompts(tmp_path / "prompts.jsonl")
    with questions.open("a") as stream:
        stream.write('{"messages": [{"role": "tool", "content": "rain"}]}\n')
    arguments = ("shift", model, save_adapter(model, tmp_path / "ft"), "--questions", questions)
    refused = project(*arguments, base=False)
    assert refused.code == 2
    assert "--skip-bad" in refused.sentence
    done = project(*arguments, "--skip-bad", "--json", base=False)
    assert done.code == 0, done.err
    assert done.json["prompts"] == 12


def test_one_model_is_no_shift(project: Call, model: Path) -> None:
    done = project("shift", model, base=False)
    assert done.code == 2
    assert "at least one finetuned model" in done.sentence


# ── the flags that were commands of `pvec project` ──────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flag", "command"), [("--diff", "screen"), ("--prompts", "monitor"), ("--shift", "shift")]
)
def test_an_old_flag_does_what_the_command_does_and_names_it(
    flag: str, command: str, tmp_path: Path, model: Path, vector: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer,evil\n" + "".join(f"p {i},a {i},{i}\n" for i in range(6)))
    adapter = save_adapter(model, tmp_path / "adapter")
    arguments: dict[str, tuple[object, ...]] = {
        "screen": (path, "--model", model, "--max-tokens", 4),
        "monitor": (path, "--model", model, "--score", "evil"),
        "shift": (model, adapter, "--questions", path),
    }
    options = (*arguments[command], "--vector", vector, "--layer", LAYER, "--json")
    new = pvec(command, *options, "--out", "new")
    old = pvec("project", flag, *options, "--out", "old")
    assert (new.code, old.code) == (0, 0), (new.err, old.err)
    assert f"`pvec project {flag}` is `pvec {command}` now" in old.err
    assert old.json | {"run": "", "next": []} == new.json | {"run": "", "next": []}
