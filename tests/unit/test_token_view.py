"""Token, conversation and screening pages: their numbers, against plain loops over the data."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.shell import pvec

from pvec.projection.screen_scores import choose_samples
from pvec.report import token_view as view_module
from pvec.report.token_view import PASSAGE, token_view
from pvec.runs.store import Run
from pvec.runs.summary import TOKENS_KIND, write_summary
from pvec.runs.tokens import TokenRecord, read_tokens, write_tokens

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(5)
COLUMNS = ("evil, layer 3", "kind, layer 3")
HOSTILE = "</script><script>alert(1)</script>"


def record(line: int, length: int, *, turn: int = 1) -> TokenRecord:
    words = [f" w{t}" for t in range(length)]
    if length > 2:
        words[1:3] = ["🚶", HOSTILE]
    return TokenRecord(
        line=line, turn=turn, question=f"Why {line}?", text="".join(words),
        token_ids=np.arange(length, dtype=np.int32),
        widths=np.array([len(word) for word in words], dtype=np.uint16),
        values=RNG.normal(3, 40, size=(length, 2)).astype(np.float32),
    )  # fmt: skip


def decoded(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_the_extreme_passages_are_those_of_a_loop_over_all_of_them() -> None:
    records = [record(n, length) for n, length in enumerate((40, 12, 5, 1, 0, 30))]
    data = token_view(records, COLUMNS, everything=False).data
    for column in range(2):
        for number, one in enumerate(records):
            width = min(PASSAGE, len(one.values))
            starts = range(len(one.values) - width + 1) if width else ()
            means = [float(one.values[s : s + width, column].mean()) for s in starts]
            for name, best in (("high", max), ("low", min)):
                found = data[name][column]["value"][number]
                if not means:
                    assert found is None
                    continue
                assert found == pytest.approx(best(means), rel=1e-3)
                start = data[name][column]["start"][number]
                assert means[start] == pytest.approx(best(means), rel=1e-5)
    top = data["top"][0]["high"]
    assert [t["value"] for t in top] == sorted((t["value"] for t in top), reverse=True)
    first = records[top[0]["answer"]]
    assert " ".join(top[0]["text"].split()) in " ".join(first.text.split())


def test_parts_hold_texts_and_values_as_javascript_reads_them() -> None:
    records = [record(n, 20) for n in range(90)]
    view = token_view(records, COLUMNS, everything=False)
    assert len(view.parts) == 3
    parts: list[Any] = [part() for part in view.parts]
    for number, one in enumerate(records):
        answer = parts[view.data["part"][number]][str(number)]
        units = answer["text"].encode("utf-16-le")
        ends = 2 * np.cumsum(decoded(answer["widths"], "<u2"))
        starts = [0, *ends[:-1]]
        texts = [units[a:b].decode("utf-16-le") for a, b in zip(starts, ends, strict=True)]
        assert texts[:3] == [" w0", "🚶", HOSTILE]
        assert "".join(texts) == one.text
        values = decoded(answer["values"], "<f2").reshape(-1, 2).astype(float)
        factors = [column["factor"] for column in view.data["columns"]]
        np.testing.assert_allclose(values * factors, one.values, rtol=1e-3, atol=1e-2)


def test_values_beyond_half_precision_are_kept() -> None:
    huge = record(0, 20)
    huge.values[3, 0] = -4e6
    view = token_view([huge], COLUMNS, everything=False)
    part: Any = view.parts[0]()
    values = decoded(part["0"]["values"], "<f2").reshape(-1, 2)[:, 0].astype(float)
    assert values[3] * view.data["columns"][0]["factor"] == pytest.approx(-4e6, rel=1e-3)


def test_a_page_that_cannot_hold_all_keeps_the_most_extreme_and_an_even_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [record(n, 20) for n in range(200)]
    monkeypatch.setattr(view_module, "TOKEN_BUDGET", 40 * 50)
    view = token_view(records, COLUMNS, everything=False)
    held = {n for n, part in enumerate(view.data["part"]) if part >= 0}
    assert 40 <= view.opened == len(held) <= 50
    for column in range(2):
        for end in ("high", "low"):
            assert view.data["top"][column][end][0]["answer"] in held
    gaps = np.diff(sorted(held))
    assert gaps.max() < 20
    assert token_view(records, COLUMNS, everything=True).opened == 200


def token_run(path: Path, records: list[TokenRecord], *, turns: str) -> Path:
    identity: dict[str, Any] = {"trait": "data", "model": "tiny", "adapter": None}
    with Run.open_or_create(path, kind=TOKENS_KIND, identity=identity) as run:
        run.begin_session(command=["pvec", "project"])
        run.end_session()
    write_tokens(path, 0, records, columns=2)
    columns = [{"vector": "evil", "layer": 3}, {"vector": "kind", "layer": 3}]
    write_summary(path, {"data": "data.jsonl", "turns": turns, "columns": columns})
    return path


def test_the_drift_is_the_mean_over_conversations_by_turn(tmp_path: Path) -> None:
    records = [record(line, 8, turn=turn) for line in range(6) for turn in range(1, 3 + line % 2)]
    path = token_run(tmp_path / "run", records, turns="each")
    done = pvec("report", path)
    assert done.code == 0, done.err
    page = (path / "report.html").read_text()
    assert HOSTILE not in page
    block = re.search(r'data-kind="tokens".*?class="data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    data = json.loads(block.group(1))
    for turn, point in enumerate(data["turns"][0], start=1):
        means = [float(r.values[:, 0].mean()) for r in records if r.turn == turn]
        assert point["n"] == len(means)
        assert point["mean"] == pytest.approx(np.mean(means), rel=1e-3, abs=1e-3)
        assert point["low"] < point["mean"] < point["high"]


def test_files_beside_the_page_are_written_and_old_ones_go(tmp_path: Path) -> None:
    path = token_run(tmp_path / "run", [record(n, 6) for n in range(90)], turns="last")
    done = pvec("report", path, "--beside", "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    folder = tmp_path / "page_parts" / "run-tokens"
    assert sorted(p.name for p in folder.iterdir()) == ["00000.js", "00001.js", "00002.js"]
    assert HOSTILE not in folder.joinpath("00000.js").read_text()
    assert 'class="part"' not in (tmp_path / "page.html").read_text()
    write_tokens(path, 0, [record(0, 6)], columns=2)
    assert pvec("report", path, "--beside", "--out", tmp_path / "page.html").code == 0
    assert [p.name for p in folder.iterdir()] == ["00000.js"]


def test_damaged_tokens_are_one_sentence(tmp_path: Path) -> None:
    path = token_run(tmp_path / "run", [record(n, 6) for n in range(3)], turns="last")
    assert len(list(read_tokens(path))) == 3
    for spoil in (lambda p: p.write_bytes(b"PK"), lambda p: p.unlink()):
        spoil(path / "part-00000.npz")
        done = pvec("report", path)
        assert (done.code, "--tokens --overwrite" in done.err) == (2, True)


def test_samples_to_read_are_the_furthest_the_nearest_and_a_spread() -> None:
    differences = RNG.normal(size=(5000, 2))
    differences[7] = np.nan
    limits = np.array([1.0, np.inf])
    chosen = choose_samples(differences, limits, most=400)
    assert len(chosen) == len(set(chosen)) == 400
    assert chosen == sorted(chosen)
    assert int(np.nanargmax(differences[:, 0])) in chosen
    assert int(np.nanargmin(np.abs(differences[:, 0] - 1.0))) in chosen
    assert np.diff(chosen).max() < 200
    assert choose_samples(differences[:300], limits, most=400) == list(range(300))


def test_beside_without_tokens_is_refused(tmp_path: Path) -> None:
    run = Path(__file__).parents[1] / "data" / "runs-0.1" / "screen"
    done = pvec("report", run, "--beside", "--out", tmp_path / "page.html")
    assert (done.code, "--beside has no effect" in done.err) == (2, True)
    assert not (tmp_path / "page.html").exists()
