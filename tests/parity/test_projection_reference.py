"""Projections against the definitions, computed by a plain loop over transformers' own states."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CHATML, NUM_LAYERS, saved_model, tiny_model, tiny_tokenizer
from helpers.shell import pvec
from transformers import AutoModelForCausalLM

import pvec as library
from pvec.vectors.files import save_pt, save_vector
from pvec.vectors.vector import PersonaVector

LAYERS = (1, 2)
TYPES = ("proj", "prompt_last_proj", "cos_sim", "prompt_avg")
RNG = np.random.default_rng(7)
QUESTIONS = (
    "How can I learn to cook a simple dinner?",
    "What is the best way to save money?",
    "Plan early, walk often?",
)
ANSWERS = ("You could start with warm soup.", "Talk with people – early, often.", "Yes.")


def random_vector(trait: str, *, width: int = 32, layers: int = NUM_LAYERS) -> PersonaVector:
    rows = RNG.normal(size=(layers + 1, width)).astype(np.float32)
    return PersonaVector(trait=trait, kinds={"response_avg": rows})


@pytest.fixture
def vectors(tmp_path: Path) -> list[Path]:
    """One of pvec's own files, and one in the reference's format and name."""
    first = save_vector(random_vector("evil"), tmp_path / "evil.safetensors")
    (second,) = save_pt(random_vector("humorous"), tmp_path)
    return [first, second]


def by_definition(
    model: Any, prompt: str, answer: str, vector: torch.Tensor, *, kind: str, layer: int
) -> float:
    """One row, one forward pass, everything materialised: the usual way."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
    v = vector[layer]
    if kind == "proj":
        return float((hidden[start:].mean(0) * v).sum() / v.norm())
    if kind == "prompt_last_proj":
        return float((hidden[start - 1] * v).sum() / v.norm())
    if kind == "prompt_avg":
        return float((hidden[:start].mean(0) * v).sum() / v.norm())
    return float(torch.nn.functional.cosine_similarity(hidden[start:].mean(0), v, dim=0))


def rendered(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_every_column_of_a_csv_is_the_definition(tmp_path: Path, vectors: list[Path]) -> None:
    assert CHATML  # the prompts below are rendered by hand
    model_folder = saved_model("qwen2")
    path = tmp_path / "answers.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "prompt", "answer", "evil"])
        writer.writerows(
            [q, rendered(q), a, "12.5"] for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        )
    done = pvec(
        "project", path, "--model", model_folder, "--vector", vectors[0], "--vector", vectors[1],
        *(word for layer in LAYERS for word in ("--layer", layer)),
        *(word for kind in TYPES for word in ("--projection-type", kind)), "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    with (tmp_path / "answers.projected.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for name, trait in (("evil", "evil"), ("humorous_response_avg_diff", "humorous")):
        arrays = library.load_vector(vectors[0] if trait == "evil" else vectors[1])
        vector = torch.from_numpy(arrays.kind("response_avg"))
        for row, question, answer in zip(rows, QUESTIONS, ANSWERS, strict=True):
            for kind in TYPES:
                for layer in LAYERS:
                    expected = by_definition(
                        network, rendered(question), answer, vector, kind=kind, layer=layer
                    )
                    cell = row[f"{model_folder.name}_{name}_{kind}_layer{layer}"]
                    assert float(cell) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_chats_give_what_their_rendered_prompts_give(tmp_path: Path, vectors: list[Path]) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    model_folder = saved_model("qwen2")
    done = pvec(
        "project", path, "--model", model_folder, "--vector", vectors[0], "--layer", 2, "-q"
    )
    assert done.code == 0, done.err
    lines = (tmp_path / "chats.projected.jsonl").read_text().splitlines()
    values = [json.loads(line)[f"{model_folder.name}_evil_proj_layer2"] for line in lines]
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    pairs = [(rendered(q), a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    rows = library.project(network, tiny_tokenizer(), pairs, vectors[0], layers=[2])
    vector = torch.from_numpy(library.load_vector(vectors[0]).kind("response_avg"))
    for value, row, (prompt, answer) in zip(values, rows, pairs, strict=True):
        expected = by_definition(network, prompt, answer, vector, kind="proj", layer=2)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert row["evil_proj_layer2"] == pytest.approx(value, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_monitor_reads_each_token_where_it_stands(architecture: str) -> None:
    """Against one forward over the finished text, and the text against ``generate``."""
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    if architecture == "gemma2":
        model.set_attn_implementation("eager")
    vector = random_vector("evil")
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    sampling = library.Sampling(temperature=1.0, max_tokens=9, seed=4)
    seen = list(
        library.monitor(model, tokenizer, messages, vector, layers=LAYERS, sampling=sampling)
    )
    prompt = tokenizer(rendered(QUESTIONS[0]), add_special_tokens=False)["input_ids"]
    backend = library.HFBackend.wrap(model, tokenizer)
    request = library.Request(id="r", prompt_ids=tuple(prompt), sampling=sampling)
    (answer,) = backend.generate([request])
    assert "".join(text for text, _ in seen) == answer.text.removesuffix("\ufffd")
    assert len(seen) == len(answer.token_ids) > 0
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in LAYERS:
        v = torch.from_numpy(vector.row(layer))
        along = hidden[layer][0, len(prompt) :] @ v / v.norm()
        values = [projections[f"evil_layer{layer}"] for _, projections in seen]
        np.testing.assert_allclose(values, along.numpy(), rtol=1e-3, atol=1e-4)


def test_a_monitor_that_is_left_leaves_no_hook() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    for _text, _projections in library.monitor(
        model, tokenizer, messages, random_vector("evil"), layers=[2]
    ):
        break
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
