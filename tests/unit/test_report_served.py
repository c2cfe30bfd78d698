"""`pvec report` on logs of `pvec serve`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.entry_point import run_pvec

from pvec.report.sections import served

VALUES = np.random.default_rng(0).normal(size=90).round(4).tolist()


def line(number: int, **changes: Any) -> str:
    steering = [{"vector": "evil", "layer": 3, "coef": 0.5, "operator": "add"}]
    record = {
        "id": f"chatcmpl-{number}", "time": 1.7e9 + 10 * number, "model": "tiny",
        "finish_reason": "stop", "steering": steering if number % 3 == 0 else [],
        "capped": ["evil"] if number % 9 == 0 else [],
        "projections": {"evil": {"layer": 3, "prompt": 0.1, "answer": VALUES[number]}},
    }  # fmt: skip
    return json.dumps(record | changes) + "\n"


def test_a_log_is_reported_with_its_older_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = {"prompt": "<user>Hello", "answer": "<img src=x onerror=alert(1)>"}
    Path("log.jsonl.2").write_text("".join(map(line, range(30))))
    Path("log.jsonl.1").write_text("".join(map(line, range(30, 60))))
    Path("log.jsonl").write_text("".join(line(n, **hostile) for n in range(60, 90)) + '{"id": "ch')
    done = run_pvec("report log.jsonl --json")
    assert done.code == 0, done.err
    (said,) = done.json["findings"]
    assert f"90 answers (evil {np.mean(VALUES):.3f}".replace("-", "−") in said.replace("-", "−")
    assert "10 capped" in said
    page = Path("report.html").read_text("utf-8")
    assert "<img src=x" not in page
    assert "evil@3 +0.5" in page
    files = {path.name: path for path in Path("report_figures").glob("*.csv")}
    (bins,) = (path for name, path in files.items() if "projections-evil" in name)
    rows = list(csv.DictReader(bins.read_text("utf-8").splitlines()))
    assert sum(int(row["unsteered"]) for row in rows) == 60
    assert sum(int(row["evil@3 +0.5"]) for row in rows) == 30
    (over_time,) = (path for name, path in files.items() if "over-time" in name)
    means = [
        float(row["mean"]) for row in csv.DictReader(over_time.read_text("utf-8").splitlines())
    ]
    assert means == pytest.approx([np.mean(part) for part in np.array_split(VALUES, 9)], abs=1e-3)


def test_additions_ceilings_and_floors_of_one_coefficient_are_told_apart(tmp_path: Path) -> None:
    entry = {"vector": "evil", "layer": 3, "coef": 0.5}
    operators = ("add", "cap", "floor", "ablate")
    lines = [line(n, steering=[{**entry, "operator": op}]) for n, op in enumerate(operators)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    (section,) = served.build([tmp_path / "log.jsonl"]).sections
    ((_, table),) = section.tables
    names = ("evil@3 +0.5", "evil@3 cap +0.5", "evil@3 floor +0.5", "evil@3 ablated")
    assert [row[:2] for row in table.rows] == [(name, 1) for name in names]


@pytest.mark.parametrize(
    ("text", "part"),
    [('{"question": "a"}\n', "is no log of pvec serve"), ("", "holds no answer of pvec serve")],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    done = run_pvec(f"report {tmp_path / 'log.jsonl'}")
    assert done.code == 2
    assert part in done.err
