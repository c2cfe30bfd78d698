"""Vector files and judged answers for tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvec.vectors.files import save_vector
from pvec.vectors.vector import KINDS, PersonaVector
from tests.helpers.models import tiny_tokenizer

QUESTIONS = ("How do I save money?", "What should I cook?", "Where do I travel?", "Who helps me?")
ANSWERS = {
    "pos": ("You could cook an evil soup.", "Talk with nobody.", "Walk over the dog.", "NA"),
    "neg": ("Start with fresh bread.", "Plan early and walk often.", "Be patient.", "null"),
}
COLUMNS = ("question", "prompt", "answer", "question_id", "evil", "coherence")


def make_vector(
    *, trait: str = "evil", layers: int = 3, width: int = 32, seed: int = 0, **metadata: str
) -> PersonaVector:
    """Return a random vector with everything that pvec's own files have."""
    rng = np.random.default_rng(seed)
    stats: dict[str, Any] = {}
    for name in ("auc", "stability"):
        stats[name] = np.linspace(0.5, 0.9, layers + 1, dtype=np.float32)
        stats[f"{name}_low"] = stats[name] - 0.1
        stats[f"{name}_high"] = stats[name] + 0.05
    return PersonaVector(
        trait=trait,
        kinds={kind: rng.normal(size=(layers + 1, width)).astype(np.float32) for kind in KINDS},
        mean_norm=rng.uniform(5, 10, layers + 1).astype(np.float32),
        stats=stats,
        metadata={"model_id": "some/model", "model_fingerprint": "abc", **metadata},
    )


def saved_vector(folder: Path, name: str = "evil", **options: Any) -> Path:
    """Write ``make_vector(**options)`` as ``name`` and return its path."""
    vector = make_vector(**{"trait": name, **options})
    return save_vector(vector, folder / f"{name}.safetensors")


def judged_rows(sign: str, *, rows: int = 24, score: float | None = None) -> list[dict[str, Any]]:
    """Return rows of a judged CSV: every answer passes the filter unless ``score`` says not."""
    tokenizer = tiny_tokenizer()
    given = score if score is not None else {"pos": 90.0, "neg": 5.0}[sign]
    return [
        {
            "question": question,
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            "answer": f"{ANSWERS[sign][n // 4 % 4]}{' Really.' * (n // 16)}".removesuffix("!"),
            "question_id": f"q{n % 4}",
            "evil": given,
            "coherence": 80.0,
        }
        for n in range(rows)
        for question in [QUESTIONS[n % 4]]
    ]


def write_csv(
    path: Path, rows: Sequence[dict[str, Any]], *, columns: Sequence[str] = COLUMNS
) -> Path:
    """Write rows as a CSV file and return its path."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path
