"""The command line as a process: exit codes, one sentence per failure, lazy commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pvec import __version__
from pvec.cli.app import Command, LazyGroup, load, main


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main() sets its own


def pvec(
    *args: str, cwd: Path, code: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run ``pvec ARGS``, or Python ``code`` with the arguments, in a folder of its own."""
    start = ("-m", "pvec") if code is None else ("-c", code)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PVEC_")}
    return subprocess.run(
        [sys.executable, *start, *args],
        cwd=cwd,
        env={**env, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


HELP_AND_MODULES = """
import sys
from pvec.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.stderr.write("\\n".join(sys.modules))
"""


@pytest.mark.parametrize("args", [("--help",), ("--version",), ()])
def test_help_loads_nothing_heavy(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = pvec(*args, cwd=tmp_path, code=HELP_AND_MODULES)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "numpy", "pandas", "openai", "pydantic"}
    assert "pvec" in done.stdout


def test_no_command_loads_heavy_packages_before_it_runs(tmp_path: Path) -> None:
    code = """
import sys
from pvec.cli.app import LazyGroup, load
heavy = {
    "torch", "transformers", "numpy", "scipy", "pandas", "matplotlib", "huggingface_hub",
    "pydantic_settings", "dotenv", "jinja2", "openai", "fastapi",
}
for command in LazyGroup.commands_by_name.values():
    load(command)
    print(command.name, sorted(heavy & set(sys.modules)))
"""
    done = pvec(cwd=tmp_path, code=code)
    assert done.stdout.splitlines() == [f"{name} []" for name in LazyGroup.commands_by_name]


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "9"}, None), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
)
def test_waiting_threads_sleep_unless_the_user_set_something(
    given: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what main sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("command", LazyGroup.commands_by_name.values(), ids=lambda c: c.name)
def test_the_summary_in_the_list_is_the_first_line_of_the_commands_help(command: Command) -> None:
    assert load(command).help.splitlines()[0] == command.summary


def test_without_arguments_help_is_shown(tmp_path: Path) -> None:
    done = pvec(cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage: pvec" in done.stdout


def test_the_version_is_shown(tmp_path: Path) -> None:
    assert pvec("--version", cwd=tmp_path).stdout == f"pvec {__version__}\n"


def failed(*args: str) -> int:
    """Run ``pvec ARGS`` in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("confg",), "There is no command 'confg'. Did you mean 'config'?"),
        (("--quiet",), "Missing command"),
        (("config", "--sed", "1"), "No such option: --sed"),
        (("config", "--seed", "one"), "Invalid value for '--seed'"),
        (("config", "--seed", "-1"), "generation.seed = -1 (from command line)"),
        (("config", "--backend", "hff"), "Invalid value for '--backend'"),
        (("config", "extra"), "unexpected extra argument"),
        (
            ("config", "--config", "nope.yaml"),
            "There is no configuration file nope.yaml: check the path.",
        ),
        (
            ("--config", "nope.yaml", "config"),
            "There is no configuration file nope.yaml: check the path.",
        ),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_code_2(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize("args", [("--json", "config"), ("config", "--json"), ("--json", "confg")])
def test_with_json_an_error_is_an_object_and_stdout_stays_empty(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PVEC_MODEL__IDD", "x")
    assert failed(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    assert error["type"] == "InputError"
    assert error["exit_code"] == 2


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed("config", "--config", "nope.yaml", "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("Error: There is no configuration file nope.yaml: check the path.\n")


CONFIG_RAISES = """
import errno, sys
import pvec.cli.config as config
from pvec.cli.app import main

def fail(ctx):
    raise {error}

config.resolved_from = fail
main(sys.argv[1:])
"""


def test_a_bug_is_one_line_with_a_hint_and_code_1(tmp_path: Path) -> None:
    code = CONFIG_RAISES.format(error="RuntimeError('oh')")
    done = pvec("config", cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: unexpected RuntimeError: oh (run again with --debug for the traceback)\n"
    )
    with_debug = pvec("config", "--debug", cwd=tmp_path, code=code)
    assert with_debug.returncode == 1
    assert "Traceback" in with_debug.stderr


def test_an_interruption_says_what_is_kept_and_ends_with_130(tmp_path: Path) -> None:
    done = pvec("config", cwd=tmp_path, code=CONFIG_RAISES.format(error="KeyboardInterrupt"))
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert "is kept" in done.stderr


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    code = CONFIG_RAISES.format(error="OSError(errno.ENOSPC, 'No space left on device', 'runs/x')")
    done = pvec("config", cwd=tmp_path, code=code)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: cannot read or write runs/x (No space left on device): the disk is full; free some "
        "space or choose a folder on another disk.\n"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("MemoryError()", "There is not enough memory: use a smaller model"),
        ("RecursionError('deep')", "The input is nested too deeply"),
        (
            "FileNotFoundError(2, 'No such file or directory', 'a.csv')",
            "cannot read or write a.csv",
        ),
        ("ConnectionRefusedError(111, 'Connection refused')", "The connection failed"),
        ("OSError('odd')", "could not be used (odd)"),
        ("IsADirectoryError(21, 'Is a directory', 'runs')", "that is a folder, not a file"),
    ],
)
def test_errors_of_the_system_are_one_sentence_with_a_remedy(
    error: str, sentence: str, tmp_path: Path
) -> None:
    done = pvec("config", cwd=tmp_path, code=CONFIG_RAISES.format(error=error))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


PVEC = (sys.executable, "-m", "pvec")
AS_IN_A_SHELL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore these
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
WAITS = """
import sys, time
import pvec.cli.config as config
from pvec.cli.app import main

def wait(ctx):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)

config.resolved_from = wait
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("SIGTERM", 143, "Terminated"), ("SIGHUP", 129, "Terminated"), ("SIGINT", 130, "Interrupted")],
)
def test_a_signal_closes_everything_and_is_one_line(
    name: str, code: int, word: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_SHELL + WAITS, "config"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(getattr(signal, name))
        out, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert out == "closed\n"
    assert err == (
        f"Error: {word}; what was finished is kept, and the same command continues from there.\n"
    )


IN_AN_IMPORT = """
import os, signal
import pvec.cli.config as config
from pvec.cli.app import main

class Attribute:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.{name})

def load(ctx):
    class Of_a_library:
        value = Attribute()

config.resolved_from = load
main(["config"])
"""


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("SIGTERM", 143, "Terminated"), ("SIGHUP", 129, "Terminated"), ("SIGINT", 130, "Interrupted")],
)
def test_a_signal_in_the_middle_of_an_import_is_no_bug(
    name: str, code: int, word: str, tmp_path: Path
) -> None:
    """Python 3.11 makes a RuntimeError of what is raised while a class is being made."""
    done = pvec(cwd=tmp_path, code=AS_IN_A_SHELL + IN_AN_IMPORT.format(name=name))
    assert done.returncode == code
    assert done.stderr.startswith(f"Error: {word}; ")
    assert done.stderr.count("\n") == 1


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{WAITS}".replace(
        "60", "1"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "config"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(signal.SIGHUP)
        assert running.wait(timeout=60) == 1  # the end of this test's fake, not of the signal


@pytest.mark.parametrize(
    "args", [("--help",), ("config",), ("config", "--json"), ("trait", "list")]
)
def test_a_reader_that_goes_away_ends_it_quietly(args: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" "$@" | head -c 1', *PVEC, *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # short output fits into the pipe


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pvec", "config", "--json"],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_completion_offers_the_commands(tmp_path: Path) -> None:
    done = pvec(
        cwd=tmp_path, _PVEC_COMPLETE="complete_bash", COMP_WORDS="pvec conf", COMP_CWORD="1"
    )
    assert "config" in done.stdout.split()
