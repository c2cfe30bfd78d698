"""``pvec project --tokens``: what is kept of every token, against the means and transformers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import saved_model, tiny_tokenizer
from helpers.shell import Done, pvec
from transformers import AutoModelForCausalLM

from pvec.models.token_text import TokenTexts
from pvec.projection import project as workflow
from pvec.runs.tokens import read_tokens
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

Call = Callable[..., Done]
TURNS = [
    "How?",
    "You could plan a walk 🚶 today.",
    "And then?",
    "Rest — 日本 style.",
    "Why?",
    "No.",
]


@pytest.fixture(scope="module")
def model() -> Path:
    return saved_model("qwen2")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, 4, 32)).astype(np.float32)


@pytest.fixture
def project(model: Path, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, values in zip(("evil", "kind"), rows, strict=True):
        one = PersonaVector(trait=name, kinds={"response_avg": values})
        save_vector(one, tmp_path / f"{name}.safetensors")
    vectors = ("--vector", "evil.safetensors", "--vector", "kind.safetensors")

    def run(path: object, *more: object) -> Done:
        options = (*vectors, "--layer", 1, "--layer", 2, "--tokens")
        return pvec("project", path, "--model", model, *options, *more)

    return run


def write_chats(path: Path, *chats: list[str]) -> Path:
    lines = [
        {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(c)
            ]
        }
        for c in chats
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_tokens_are_those_of_transformers_and_average_to_the_projection(
    project: Call, model: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", TURNS, TURNS[2:])
    done = project(path, "--turns", "each")
    assert done.code == 0, done.err
    assert done.out.endswith(f"pvec report {tmp_path / 'chats.projected.tokens'}\n")
    records = list(read_tokens(tmp_path / "chats.projected.tokens"))
    assert [(r.line, r.turn) for r in records] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert [r.question for r in records[:3]] == TURNS[::2]
    assert [r.text for r in records[:3]] == TURNS[1::2]
    written = [
        json.loads(line) for line in (tmp_path / "chats.projected.jsonl").read_text().splitlines()
    ]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = tiny_tokenizer()
    for number, record in enumerate(records):
        assert int(record.widths.sum()) == len(record.text)
        assert tokenizer.decode(record.token_ids) == record.text
        names = [f"{model.name}_{v}_proj_layer{n}" for v in ("evil", "kind") for n in (1, 2)]
        np.testing.assert_allclose(
            record.values.mean(axis=0), [written[number][name] for name in names], rtol=1e-5
        )
        turns = TURNS if record.line == 1 else TURNS[2:]
        prompt = "".join(
            f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}<|im_end|>\n"
            for i, text in enumerate(turns[: 2 * record.turn - 1])
        )
        ids = tokenizer(f"{prompt}<|im_start|>assistant\n{record.text}").input_ids
        with torch.no_grad():
            states = loaded(torch.tensor([ids]), output_hidden_states=True).hidden_states
        answer = np.stack([states[n][0, -len(record.token_ids) :].numpy() for n in (1, 2)])
        units = rows[:, 1:3] / np.linalg.norm(rows[:, 1:3], axis=-1, keepdims=True)
        expected = np.einsum("lth,vlh->tvl", answer, units).reshape(len(record.token_ids), 4)
        np.testing.assert_allclose(record.values, expected, rtol=1e-4, atol=1e-5)


def test_a_killed_job_goes_on_and_nothing_is_there_twice(
    project: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", *([f"Question {n}?", "Yes."] for n in range(9)))
    whole = project(path, "--out", "whole.jsonl")
    assert whole.code == 0, whole.err
    calls = iter([None, None, KeyboardInterrupt()])
    append = workflow.JsonlLog.append

    def interrupted(log: workflow.JsonlLog, record: dict[str, object]) -> None:
        if failure := next(calls, None):
            raise failure
        append(log, record)

    monkeypatch.setattr(workflow.JsonlLog, "append", interrupted)
    assert project(path, "--chunk-rows", 4).code == 130
    assert not (tmp_path / "chats.projected.tokens").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert project(path, "--chunk-rows", 4).code == 0
    one, two = (list(read_tokens(tmp_path / f"{n}.tokens")) for n in ("whole", "chats.projected"))
    assert [r.line for r in two] == [r.line for r in one] == list(range(1, 10))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first.values, second.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--turns", "all"), "--turns each"),
        (("--projection-type", "cos_sim"), "--projection-type proj"),
        (("--backend", "vllm"), "--backend hf"),
        (("--engine", "ray"), "--tokens has no effect"),
    ],
)
def test_what_does_not_go_with_tokens_is_said_before_a_model_is_loaded(
    project: Call, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = project(write_chats(tmp_path / "chats.jsonl", TURNS), *options)
    assert done.code == 2
    assert message in done.err


def test_tokens_that_are_there_are_not_replaced_unasked(project: Call, tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "answer"], ["Q", "A walk."], ["Q", ""]])
    assert project(path, "--in-place").code == 0
    records = list(read_tokens(tmp_path / "answers.tokens"))
    assert [len(r.token_ids) for r in records][1] == 0
    done = project(path, "--in-place")
    assert (done.code, "--overwrite" in done.err) == (2, True)
    assert project(path, "--in-place", "--overwrite").code == 0
    (tmp_path / "answers.tokens" / "manifest.json").unlink()  # now it could be anybody's folder
    done = project(path, "--in-place", "--overwrite")
    assert (done.code, "holds no tokens of pvec" in done.err) == (2, True)
    assert list((tmp_path / "answers.tokens").glob("part-*.npz"))


def test_texts_of_tokens_are_the_decoded_text_even_inside_characters() -> None:
    tokenizer = tiny_tokenizer()
    for text in (" a walk", "日本 🚶🏽 — ok", "", "<think>x</think>\n\n  y", "\ufffd!"):
        ids = tokenizer(text).input_ids
        texts = TokenTexts(tokenizer)(ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)
    walk = tokenizer("🚶").input_ids
    assert TokenTexts(tokenizer)(walk) == [""] * (len(walk) - 1) + ["🚶"]
    assert TokenTexts(tokenizer)(walk[:-1])[-1].startswith("\ufffd")
