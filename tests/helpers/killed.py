"""A command that is started again and again in one run folder, and killed at points of its work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pvec.closing import Closing

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
SERVER = Path(__file__).with_name("fork_server.py")


class KilledCommand(Closing):
    """Starts ``pvec ARGUMENTS… --out FOLDER`` in any folder, and kills it at some step."""

    def __init__(self, *arguments: str | Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, folder: Path, *, kill: int = 0, steps: int = 0, after: float = 0.0
    ) -> tuple[int, int]:
        """Run in ``folder``; return how it ended and how many steps it took.

        It is killed ``after`` seconds after its ``steps``-th step.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(folder, int(kill), steps, after, file=self._server.stdin, flush=True)
        line = self._server.stdout.readline()
        assert line, f"the server of commands ended with {self._server.wait()}"
        ended, taken = line.split()
        return int(ended), int(taken)

    def close(self) -> None:
        self._server.communicate()


def run_chains(
    command: KilledCommand, folder: Path, *, kills: int, outcome: Callable[[Path], Any], seed: int
) -> int:
    """Kill chains of runs until there were ``kills``; each must end as an undisturbed run does.

    A chain belongs to one run folder and ends when the command does. SIGKILL, SIGTERM and SIGHUP
    take turns. Returns how many chains there were.
    """
    draw = random.Random(seed)
    ended, steps = command.run(folder / "whole")
    assert ended == 0
    expected = outcome(folder / "whole")
    killed, chains = 0, 0
    while killed < kills:
        chain = folder / f"chain-{chains}"
        chains += 1
        ended = 1
        while ended != 0:
            kill = SIGNALS[killed % len(SIGNALS)]
            # early steps are those of the start; a chain that goes on takes fewer
            after = draw.choice([0.0, draw.uniform(0, 0.1)])
            at = draw.randint(1, steps)
            ended, _ = command.run(chain, kill=kill, steps=at, after=after)
            assert ended in (0, -kill, 128 + kill), (
                f"chain {chains}: exit code {ended}, {kill!r} {after:.3f} s after step {at}:\n"
                + chain.with_suffix(".output").read_text()
            )
            killed += ended != 0
        different = differences(outcome(chain), expected)
        assert not different, f"{chain} after {killed} kills: {different}"
    return chains


def differences(outcome: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return both values of what differs, by key; of mappings the entries that differ."""
    pairs = {key: (outcome.get(key), expected.get(key)) for key in {*outcome, *expected}}
    return {
        key: differences(*pair) if all(isinstance(part, Mapping) for part in pair) else pair
        for key, pair in pairs.items()
        if pair[0] != pair[1]
    }
