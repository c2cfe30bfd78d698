"""The error boundary: everything that ends a command early becomes one line and an exit code.

Exit codes: 1 a bug in pvec; 2 something the user can fix; 130, 143, 129 interrupted or terminated
(SIGINT, SIGTERM, SIGHUP); 141 the reader of the output went away, as with ``| head``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer

from pvec.cli.console import visible
from pvec.errors import PvecError
from pvec.runs.files import os_error_sentence

_KEPT = "what was finished is kept, and the same command continues from there."
_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_CLOSED_PIPE = 141  # 128 + SIGPIPE, as if the signal had ended the process


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM and SIGHUP, so that files and models are closed."""


@dataclass(frozen=True)
class Failure:
    """How a command ended early: what is shown, and the exit code."""

    kind: str
    message: str
    code: int


def run_command(command: Callable[[], Any], *, as_json: bool, debug: bool) -> NoReturn:
    """Run ``command`` and exit with its result; every failure is one line on stderr.

    With ``as_json`` that line is a JSON object. ``debug`` shows the traceback too. An exception
    that nobody foresaw leaves this function, and Python's exception hook shows it in one line.
    """

    def show(failure: Failure, error: BaseException | None) -> None:
        if debug and error is not None:
            traceback.print_exception(error)
        line = f"Error: {visible(failure.message)}"
        if as_json:
            content = {
                "type": failure.kind,
                "message": failure.message,
                "exit_code": failure.code,
            }
            line = json.dumps({"error": content})
        with contextlib.suppress(OSError):  # stderr may be closed as well
            sys.stderr.write(f"{line}\n")

    def hook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        hint = "" if debug else " (run again with --debug for the traceback)"
        show(Failure(kind.__name__, f"unexpected {kind.__name__}: {error}{hint}", 1), error)

    sys.excepthook = hook
    received: list[int] = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable(received):
            code = command()
            sys.stdout.flush()
    except BaseException as error:
        if _output_is_closed(error):
            _discard_output()
            sys.exit(_CLOSED_PIPE)
        failure = failure_of(_interruption(error, received) or error)
        if failure is None:
            raise
        show(failure, None if isinstance(error, SystemExit) else error)
        sys.exit(failure.code)
    if code == 130:  # Typer turns Ctrl-C into this code
        show(Failure("Interrupted", f"Interrupted; {_KEPT}", 130), None)
    sys.exit(code if isinstance(code, int) else 0)


def failure_of(error: BaseException) -> Failure | None:  # noqa: PLR0911 (a line per kind)
    """Return what an exception means to the user; None for one that nobody foresaw."""
    kind = type(error).__name__
    if isinstance(error, PvecError):
        return Failure(kind, str(error), 2)
    if isinstance(error, typer.TyperException):
        return Failure(kind, _usage(error), 2)
    if isinstance(error, typer.Abort):
        return Failure("InputError", "Stopped at a question.", 130)
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted", f"Interrupted; {_KEPT}", 130)
    if isinstance(error, Terminated):
        return Failure("Terminated", f"Terminated; {_KEPT}", int(str(error.code)))
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        remedy = "use a smaller model, dtype or batch (--batch-rows)"
        return Failure(kind, f"There is not enough memory: {remedy}.", 2)
    if isinstance(error, RecursionError):
        return Failure(kind, "The input is nested too deeply: simplify it.", 2)
    if isinstance(error, OSError):
        return Failure(kind, os_error_sentence(error), 2)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return False
    from pvec.models.memory import is_out_of_memory

    return is_out_of_memory(error)


def _interruption(error: BaseException, received: Sequence[int]) -> BaseException | None:
    """Return the interruption that ended the command, whatever became of it on its way here.

    A signal arrives anywhere. Inside of an import, for one, Python makes a ``RuntimeError`` of what
    its handler raises ("Error calling __set_name__"), and libraries do the like. ``received`` are
    the signals that came, each of which was to end the command.
    """
    if received:
        return Terminated(128 + received[0])
    cause: BaseException | None = error
    for _ in range(100):  # a chain may be a circle
        if cause is None or isinstance(cause, KeyboardInterrupt):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def _terminable(received: list[int]) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ``Terminated`` unless the caller ignores them (nohup).

    They are noted in ``received``.
    """

    def terminate(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        raise Terminated(128 + number)

    changed = []
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, terminate)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _output_is_closed(error: BaseException) -> bool:
    """Tell a reader that went away; Typer and rich turn the error into an exit with code 1."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, BrokenPipeError)


def _discard_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter's end does not complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.__stdout__.fileno())  # type: ignore[union-attr]


def _usage(error: typer.TyperException) -> str:
    """Return a usage mistake as one sentence that says where to look."""
    ctx = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = message.replace(": Value error, ", ": ")  # Typer's words for a wrong choice
    hint = f" `{ctx.command_path} --help` lists the options." if ctx else ""
    return f"{message.rstrip('.')}.{hint}"
