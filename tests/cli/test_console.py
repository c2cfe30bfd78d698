"""What is shown: results on stdout, the rest on stderr, JSON that any program can read."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr
from rich.console import Console as RichConsole

from pvec.cli.console import Console, table, with_interval
from pvec.cli.progress import Pace, PlainProgress, bars, describe, duration
from pvec.runs.summary import jsonable
from pvec.settings import Settings
from pvec.types import Progress


@dataclass(frozen=True)
class Result:
    folder: Path
    scores: np.ndarray
    mean: float
    key: SecretStr


def test_results_become_plain_json_with_null_for_what_is_no_number() -> None:
    result = Result(Path("runs/x"), np.array([1.5, np.nan], np.float32), math.inf, SecretStr("k"))
    assert json.loads(json.dumps(jsonable(result), allow_nan=False)) == {
        "folder": "runs/x",
        "scores": [1.5, None],
        "mean": None,
        "key": "**********",
    }
    assert jsonable({1: (np.int64(2), {"b", "a"})}) == {"1": [2, ["a", "b"]]}
    assert jsonable(Settings())["paths"] == {"runs": "runs", "exact_csv": False}


def test_with_json_nothing_but_the_result_reaches_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(json=True)
    console.print("for people")
    console.note("a note")
    console.emit({"a": 1}, lambda c, _: c.print("for people"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "a note\n"


def test_quiet_silences_notes_and_progress_but_no_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(quiet=True, verbose=True)
    console.note("a note")
    console.detail("a detail")
    console.warn("look out")
    with console.progress() as on_progress:
        on_progress(Progress(stage="work", done=1, total=2))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Warning: look out\n"


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress() as on_progress:
        on_progress(Progress(stage="generate", done=0, total=2000, unit="answers"))
        on_progress(Progress(stage="generate", done=2000, total=2000, unit="answers"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generate: 0/2,000 answers"
    assert lines[1].startswith("generate: 2,000/2,000 answers")


def ticks(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def test_plain_progress_writes_few_lines_with_rate_and_time_left() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append, clock=ticks(0.5).__next__)
    for done in range(100, 1001):  # a hundred were there before: they do not count as speed
        progress(Progress(stage="judge", done=done, total=1000, unit="scores"))
    assert lines[0] == "judge: 100/1,000 scores"
    assert lines[1] == "judge: 120/1,000 scores, 2 scores/s, 7m 20s left"
    assert lines[-1] == "judge: 1,000/1,000 scores, 2 scores/s"
    assert len(lines) <= 48


def test_plain_progress_of_a_fast_job_is_one_line_a_second_at_most() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append, clock=ticks(0.001).__next__)
    for done in range(1001):
        progress(Progress(stage="capture", done=done, total=1000))
    assert len(lines) <= 3


def test_the_time_left_does_not_count_what_came_before_the_first_part() -> None:
    lines: list[str] = []
    clock = iter([0.0, 80.0, 90.0]).__next__  # loading and the first batch take 80 seconds
    progress = PlainProgress(lines.append, clock=clock)
    for done in (0, 20, 40):
        progress(Progress(stage="generate", done=done, total=100, unit="answers"))
    assert lines[1] == "generate: 20/100 answers", "one batch tells nothing about the speed"
    assert lines[2] == "generate: 40/100 answers, 2 answers/s, 30s left"


def bar_lines(progresses: Sequence[Progress], *, width: int = 80) -> list[str]:
    """Return what a terminal of ``width`` columns shows when all is done."""
    stream = io.StringIO()
    terminal = RichConsole(file=stream, width=width, force_terminal=True, no_color=True)
    seconds = iter(float(2 * n) for n in range(len(progresses)))
    with bars(terminal, clock=seconds.__next__) as on_progress:
        for progress in progresses:
            on_progress(progress)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", stream.getvalue()).split("\n")


def test_a_bar_leaves_count_speed_and_time_left_their_place_on_80_columns() -> None:
    detail = "8,410 tokens/s, 20 at once"
    running = [
        Progress(stage="evil: answers", done=done, total=12_000, unit="answers", detail=detail)
        for done in (0, 20, 1_234)
    ]
    shown = bar_lines(running)
    assert all(len(line.rstrip()) <= 80 for line in shown)
    last = next(line for line in reversed(shown) if line.strip())
    assert "1,234/12,000 answers, 607 answers/s, 18s left" in last
    assert "━" in last


def test_a_finished_bar_says_what_was_done() -> None:
    detail = "8,410 tokens/s, 0 at once"
    work = [
        Progress(stage="answers", done=done, total=2_000, unit="answers", detail=detail)
        for done in (0, 1_000, 2_000)
    ]
    last = next(line for line in reversed(bar_lines(work)) if line.strip())
    assert last.rstrip().endswith("2,000/2,000 answers, 500 answers/s")


def test_a_stage_without_work_says_so() -> None:
    nothing = Progress(stage="judging", done=0, total=0, unit="scores")
    assert describe(nothing, Pace(began=(0.0, 0)), 1.0) == "no scores left to do"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0s"), (59.4, "59s"), (125, "2m 05s"), (12000, "3h 20m")]
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_tables_align_numbers_and_show_a_dash_for_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [("evil", 71.26, 1000), ("kind", 8.0, 2), ("[bold]", float("nan"), None)]
    Console().print(table(("trait", "mean", "n"), rows))
    shown = capsys.readouterr().out
    lines = shown.rstrip().splitlines()[-3:]
    assert [line.split()[1] for line in lines] == ["71.3", "8.0", "–"]
    assert "1,000" in shown
    assert "[bold]" in shown  # data are never markup
    assert shown.rstrip().splitlines()[-1].split() == ["[bold]", "–", "–"]


def test_an_interval_stands_beside_its_mean() -> None:
    assert with_interval(71.26, 68, 74.14) == "71.3 [68.0, 74.1]"
    assert with_interval(math.nan, math.nan, math.nan) == "–"


HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \x7f [bold]b[/bold] [/nope] \u202eabc :smile: \ud800"


def shown_by(capsys: pytest.CaptureFixture[str], *, terminal: bool) -> str:
    console = Console()
    console.out._force_terminal = console.err._force_terminal = terminal
    console.print(HOSTILE)
    console.print(table((HOSTILE, "n"), [(HOSTILE, 1)], title=HOSTILE))
    console.note(HOSTILE)
    console.detail(HOSTILE)
    console.warn(HOSTILE)
    with console.progress() as on_progress:
        on_progress(Progress(stage=HOSTILE, done=1, total=2, detail=HOSTILE))
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_nothing_that_is_shown_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(capsys, terminal=False)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]
    assert "\u202e" not in shown
    assert shown.count("\u241b[2J") >= 6
    assert "[bold]b[/bold] [/nope]" in shown, "markup in a name is text"
    assert ":smile:" in shown


def test_a_terminal_gets_only_the_escapes_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(capsys, terminal=True)
    assert "\x1b[2J" not in shown
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown


def test_json_holds_what_it_was_given_and_no_control_character(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console(json=True).emit({"name": HOSTILE}, lambda *_: None)
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": HOSTILE}
    assert not [c for c in out if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0]


@pytest.mark.parametrize(
    ("terminal", "quiet", "busy", "said"),
    [
        (True, False, False, True),
        (True, False, True, False),  # something else was shown
        (True, True, False, False),
        (False, False, False, False),
    ],
)
def test_a_terminal_is_told_that_libraries_are_loading(
    terminal: bool,
    quiet: bool,
    busy: bool,
    said: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pvec.cli.console.SILENT_SECONDS", 0.01)
    console = Console(quiet=quiet)
    console.out._force_terminal = console.err._force_terminal = terminal
    with console.note_if_slow():
        if busy:
            console.note("loading tiny")
        time.sleep(0.1)
    assert ("starting" in capsys.readouterr().err) is said
