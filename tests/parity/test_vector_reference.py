"""A vector from two CSV files is what a plain loop over the reference's definition gives."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pvec.extraction.compute import from_csv
from pvec.settings import resolve
from pvec.vectors.files import load_vector
from pvec.vectors.vector import KINDS
from tests.helpers.models import saved_model
from tests.helpers.vectors import judged_rows, write_csv

DATA = os.environ.get("PVEC_TEST_DATA")

THRESHOLD = 50


@torch.no_grad()
def reference_means(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return kind → mean over rows ``[L + 1, H]``: one sequence at a time, text in, means out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collected: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for row in rows:
        ids = tokenizer(row["prompt"] + row["answer"], add_special_tokens=False)["input_ids"]
        length = len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        stacked = torch.stack([state[0] for state in states]).double()  # [L + 1, T, H]
        collected["response_avg"].append(stacked[:, length:].mean(dim=1))
        collected["prompt_avg"].append(stacked[:, :length].mean(dim=1))
        collected["prompt_last"].append(stacked[:, length - 1])
    return {kind: torch.stack(means).mean(dim=0).numpy() for kind, means in collected.items()}


def passing(
    pos: Sequence[dict[str, Any]], neg: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Keep row i of both sides when both pass, as the reference does."""
    pairs = [
        (p, n)
        for p, n in zip(pos, neg, strict=True)
        if float(p["evil"]) >= THRESHOLD
        and float(n["evil"]) < 100 - THRESHOLD
        and float(p["coherence"]) >= 50
        and float(n["coherence"]) >= 50
    ]
    return [p for p, _ in pairs], [n for _, n in pairs]


def assert_as_reference(
    tmp_path: Path, pos: Sequence[dict[str, Any]], neg: Sequence[dict[str, Any]]
) -> None:
    folder = saved_model()
    files = [write_csv(tmp_path / f"{n}.csv", rows) for n, rows in (("pos", pos), ("neg", neg))]
    settings = resolve(
        {"model.id": str(folder), "model.dtype": "float32", "filter.paired": True}, environ={}
    ).settings
    out = tmp_path / "evil.safetensors"
    from_csv(settings, files[0], files[1], trait="evil", out=out)
    ours = load_vector(out)
    kept = passing(pos, neg)
    assert ours.metadata["kept_pos"] == ours.metadata["kept_neg"] == str(len(kept[0]))
    means = [reference_means(folder, rows) for rows in kept]
    for kind in KINDS:
        wanted = means[0][kind] - means[1][kind]
        scale = np.abs(means[0][kind][:-1]).max()  # differences of equal prompts are nearly zero
        error = np.abs(ours.kind(kind)[:-1] - wanted[:-1]).max() / scale
        assert error <= 1e-5, f"{kind}: {error}"


def test_the_paired_vector_is_the_references(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos", rows=32), judged_rows("neg", rows=32)
    pos[3]["evil"], neg[5]["evil"], pos[8]["coherence"] = 49.9, 50.0, 12.0
    assert_as_reference(tmp_path, pos, neg)


@pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")
def test_it_is_on_real_judged_answers_too(tmp_path: Path) -> None:
    path = Path(DATA or "") / "reference" / "qwen2.5-7b-instruct_evil_baseline.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    for row in rows:  # the test model has room for 256 tokens
        row["answer"] = row["answer"][:60]
        row["prompt"] = row["prompt"][-90:]
    pos = [{**row, "evil": 90.0} for row in rows[:12]]
    assert_as_reference(tmp_path, pos, rows[12:24])
