"""Starts a command quickly, again and again, to be killed: imports once and forks for each.

    python fork_server.py train CONFIG

Reads lines ``FOLDER SIGNAL STEPS SECONDS`` from standard input. For each it forks a process that
runs the command with ``--out FOLDER``, its output in ``FOLDER.output``, and sends itself the
signal ``SECONDS`` after its ``STEPS``-th step. A step is a file opened there or a line appended to
a log: progress, not time, so that a busy machine changes nothing. Writes how it ended (the exit
code, or minus the signal) and how many steps it had taken.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from signal import SIG_DFL, SIGHUP, SIGTERM
from signal import signal as set_handler
from typing import Any

import torch

from pvec.cli.app import main as pvec
from pvec.runs.jsonl import JsonlLog


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)  # a thread pool would not live through a fork
    import_all(sys.argv[1])

    for line in sys.stdin:
        folder, signal, steps, seconds = line.split()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for number in (SIGHUP, SIGTERM):  # a background job may have been told to ignore them
                set_handler(number, SIG_DFL)
            sys.stdout = sys.stderr = Path(f"{folder}.output").open("w")  # noqa: SIM115 (until the end)
            count_steps(folder, writer, signal=int(signal), steps=int(steps), after=float(seconds))
            run([*sys.argv[1:], "--out", folder, "-q"])
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as taken:
            sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {len(taken.read())}\n")
            sys.stdout.flush()


def import_all(command: str) -> None:
    """Import what the command imports at use."""
    if command == "train":
        from pvec.training import checkpoints, model, plan, trainer  # noqa: F401
    else:
        from pvec.backends.hf import backend  # noqa: F401
        from pvec.evaluation import steer_eval  # noqa: F401
        from pvec.judges import local  # noqa: F401


def count_steps(folder: str, writer: int, *, signal: int, steps: int, after: float) -> None:
    """Write a byte per step, and send the signal when it is due."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        os.write(writer, b".")
        if count == steps:
            threading.Timer(after, os.kill, (os.getpid(), signal)).start()

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(folder):
            step()

    append = JsonlLog.append

    def counted(log: JsonlLog, record: Mapping[str, Any]) -> None:
        append(log, record)
        step()

    JsonlLog.append = counted  # type: ignore[method-assign]
    sys.addaudithook(opened)


def run(command: list[str]) -> None:
    """Run the command and leave the forked process, whatever happens."""
    code = 1
    try:
        pvec(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a fault of pvec, to be shown
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
