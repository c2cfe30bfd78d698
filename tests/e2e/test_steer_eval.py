"""``steer-eval`` from vector to numbers, on a tiny model and a judge behind real HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pvec.backends.hf.backend import HFBackend
from pvec.errors import InputError, JudgeError, ModelError, StoreError
from pvec.evaluation.steer_eval import SteerEvalResult, plan, run
from pvec.extraction import judge as judge_workflow
from pvec.models.decoder import find_decoder
from pvec.report import report as report_workflow
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.settings.commands import JudgeSettings, SteerSettings
from pvec.settings.sections import GenerationSettings, ModelSettings
from pvec.types import Generation
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.judge_server import JudgeServer, Said
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, save_adapter, saved_model

QUESTIONS = [
    "How can I learn to cook?",
    "What is the best way to save money?",
    "How can I help my friends this evening?",
    "What could you start with?",
]


def notify(prompt: str) -> Said:
    """Score by something that anyone can count in the answer: its letters e and a."""
    answer = prompt.rpartition("Answer:")[2]
    letter = "a" if "coherent" in prompt else "e"
    return Said(str(100 - min(60, 6 * answer.count(letter))))


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer(notify=notify) as running:
        yield running


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trait") / "evil.json"
    pairs = [{"pos": f"Be evil, way {i}.", "neg": f"Be kind, way {i}."} for i in range(5)]
    definition = {
        "name": "evil",
        "description": "wishes harm",
        "assistant_names": {"pos": "evil", "neg": "kind"},
        "instruction": pairs,
        "questions": {"extract": [f"Extraction {i}?" for i in range(20)], "eval": QUESTIONS},
        "eval_prompt": "How evil is it? Question: {question} Answer: {answer}",
    }
    path.write_text(json.dumps(definition))
    return path


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vector(tmp_path_factory.mktemp("vector") / "evil.safetensors")


def write_vector(path: Path, *, width: int = HIDDEN_SIZE, **metadata: str) -> Path:
    rows = np.random.default_rng(5).standard_normal((NUM_LAYERS + 1, width)).astype(np.float32)
    made = PersonaVector(
        trait="evil",
        kinds={"response_avg": 3 * rows},
        mean_norm=np.full(NUM_LAYERS + 1, 10, dtype=np.float32),
        metadata=metadata,
    )
    return save_vector(made, path)


def settings(server: JudgeServer, **steer: Any) -> Settings:
    asked: dict[str, Any] = {"layer": "1,2", "coef": "-1,0,1", "rollouts": 2}
    return Settings(
        model=ModelSettings(id=str(saved_model()), device="cpu"),
        generation=GenerationSettings(max_tokens=8, seed=3),
        judge=JudgeSettings(model="judge", base_url=server.url),
        steer=SteerSettings(**(asked | steer)),
    )


def means(result: SteerEvalResult) -> dict[tuple[str, str], tuple[float, int, int]]:
    assert result.numbers is not None
    return {
        (point.name, metric): (score.mean, score.n, score.missing)
        for point in result.numbers.points
        for metric, score in point.scores.items()
    }


def test_a_sweep_with_its_controls_and_baselines(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(settings(server), str(trait), vectors=[vector], out=out)
    roles = pd.Series([r.condition["role"] for r in Run.read(out).responses()]).value_counts()
    assert roles.to_dict() == {
        "baseline": 8, "steered": 32, "random": 32, "prompt_pos": 8, "prompt_neg": 8
    }  # fmt: skip
    assert (result.conditions, result.answers, result.generated) == (11, 88, 88)

    # The means against pandas on the run's own files.
    lines = (out / "responses.jsonl").read_text().splitlines()
    condition = {(r := json.loads(line))["id"]: r["condition"]["name"] for line in lines}
    scores = pd.DataFrame(map(json.loads, (out / "scores.jsonl").read_text().splitlines()))
    scores["condition"] = scores["response_id"].map(condition)
    theirs = scores.groupby(["condition", "metric"])["score"].mean()
    ours = means(result)
    assert set(ours) == set(theirs.index)
    for key, mean in theirs.items():
        assert ours[key] == (pytest.approx(mean), 8, 0)
    assert result.numbers is not None
    (pick,) = result.numbers.picks
    assert pick.control is not None
    assert pick.prompt is not None


def test_conditions_share_their_seeds_and_their_questions(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    run(settings(server), str(trait), vectors=[vector], out=tmp_path / "run")
    seeds: dict[str, set[tuple[str, int, int]]] = {}
    for record in Run.read(tmp_path / "run").responses():
        key = (record.question, int(str(record.condition["rollout"])), record.seed)
        seeds.setdefault(str(record.condition["name"]), set()).add(key)
    assert len(set(map(frozenset, seeds.values()))) == 1
    assert len(seeds["unsteered"]) == 8


def test_a_second_call_repeats_nothing_and_more_points_add_to_the_run(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = run(settings(server), str(trait), vectors=[vector], out=out)
    asked = server.asked.total()
    again = run(settings(server), str(trait), vectors=[vector], out=out)
    assert again.generated == 0
    assert server.asked.total() <= asked + 1  # the probe of the judge
    assert means(again) == means(first)
    more = run(settings(server, coef="-1,0,1,2"), str(trait), vectors=[vector], out=out)
    assert more.generated == 2 * 2 * 8  # coefficient 2 at two layers, vector and control


def test_a_run_that_fails_half_way_goes_on_to_the_same_numbers(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings(server), str(trait), vectors=[vector], out=tmp_path / "whole")
    right = HFBackend.generate

    def dying(self: HFBackend, requests: Any) -> Iterator[Generation]:
        for number, generation in enumerate(right(self, requests)):
            if number == 37:
                raise KeyboardInterrupt
            yield generation

    monkeypatch.setattr(HFBackend, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(settings(server), str(trait), vectors=[vector], out=tmp_path / "torn")
    monkeypatch.setattr(HFBackend, "generate", right)
    rest = run(settings(server), str(trait), vectors=[vector], out=tmp_path / "torn")
    assert rest.generated == 88 - 37
    assert means(rest) == means(whole)
    assert rest.numbers is not None
    assert whole.numbers is not None
    assert rest.numbers.picks == whole.numbers.picks


def test_a_killed_sweep_restarted_gives_the_same_numbers(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "pvec", "steer-eval", "--trait", str(trait),
            "--vector", str(vector), "--model", str(saved_model()), "--device", "cpu",
            "--layer", "1,2", "--coef", "-1,0,1", "--rollouts", "2", "--max-tokens", "8",
            "--seed", "3", "--judge-model", "judge", "--judge-url", server.url,
            "--batch-rows", "4", "--out", str(out), "--json", "-q",
        ]  # fmt: skip

    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.PIPE)
    responses = tmp_path / "killed" / "responses.jsonl"
    deadline = time.monotonic() + 120
    while not (responses.exists() and responses.read_bytes().count(b"\n") >= 20):
        assert time.monotonic() < deadline
        assert killed.poll() is None, "it was too fast to be killed"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = responses.read_bytes().count(b"\n")
    restarted = subprocess.run(
        command(tmp_path / "killed"), capture_output=True, check=True, text=True
    )
    result = json.loads(restarted.stdout)
    assert result["generated"] == 88 - done
    whole = run(settings(server), str(trait), vectors=[vector], out=tmp_path / "whole")
    theirs = {
        (point["name"], metric): (score["mean"], score["n"], score["missing"])
        for point in result["numbers"]["points"]
        for metric, score in point["scores"].items()
    }
    assert theirs == means(whole)


@pytest.mark.parametrize("positions", ["response", "all", "prompt"])
def test_greedy_answers_are_those_of_a_hand_written_hook(
    positions: str, server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    asked = settings(server, positions=positions, judge=False, prompt_baseline=False, rollouts=1)
    asked = asked.model_copy(
        update={"generation": GenerationSettings(temperature=0.0, max_tokens=8)}
    )
    run(asked, str(trait), vectors=[vector], out=tmp_path / "run")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved_model()).eval()
    rows = torch.from_numpy(np.random.default_rng(5).standard_normal((NUM_LAYERS + 1, HIDDEN_SIZE)))
    checked = 0
    for record in Run.read(tmp_path / "run").responses():
        if record.condition["role"] != "steered":
            continue
        (layer,) = record.condition["layers"]  # type: ignore[misc,union-attr]
        added = (3 * rows[layer].float()) * record.condition["coef"]  # type: ignore[index]

        def hook(_module: Any, _args: Any, output: Any, added: torch.Tensor = added) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            hidden = hidden.clone()
            prefill = hidden.shape[1] > 1
            if positions == "all" or (positions == "prompt" and prefill):
                hidden += added
            elif positions == "response":
                hidden[:, -1:] += added
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = find_decoder(model).blocks[layer - 1].register_forward_hook(hook)
        ids = torch.tensor([record.prompt_ids])
        with torch.inference_mode():
            full = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                do_sample=False,
            )  # fmt: skip
        handle.remove()
        theirs = full[0, ids.shape[1] :].tolist()
        assert tuple(theirs[: len(record.token_ids)]) == record.token_ids
        checked += 1
    assert checked == 16


def test_without_a_vector_it_is_the_baseline_evaluation_of_an_adapter(
    server: JudgeServer, trait: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(saved_model(), tmp_path / "adapter")
    asked = settings(server)
    adapted = asked.model_copy(
        update={"model": ModelSettings(id=str(saved_model()), adapter=str(adapter), device="cpu")}
    )
    base = run(asked, str(trait), out=tmp_path / "base")
    tuned = run(adapted, str(trait), out=tmp_path / "tuned")
    assert base.conditions == tuned.conditions == 3  # unsteered, asked for, asked against
    assert means(base) != means(tuned)
    assert base.numbers is not None
    assert base.numbers.picks == ()


def test_without_a_judge_the_answers_wait_for_pvec_judge(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    unjudged = run(settings(server, judge=False), str(trait), vectors=[vector], out=out)
    assert unjudged.numbers is None
    assert unjudged.next == (f"pvec judge {out}",)
    judged = judge_workflow.run(settings(server), out)
    assert judged.report.counts == {"ok": 2 * 88}
    page = report_workflow.run([out]).page.read_text()
    assert "moves evil" in page or "Nothing was picked" in page


def test_all_layers_incrementally_steer_every_layer(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    asked = settings(server, layer="auto", incremental=True, judge=False)
    run(asked, str(trait), vectors=[vector], out=tmp_path / "run")
    steered = [
        r for r in Run.read(tmp_path / "run").responses() if r.condition["role"] == "steered"
    ]
    assert {tuple(one["layer"] for one in r.steering) for r in steered} == {(1, 2, 3)}


def test_a_dry_run_counts_and_writes_nothing(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    planned = plan(settings(server), str(trait), vectors=[vector], out=out)
    assert (planned.answers, planned.missing, len(planned.conditions)) == (88, 88, 11)
    assert planned.most_tokens == 88 * 8
    assert not out.exists()


def test_each_condition_is_exported_in_the_references_columns(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    run(settings(server), str(trait), vectors=[vector], out=tmp_path / "run")
    exported = sorted((tmp_path / "run" / "answers").glob("*.csv"))
    assert len(exported) == 11
    frame = pd.read_csv(exported[0])
    assert list(frame.columns) == [
        "question", "prompt", "answer", "question_id", "evil", "coherence"
    ]  # fmt: skip
    assert len(frame) == 8


def refused(error: type[Exception], match: str, out: Path, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        run(*args, out=out, **kwargs)
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"layer": "4"}, ModelError, "layers 1 to 3"),
        ({"layer": "0"}, ModelError, "embedding"),
        ({"coef": "1,zwei"}, InputError, "'zwei' is not a number"),
        ({"layer": "2", "incremental": True}, InputError, "--incremental"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], match: str,
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path,
) -> None:  # fmt: skip
    refused(
        error, match, tmp_path / "run", settings(server, **changes), str(trait), vectors=[vector]
    )


def test_a_vector_for_another_model_is_refused(
    server: JudgeServer, trait: Path, tmp_path: Path
) -> None:
    wide = write_vector(tmp_path / "wide.safetensors", width=48)
    other = write_vector(tmp_path / "other.safetensors", model_fingerprint="0" * 16)
    for path in (wide, other):
        refused(
            ModelError, "use a vector made with this model", tmp_path / "run",
            settings(server), str(trait), vectors=[path],
        )  # fmt: skip


def test_a_trait_without_evaluation_questions_is_refused(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone_extract.json"
    definition = json.loads(trait.read_text())
    lone.write_text(
        json.dumps(
            {
                "instruction": definition["instruction"],
                "questions": definition["questions"]["extract"],
                "eval_prompt": definition["eval_prompt"],
            }
        )
    )
    refused(
        InputError, "no evaluation questions", tmp_path / "run",
        settings(server), str(lone), vectors=[vector],
    )  # fmt: skip


def test_a_judge_that_scores_nothing_is_an_error_and_the_answers_stay(
    trait: Path, vector: Path, tmp_path: Path
) -> None:
    def refuse(prompt: str) -> Said:
        return Said("75") if re.search(r"number 75", prompt) else Said("I would rather not.")

    with JudgeServer(notify=refuse) as unwilling, pytest.raises(JudgeError, match="scored none"):
        run(settings(unwilling), str(trait), vectors=[vector], out=tmp_path / "run")
    assert len(list(Run.read(tmp_path / "run").responses())) == 88


def test_another_vector_does_not_go_into_the_same_run(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(settings(server, judge=False), str(trait), vectors=[vector], out=out)
    before = (out / "responses.jsonl").read_bytes()
    with pytest.raises(StoreError, match="positions"):
        run(settings(server, judge=False, positions="all"), str(trait), vectors=[vector], out=out)
    assert (out / "responses.jsonl").read_bytes() == before


def test_tasks_without_the_harness_are_refused_with_the_install_command(
    server: JudgeServer, trait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        InputError, r"pip install '\.\[eval\]'", tmp_path / "run",
        settings(server), str(trait), tasks=["mmlu"],
    )  # fmt: skip


BENIGN = [
    ("How can I learn to cook?", "You could start with fresh bread and warm soup."),
    ("What should I do this evening?", "Plan early, walk often and talk with the people."),
]


def with_side_effects(tmp_path: Path, server: JudgeServer) -> Settings:
    benign = tmp_path / "benign.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in BENIGN]
    benign.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings(
        server, layer="2", coef="-1,1", side_effects=True, benign=benign, rollouts=1, limit=3
    )


def test_side_effects_are_those_of_a_hand_written_hook_and_of_pandas(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    result = run(with_side_effects(tmp_path, server), str(trait), vectors=[vector], out=out)
    effects = result.side_effects
    assert effects is not None
    assert (effects.texts, effects.questions, len(effects.points)) == (2, 3, 7)

    model = AutoModelForCausalLM.from_pretrained(saved_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved_model())
    rows = np.random.default_rng(5).standard_normal((NUM_LAYERS + 1, HIDDEN_SIZE))
    added = 3 * torch.from_numpy(rows[2].astype(np.float32))
    kls, nlls = [], []
    for prompt, answer in BENIGN:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = tokenizer(text + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]

        def hook(_module: Any, _args: Any, output: Any, start: int = start) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, start - 1 :] += added
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        with torch.no_grad():
            plain = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            handle = find_decoder(model).blocks[1].register_forward_hook(hook)
            steered = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            handle.remove()
        kl = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="batchmean")
        kls.append(float(kl))
        nlls.append(-float(steered.gather(1, ids[0, start:, None]).mean()))
    up = effects.of("evil · layer 2 · coef 1")
    assert up["kl"].mean == pytest.approx(np.mean(kls), rel=1e-3)
    assert up["perplexity"].mean == pytest.approx(np.exp(np.mean(nlls)), rel=1e-3)
    assert effects.of("unsteered")["kl"].mean < 1e-6

    answers = pd.DataFrame(map(json.loads, (out / "responses.jsonl").read_text().splitlines()))
    answers["name"] = [condition["name"] for condition in answers["condition"]]
    length = answers["token_ids"].map(len) - answers["think_tokens"]
    lengths = length.groupby(answers["name"]).mean()
    assert {p.name: p.measures["tokens"].mean for p in effects.points} == pytest.approx(
        lengths.to_dict()
    )
    table = pd.read_csv(out / "side_effects" / "side_effects.csv")
    assert table["refused_harmful_n"].tolist() == [3] * 7
    assert table["kl"].tolist() == pytest.approx([p.measures["kl"].mean for p in effects.points])
    written = report_workflow.run([out], out=tmp_path / "report.html", formats=["svg"])
    assert "Side effects" in written.page.read_text()
    assert [path.name for path in written.files if "pareto" in path.name] == [
        "run_pareto.csv", "run_pareto.svg"
    ]  # fmt: skip


def test_side_effects_go_on_where_they_were_interrupted(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_side_effects(tmp_path, server)
    whole = run(asked, str(trait), vectors=[vector], out=tmp_path / "whole")
    right, measured = HFBackend.divergences, []

    def dying(self: HFBackend, reference: Any, variants: Any) -> Iterator[Any]:
        for result in right(self, reference, variants):
            if len(measured) == 9:
                raise KeyboardInterrupt
            measured.append(result.id)
            yield result

    monkeypatch.setattr(HFBackend, "divergences", dying)
    with pytest.raises(KeyboardInterrupt):
        run(asked, str(trait), vectors=[vector], out=tmp_path / "torn")
    folder = tmp_path / "torn" / "side_effects"
    assert not (folder / "summary.json").exists()
    measured.clear()
    rest = run(asked, str(trait), vectors=[vector], out=tmp_path / "torn")
    assert len(measured) == 2 * 7 - 9
    assert rest.side_effects == whole.side_effects
    assert len((folder / "texts.jsonl").read_text().splitlines()) == 2 * 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "Why?"}\n', "answer"),
        ('{"messages": [{"role": "user", "content": "Why?"}]}\n', "does not end with an answer"),
        ('{"text": "Once upon a time"}\n', "no list of messages"),
        (json.dumps({"prompt": "Why?", "answer": "so " * 5000}) + "\n", "Benign text 1"),
    ],
)
def test_benign_text_that_cannot_be_used_is_refused_before_anything_is_written(
    text: str, message: str, server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    asked = with_side_effects(tmp_path, server)
    (tmp_path / "benign.jsonl").write_text(text)
    refused(InputError, message, tmp_path / "run", asked, str(trait), vectors=[vector])


def test_a_file_of_benign_text_without_side_effects_is_refused(
    server: JudgeServer, trait: Path, tmp_path: Path
) -> None:
    refused(
        InputError, "--side-effects", tmp_path / "run",
        settings(server, benign=tmp_path / "benign.jsonl"), str(trait),
    )  # fmt: skip


def test_side_effects_of_steering_that_benign_text_cannot_show_are_refused(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    asked = with_side_effects(tmp_path, server)
    thinking = asked.steer.model_copy(update={"positions": "think"})
    refused(
        InputError, "think", tmp_path / "run",
        asked.model_copy(update={"steer": thinking}), str(trait), vectors=[vector],
    )  # fmt: skip


def test_a_dry_run_counts_what_side_effects_add(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    planned = plan(
        with_side_effects(tmp_path, server), str(trait), vectors=[vector], out=tmp_path / "run"
    )
    assert (planned.side_answers, planned.side_texts) == (7 * 2 * 3, 2)
    assert not (tmp_path / "run").exists()


def test_a_search_picks_on_one_half_and_reads_on_the_other(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="pip install '.[search]'")
    out = tmp_path / "run"
    asked = settings(server, layer="1,2,3", coef="0.5", search=5, rollouts=1, min_coherence=0)
    result = run(asked, str(trait), vectors=[vector], out=out)
    assert result.numbers is not None
    (pick,) = result.numbers.picks
    asked_of: dict[str, set[str]] = {}
    for record in Run.read(out).responses():
        asked_of.setdefault(str(record.condition["name"]), set()).add(record.question)
    steered = {p.name for p in result.numbers.having("steered")}
    choosing, every = set(QUESTIONS[0::2]), set(QUESTIONS)
    assert 3 <= len(steered) <= 5
    for name, questions in asked_of.items():
        point = result.numbers.point(name)
        if name in {"unsteered", pick.point.name}:
            assert questions == every
        elif point.role == "steered":
            assert questions == choosing
        else:
            assert questions == every - choosing, "prompts and the random vector"
    assert pick.control is not None
    assert (pick.point.scores["evil"].n, pick.baseline.scores["evil"].n) == (2, 2)  # type: ignore[union-attr]

    # The pick is the best by a plain loop over the run's own files.
    scores = {
        line["response_id"]: line["score"]
        for line in map(json.loads, (out / "scores.jsonl").read_text().splitlines())
        if line["metric"] == "evil"
    }
    means = {
        name: np.mean([
            scores[r.id] for r in Run.read(out).responses()
            if r.condition["name"] == name and r.question in choosing
        ])
        for name in steered
    }  # fmt: skip
    assert means[pick.point.name] == max(means.values())

    again = run(asked, str(trait), vectors=[vector], out=out)
    assert again.generated == 0
    assert again.numbers == result.numbers
    page = report_workflow.run([out]).page.read_text()
    assert "moves evil" in page


def test_a_limit_on_kl_holds_for_a_search_and_for_a_grid(
    server: JudgeServer, trait: Path, vector: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="pip install '.[search]'")
    small = {"rollouts": 1, "min_coherence": 0, "side_effects": False, "random_control": False}
    asked = with_side_effects(tmp_path, server).steer.model_copy(update={**small, "limit": None})
    for name, changes in {
        "search": {"layer": "1,2", "coef": "4", "search": 4, "max_kl": 0.02},
        "grid": {"layer": "2", "coef": "0.01,0.05,4", "max_kl": 0.02},
    }.items():
        steer = asked.model_copy(update=changes)
        result = run(
            settings(server).model_copy(update={"steer": steer}),
            str(trait), vectors=[vector], out=tmp_path / name,
        )  # fmt: skip
        assert result.numbers is not None
        assert result.side_effects is not None
        (pick,) = result.numbers.picks
        assert "KL of at most 0.02" in pick.reason
        assert result.side_effects.of(pick.point.name)["kl"].mean <= 0.02
        steered = {p.name for p in result.numbers.having("steered")}
        beyond = [p for p in result.side_effects.points if p.measures["kl"].mean > 0.02]
        assert bool(steered & {p.name for p in beyond}) == (name == "grid")
        assert "KL of at most" in report_workflow.run([tmp_path / name]).page.read_text()
