"""Starts trainings quickly, one after another, to be killed: imports once and forks for each.

    python fork_server.py CONFIG

Reads lines ``FOLDER SIGNAL FILES SECONDS`` from standard input. For each it forks a process that
trains in the folder and sends itself the signal ``SECONDS`` after it has opened the ``FILES``-th
file there: progress, not time, so that a busy machine changes nothing. Writes how it ended (the
exit code, or minus the signal) and how many files it had opened.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from pvec.cli.app import main as pvec


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)  # a thread pool would not live through a fork
    from pvec.training import checkpoints, model, plan, trainer  # noqa: F401 (imported once)

    for line in sys.stdin:
        folder, signal, files, seconds = line.split()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            count_files(folder, writer, signal=int(signal), files=int(files), after=float(seconds))
            train(Path(sys.argv[1]), folder)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as opened:
            sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {len(opened.read())}\n")
            sys.stdout.flush()


def count_files(folder: str, writer: int, *, signal: int, files: int, after: float) -> None:
    """Write a byte per file that is opened in ``folder``, and send the signal when it is due."""
    count = 0

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and str(arguments[0]).startswith(folder):
            count += 1
            os.write(writer, b".")
            if count == files:
                threading.Timer(after, os.kill, (os.getpid(), signal)).start()

    sys.addaudithook(opened)


def train(config: Path, folder: str) -> None:
    """Run the command and leave the forked process, whatever happens."""
    code = 1
    try:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
        pvec(["train", str(config), "--out", folder, "-q"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
