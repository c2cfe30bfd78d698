"""``pvec`` as a user calls it, in this process: exit code and what it printed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any

from pvec.cli.app import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The one line of an error, without the progress before it."""
        return self.err.strip().splitlines()[-1]


def pvec(*arguments: object) -> Done:
    """Run ``pvec ARGUMENTS`` and return how it ended."""
    out, err = io.StringIO(), io.StringIO()
    hook, code = sys.excepthook, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    finally:
        sys.excepthook = hook
    return Done(code=code, out=out.getvalue(), err=err.getvalue())
