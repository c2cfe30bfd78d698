"""What is typed in ``pvec chat``: line editing, history and completion through readline."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pvec.cli.console import Console

_LINES_KEPT = 1000


def typed_lines(console: Console, completions: Callable[[str], list[str]]) -> Iterator[str]:
    """Yield what is typed or piped in, until it ends; Ctrl-C drops the line.

    On a terminal the arrow keys edit the line and recall earlier ones, of earlier chats too, and
    Tab completes what ``completions`` returns for the line so far.
    """
    typed = sys.stdin.isatty()
    prompt = "you> "
    if typed and _use_readline(console, completions):
        prompt = f"\001\033[1m\002{prompt}\001\033[0m\002"  # bold, and of no width
    while True:
        try:
            line = f"{input(prompt)}\n" if typed else sys.stdin.readline()
        except EOFError:
            console.out.print()
            return
        except KeyboardInterrupt:
            console.out.print("\n(/quit leaves)", markup=False)
            continue
        if not line:
            return
        yield line


def _use_readline(console: Console, completions: Callable[[str], list[str]]) -> bool:
    """Set up readline where Python has it (not on Windows); its history is a private file."""
    try:
        import readline
    except ImportError:
        return False
    import atexit

    def complete(_: str, state: int) -> str | None:
        start = readline.get_begidx()
        found = completions(readline.get_line_buffer()[: readline.get_endidx()])
        words = [word if start == 0 else word.rpartition(" ")[2] for word in found]
        return [f"{word} " for word in words][state] if state < len(words) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    on_mac = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if on_mac else "tab: complete")
    readline.set_history_length(_LINES_KEPT)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "pvec" / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError as error:
        console.note(f"no history of earlier chats: {path}: {error.strerror}")
    else:
        atexit.register(readline.write_history_file, path)
    return True
