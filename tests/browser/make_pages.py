"""Write the pages that the browser tests open: every kind of run, large ones, hostile texts.

``python tests/browser/make_pages.py FOLDER`` in the environment of pvec; the tests themselves run
in that of the browser and read ``facts.json``, what the pages must show.
"""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pvec.report import report
from pvec.report.page import Answer, Chapter, Section, render_page
from pvec.runs.jsonl import encode_line
from pvec.runs.store import Run
from pvec.runs.summary import BROWSED, DIFF_KIND, TOKENS_KIND, write_summary
from pvec.runs.tokens import TokenRecord, write_tokens
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

OLD_RUNS = Path(__file__).parents[1] / "data" / "runs-0.1"
KINDS = ("extract", "steer", "train", "monitor", "shift", "screen")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
IDENTITY: dict[str, Any] = {"trait": "evil", "model": "tiny", "adapter": None}
AXES = {"evil_layer3": {"proj_response_neg": 8.0, "proj_response_pos": 12.5}}
RNG = np.random.default_rng(7)


def main(folder: Path) -> None:
    """Write all pages into ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for kind in KINDS:
        report.run([OLD_RUNS / kind], out=folder / f"{kind}.html")
    report.run([OLD_RUNS / kind for kind in KINDS], out=folder / "all.html")
    report.run(grid(folder), out=folder / "grid.html")
    report.run(
        [OLD_RUNS / "train", copied(folder, "train", "again")], out=folder / "trainings.html"
    )
    facts = {
        "screening": screening(folder),
        "tokens": tokens(folder, "tokens", answers=60, length=40),
        "beside": tokens(folder, "beside", answers=200, length=60, beside=True),
        "sampled": tokens(folder, "sampled", answers=10_000, length=500),
        "turns": turns(folder),
        "answers": many_answers(folder),
    }
    served_vector(folder)
    (folder / "facts.json").write_text(json.dumps(facts))


def grid(folder: Path) -> list[Path]:
    """Return evaluations of two models on two traits: one run, renamed."""
    names = [("evil", "tiny"), ("evil", "large"), ("kind", "tiny"), ("kind", "large")]
    runs = []
    for trait, model in names:
        path = copied(folder, "steer", f"{trait}-{model}")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["identity"] |= {"trait": trait, "model": model}
        (path / "manifest.json").write_text(json.dumps(manifest))
        scores = (path / "scores.jsonl").read_text()
        (path / "scores.jsonl").write_text(
            scores.replace('"metric": "evil"', f'"metric": "{trait}"')
        )
        runs.append(path)
    return runs


def copied(folder: Path, kind: str, name: str) -> Path:
    """Return a copy of an old run."""
    return Path(shutil.copytree(OLD_RUNS / kind, folder / "runs" / name))


def screening(folder: Path) -> dict[str, Any]:
    """Screen 2,000 samples along two columns; write what thresholds remove."""
    count, clean = 2000, 500
    data = np.round(RNG.normal((3, 1), 4, size=(count, 2)), 3)
    reference = np.round(RNG.normal(0, 2, size=(clean, 2)), 3)
    limits = np.percentile(reference, 95, axis=0)
    names = [("evil", 3), ("kind", 4)]
    interval = {"mean": 3.0, "low": 2.5, "high": 3.5, "n": count, "groups": count, "missing": 0}
    path = folder / "runs" / "screening"
    with Run.open_or_create(path, kind=DIFF_KIND, identity=IDENTITY) as run:
        run.begin_session(command=["pvec", "screen"])
        run.end_session()
    columns = [
        {
            "vector": vector, "layer": layer, "agreement": None,
            "score": {"mean": interval, "reference": interval, "auc": 0.8, "threshold": limit,
                      "above": int((data[:, c] > limit).sum())},
        }
        for c, ((vector, layer), limit) in enumerate(zip(names, limits.tolist(), strict=True))
    ]  # fmt: skip
    write_summary(
        path,
        {
            "data": "data.jsonl", "natural": "generate", "percentile": 95.0, "kept": "kept.jsonl",
            "rows": count, "unanswered": 0, "removed_rows": int((data > limits).any(1).sum()),
            "columns": columns, "suspicious": [],
        },
    )  # fmt: skip
    keys = [f"{vector}_layer{layer}_difference" for vector, layer in names]
    with (path / "samples.csv").open("w") as stream:
        stream.write(",".join(["set", "line", *keys]) + "\n")
        for name, table in (("data", data), ("reference", reference)):
            for line, row in enumerate(table.tolist()):
                stream.write(",".join([name, str(line + 1), *map(str, row)]) + "\n")
    chosen = range(0, count, 2)
    with (path / BROWSED).open("wb") as stream:
        for number in chosen:
            sample = {
                "number": number, "line": number + 1, "question": f"question {number}?",
                "response": f"response {number} {HOSTILE}",
                "natural": None if number % 10 == 0 else f"natural {number}",
            }  # fmt: skip
            stream.write(encode_line(sample))
    report.run([path], out=folder / "screening.html")
    return {
        "data": data.tolist(),
        "reference": reference.tolist(),
        "limits": limits.tolist(),
        "browsed": list(chosen),
    }


def tokens(
    folder: Path, name: str, *, answers: int, length: int, beside: bool = False
) -> dict[str, Any]:
    """Write answers with known values of their tokens, in parts of 500."""
    path, columns = folder / "runs" / name, [("evil", 3), ("kind", 3)]
    records = [_record(n, 1, length) for n in range(answers)]
    _token_run(path, records, columns, turns="last")
    report.run([path], out=folder / f"{name}.html", beside=beside)
    window = np.stack(
        [
            [np.convolve(r.values[:, c], np.full(12, 1 / 12), "valid").max() for r in records]
            for c in range(2)
        ]
    )
    return {
        "answers": answers,
        "order": np.argsort(-window[0]).tolist()[:5],
        "first": records[int(window[0].argmax())].values.tolist(),
        "text": records[int(window[0].argmax())].text,
    }


def turns(folder: Path) -> dict[str, Any]:
    """Write 50 conversations of two to five turns; line 7 jumps at its third turn."""
    records = [_record(line, turn + 1, 20) for line in range(50) for turn in range(2 + line % 4)]
    for record in records:
        if record.line == 7 and record.turn == 3:
            record.values[:] += 40
    path = folder / "runs" / "turns"
    _token_run(path, records, [("evil", 3), ("kind", 3)], turns="each")
    report.run([path], out=folder / "turns.html")
    means = {(r.line, r.turn): float(r.values[:, 0].mean()) for r in records}
    moved = {k: abs(v - means[k[0], k[1] - 1]) for k, v in means.items() if k[1] > 1}
    return {"conversations": 50, "moved": max(moved, key=lambda key: moved[key])}


def many_answers(folder: Path) -> dict[str, Any]:
    """Write a page of 20,000 answers of 250 characters."""
    answers = [
        Answer(
            condition=("unsteered", "steered")[n % 2],
            question=f"Question {n // 20}?",
            rollout=n // 2 % 10,
            text=f"Answer {n} {'word ' * 48}",
            scores={"evil": float(n % 101), "coherence": 90.0},
        )
        for n in range(20_000)
    ]
    page = render_page(
        title="Many answers",
        chapters=[
            Chapter(
                summary="",
                sections=(Section(id="many", title="Many", summary="", answers=tuple(answers)),),
            )
        ],
        made=datetime(2026, 1, 2, tzinfo=UTC),
        version="0",
    )
    (folder / "answers.html").write_text(page)
    return {"per condition": 10_000}


def served_vector(folder: Path) -> None:
    """Write a vector of the bundled model, in no particular direction, for ``pvec serve``."""
    layers, width = 5, 160
    vector = PersonaVector(
        trait="evil",
        kinds={"response_avg": RNG.normal(0, 20, (layers + 1, width)).astype(np.float32)},
        mean_norm=np.full(layers + 1, 200, np.float32),
    )
    save_vector(vector, folder / "evil.safetensors")


def _record(line: int, turn: int, length: int) -> TokenRecord:
    words = [f" w{t}" for t in range(length - 2)] + [" 🚶é", HOSTILE]
    return TokenRecord(
        line=line,
        turn=turn,
        question=f"Question {line}.{turn}? {HOSTILE}",
        text="".join(words),
        token_ids=np.arange(length, dtype=np.int32),
        widths=np.array([len(word) for word in words], dtype=np.uint16),
        values=RNG.normal((10, -5), (3, 1), size=(length, 2)).astype(np.float32),
    )


def _token_run(
    path: Path, records: list[TokenRecord], columns: list[tuple[str, int]], *, turns: str
) -> None:
    with Run.open_or_create(path, kind=TOKENS_KIND, identity=IDENTITY) as run:
        run.begin_session(command=["pvec", "project"], projection_axes=AXES)
        run.end_session()
    for number, start in enumerate(range(0, len(records), 500)):
        write_tokens(path, number, records[start : start + 500], columns=len(columns))
    listed = [{"vector": vector, "layer": layer} for vector, layer in columns]
    write_summary(path, {"data": "data.jsonl", "turns": turns, "columns": listed})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
