"""``python -m pvec`` in this process: the command line without the name of any module behind it."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shlex
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with ``--json``; an error is printed on stderr, as its last line."""
        return json.loads(self.out or self.err.strip().splitlines()[-1])


def run_pvec(line: str) -> Done:
    """Run ``pvec LINE``, split as a shell splits it, and return how it ended."""
    out, err = io.StringIO(), io.StringIO()
    argv, hook, code = sys.argv, sys.excepthook, 0
    sys.argv = ["pvec", *shlex.split(line)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("pvec", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, sys.excepthook = argv, hook
    return Done(code=code, out=out.getvalue(), err=err.getvalue())
