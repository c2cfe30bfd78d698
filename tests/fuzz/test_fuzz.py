"""Damaged files, settings and options to every command: what is not ours to raise never escapes.

``make test-fuzz`` runs it. A case is its name alone: ``pytest tests/fuzz -k 'trait-17-'`` makes it
again; ``FUZZ_SEED`` draws other cases and ``FUZZ_SCALE`` more of them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.damage import BAD_VALUES, damage
from helpers.entry_point import run_pvec
from helpers.frozen_commands import VECTOR, working_folder

from pvec.settings.tree import env_name, fields

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SCALE = float(os.environ.get("FUZZ_SCALE", "1"))

_V = f"--vector {VECTOR} --layer 3"
_SMALL = "--limit 1 -n 1 --max-tokens 8"


@dataclass(frozen=True)
class Kind:
    """Files of one kind and the commands that read them; ``{file}`` is the damaged one."""

    files: tuple[str, ...]
    commands: tuple[str, ...]
    count: int


KINDS = {
    "trait": Kind(
        ("extract/traits/evil.json",),
        (
            "trait check {file}",
            "trait show {file}",
            "extract --trait {file} --dry-run",
            "steer-eval --trait {file} --dry-run",
            f"steer-eval --trait evil --also {{file}} {_SMALL} "
            "--out new --no-judge --no-random-control --no-prompt-baseline",
        ),
        60,
    ),
    "vector": Kind(
        (VECTOR, "evil.gguf", "reference/evil_response_avg_diff.pt"),
        (
            "vector show {file}",
            f"vector compare {{file}} {VECTOR} --layer 3",
            "vector combine '2*{file}' --out good.safetensors",
            "vector convert {file} good.gguf",
            "vector convert {file} good.pt",
            "vector lens {file} --layer 3 --top 2",
            "project inputs/answers.csv --plain-prompts --vector {file} --layer 3 --overwrite",
            "steer-eval --trait evil --vector {file} --layer 3 --coef 1 --dry-run",
            "train inputs/train.yaml --check --set steering.0.vector={file}",
            "vector convert {file} good.safetensors",
        ),
        80,
    ),
    "table": Kind(
        ("inputs/answers.csv", "inputs/chats.jsonl", "inputs/talk.jsonl", "inputs/prompts.jsonl"),
        (
            f"project {{file}} {_V} --overwrite",
            f"project {{file}} {_V} --overwrite --plain-prompts",
            f"project {{file}} {_V} --in-place --skip-bad --overwrite",
            f"screen {{file}} {_V} --natural prompt --overwrite --out new --max-tokens 8",
            f"screen inputs/chats.jsonl --reference {{file}} {_V} --natural prompt --overwrite "
            "--out new --max-tokens 8",
            f"monitor {{file}} --score evil {_V} --out new",
            f"shift tiny train/adapter {_V} --questions {{file}} --out new",
            "train inputs/train.yaml --check --set data.train={file}",
            "vector compute --pos {file} --neg extract/evil_neg.csv --trait evil "
            "--out good.safetensors",
        ),
        90,
    ),
    "judged": Kind(
        ("extract/evil_pos.csv", "extract/evil_neg.csv"),
        (
            "vector compute --pos extract/evil_pos.csv --neg extract/evil_neg.csv --trait evil "
            "--out good.safetensors",
            f"project {{file}} {_V} --overwrite",
        ),
        30,
    ),
    "run": Kind(
        (
            "extract/manifest.json",
            "extract/responses.jsonl",
            "extract/scores.jsonl",
            "extract/traits/evil.json",
        ),
        (
            "judge extract",
            "report extract",
            "vector compute extract --out good.safetensors",
            f"project extract {_V} --overwrite",
            "vector show extract",
            "extract --trait evil --limit 2 -n 1 --out extract",
            "judge extract --judge-scale binary",
        ),
        90,
    ),
    "study": Kind(
        (
            "steer/manifest.json",
            "steer/responses.jsonl",
            "steer/scores.jsonl",
            "screen/summary.json",
            "screen/manifest.json",
            "screen/samples.csv",
            "monitor/summary.json",
            "monitor/prompts.csv",
            "shift/summary.json",
            "shift/manifest.json",
            "train/result.json",
            "train/manifest.json",
            "train/log.jsonl",
        ),
        ("report {folder}", "report {folder} extract --out page.html", "judge {folder}"),
        80,
    ),
    "training": Kind(
        (
            "train/adapter/adapter_config.json",
            "train/adapter/adapter_model.safetensors",
            "train/result.json",
            "train/manifest.json",
            "train/checkpoint-2/trainer_state.json",
            "train/checkpoint-2/touched.json",
            "train/checkpoint-2/adapter_model.safetensors",
            "train/checkpoint-2/rng_state.pth",
            "train/checkpoint-2/scheduler.pt",
            "train/checkpoint-2/optimizer.pt",
            "train/checkpoint-2/adapter_config.json",
        ),
        (
            "train inputs/train.yaml --out train",
            f"project inputs/answers.csv --plain-prompts --adapter train/adapter {_V} --overwrite "
            "--any-model",
            f"shift tiny train/checkpoint-2 {_V} --questions inputs/questions.jsonl --out new",
            "report train",
        ),
        50,
    ),
    "config": Kind(
        ("pvec.yaml", "inputs/train.yaml"),
        ("config --config {file}", "train {file} --check", "config"),
        60,
    ),
}
"""Seeded damage to each kind of file."""


@dataclass(frozen=True)
class Case:
    """One input: a file to damage (or none), environment names, and the command."""

    name: str
    command: str
    file: str | None = None
    environ: tuple[tuple[str, str], ...] = ()

    @property
    def draw(self) -> random.Random:
        return random.Random(f"{SEED} {self.name}")


def _file_cases() -> Iterator[Case]:
    for kind, about in KINDS.items():
        for number in range(round(about.count * SCALE)):
            name = f"{kind}-{number}-"
            draw = random.Random(f"{SEED} {name} case")
            file = draw.choice(about.files)
            folder = file.partition("/")[0]
            command = draw.choice(about.commands).format(file=file, folder=folder)
            yield Case(name, command, file=file)


OPTIONS = {
    f"extract --trait evil {_SMALL} --dry-run": (
        "--seed", "--rollouts", "--limit", "--max-tokens", "--temperature", "--top-p",
        "--threshold",
        "--judge-price", "--judge-url", "--judge-model", "--out", "--runs", "--device", "--dtype",
        "--model", "--adapter", "--trait", "--batch-rows", "--config",
    ),
    f"steer-eval --trait evil {_SMALL} {_V} --dry-run": (
        "--layer", "--coef", "--operator", "--positions", "--vector", "--also", "--tasks", "--out",
    ),
    "vector show": ("", "--svg", "--kind"),
    "vector combine": ("", f"{VECTOR} --out", "--orthogonal-to"),
    "trait show": ("",),
    "report": ("", "extract --out"),
    "train inputs/train.yaml --check --set": ("", "lora.r=", "steering.0.coef=", "data.train="),
    f"project inputs/answers.csv --plain-prompts {_V}": (
        "--layer", "--projection-type", "--prompt-column", "--answer-column", "--out", "--turns",
    ),
    "config": ("--config", "--seed", "--model", "--judge-url"),
}  # fmt: skip
BAD_TEXTS = (
    "''", "-1", "0", "nan", "inf", "1e999", "9" * 40, "9" * 5000, "../..", "/dev/null",
    "/proc/self",
    "$'\\x1b[31m'", "'[/bold]'", "'a\\nb'", "x" * 300, "x" * 5000, "1,2,,3", "3:1", "1:2:0", "1+",
    "ℓ",
    "'http://user:secret@localhost:1/v1?key=secret'", "'http://['", "nowhere.json", "extract", "=",
    ":",
    "1:999999999:1e-9", "'{'", "'a b'", "-", "~", "tiny",
)  # fmt: skip


def _option_cases() -> Iterator[Case]:
    for number in range(round(80 * SCALE)):
        name = f"option-{number}-"
        draw = random.Random(f"{SEED} {name} case")
        command = draw.choice(list(OPTIONS))
        option = draw.choice(OPTIONS[command])
        glue = "" if option.endswith("=") else " "
        yield Case(name, f"{command} {option}{glue}{draw.choice(BAD_TEXTS)}")


def _environment_cases() -> Iterator[Case]:
    names = [env_name(path) for path in fields()]
    for number in range(round(40 * SCALE)):
        name = f"environment-{number}-"
        draw = random.Random(f"{SEED} {name} case")
        variable = draw.choice(names)
        value = draw.choice((*BAD_VALUES[:-1], "3,4", "[3", "a,,b", " ", "tiny", "\udcff"))
        command = draw.choice(("config", f"extract --trait evil {_SMALL} --dry-run"))
        yield Case(name, command, environ=((variable, value.replace("\x00", "")[:3000]),))


CASES = [*_file_cases(), *_option_cases(), *_environment_cases()]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old runs, and their vector in the other formats."""
    folder = working_folder(tmp_path_factory.mktemp("template"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        warm = f"project inputs/answers.csv --plain-prompts {_V} --out warm.csv"
        assert run_pvec(warm).code == 0  # imports do not count against the first case
        for target in ("evil.gguf", "reference", "good.safetensors", "good.gguf", "good.pt"):
            assert run_pvec(f"vector convert {VECTOR} {target}").code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    return tmp_path


OTHERS_WORDS = re.compile(
    r"Traceback|NoneType|object has no attribute|unexpected \w+|<class '|KeyError|TypeError"
    r"|ValueError|AttributeError|RuntimeError|\bErrno\b|not subscriptable|not iterable|unhashable"
    r"|list indices|invalid literal|could not convert|codec can't|unsupported operand|must be str"
    r"|0x[0-9a-f]{6,}|__[a-z]+__|positional argument|pydantic|Value error|maximum recursion"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@pytest.mark.fuzz
@pytest.mark.timeout(60, func_only=True)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_but_our_own_errors(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.file is not None:
        damage(folder / case.file, case.draw)
    for variable, value in case.environ:
        monkeypatch.setenv(variable, value)
    before = contents(folder)
    shown = f"pvec {case.command[:300]}\n{case.file} {case.environ}\n"
    try:
        done = run_pvec(case.command)
    except Exception as error:  # what the command line would call a bug
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/pvec/" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
        pytest.fail(f"{type(error).__name__}: {str(error)[:300]} ({where}): {shown}")
    shown += done.out[-1500:] + done.err[-3000:]
    assert done.code in (0, 2), f"exit code {done.code}: {shown}"
    found = OTHERS_WORDS.search(done.err) or CONTROL.search(done.out) or CONTROL.search(done.err)
    assert not found, f"{found}: {shown}"
    if done.code == 2:
        if not case.command.startswith("trait check"):  # it prints what it found
            assert done.err.count("\nError: ") + done.err.startswith("Error: ") == 1, shown
        assert len(done.err) < 12_000, f"no sentence: {shown}"
        assert not done.err or done.err.rstrip()[-1] in ".)?`", f"no sentence: {shown}"
        after = contents(folder)
        lost = [name for name, data in before.items() if after.get(name) != data]
        assert not [name for name in lost if "good." in name or "inputs/" in name], shown
    assert not list(folder.rglob("*.tmp*")), f"a partial file stays behind: {shown}"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_symlink() and stat.S_ISREG(path.lstat().st_mode)
    }


def test_there_are_enough_cases_and_they_differ() -> None:
    if SCALE == 1:
        assert len(CASES) >= 500
    assert len({(case.command, case.name) for case in CASES}) == len(CASES)
