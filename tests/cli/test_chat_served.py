"""``pvec chat --url``: a conversation with a server, and what is typed on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pvec.cli.app import app
from pvec.errors import PvecError
from tests.browser.fake_server import FakeServer

WORDS = "one two three four five six seven eight "


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def run(server: FakeServer, lines: list[str], *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app,
        ["chat", "--url", server.url, *options],
        input="".join(f"{line}\n" for line in lines),
    )
    if isinstance(result.exception, PvecError):  # main() shows it and leaves with code 2
        return 2, result.stdout, f"{result.stderr}{result.exception}"
    return result.exit_code, result.stdout, result.stderr


def test_the_commands_are_those_of_a_local_chat(server: FakeServer) -> None:
    code, out, err = run(
        server,
        ["/system Be brief.", "Hello?", "/steer evil@2 0.5", "/compare", "Again?", "/off", "/quit"],
        "--seed", "3", "--max-tokens", "50",
    )  # fmt: skip
    assert code == 0, err
    assert "no steering; vectors: evil, kind" in err
    assert "steering with evil at layer 2 (block 1) x 0.5" in out
    assert f"{WORDS}<0.5>\nunsteered: {WORDS}" in out
    assert "evil@3: projection +0.54 residual norms (steering included), above 90 % of" in out
    assert "evil@3 unsteered: projection +0.035 residual norms" in out
    first, steered, plain = server.requests
    assert steered["pvec"]["steer"] == [
        {"vector": "evil", "layer": 2, "coef": 0.5, "positions": "response", "operator": "add",
         "unit": "raw"}
    ]  # fmt: skip
    assert plain["pvec"]["steer"] == []
    assert steered["seed"] == plain["seed"] != first["seed"]
    assert steered["max_tokens"] == 50
    assert [m["content"] for m in steered["messages"]] == ["Be brief.", "Hello?", WORDS, "Again?"]


def test_what_the_server_refuses_or_breaks_off_is_one_sentence_and_forgotten(
    server: FakeServer,
) -> None:
    server.break_after = 3
    code, out, err = run(server, ["Broken?", "/steer evil 9", "Refused?", "/steer good 1"])
    assert code == 0
    assert "one two three" in out
    assert "Error: The server stopped in the middle of the answer: ask again." in err
    assert "Error: The coefficient 9.0 is above 3." in err
    assert "There is no vector 'good'." in err
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["Refused?"]


@pytest.mark.parametrize(
    "options", [["--vector", "evil.safetensors"], ["--model", "tiny"], ["--backend", "hf"]]
)
def test_options_of_a_local_model_are_refused(server: FakeServer, options: list[str]) -> None:
    code, _, err = run(server, ["Hello?"], *options)
    assert code == 2
    assert "do not go with --url" in err
    assert server.requests == []


def test_a_server_that_is_not_there_or_asks_for_a_key_is_one_sentence(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    code, _, err = run(server, ["Hello?"])
    assert code == 2
    assert "refuses the API key: set PVEC_SERVE__API_KEY" in err
    monkeypatch.setenv("PVEC_SERVE__API_KEY", "secret")
    code, out, err = run(server, ["Hello?"])
    assert code == 0, err
    assert WORDS in out
    server.close()
    code, _, err = run(server, ["Hello?"])
    assert code == 2
    assert f"The server at {server.url} does not answer: is pvec serve running there?" in err


def test_no_library_of_models_is_loaded(server: FakeServer) -> None:
    code = (
        "import sys\nfrom pvec.cli.app import main\n"
        f"try: main(['chat', '--url', '{server.url}'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="Hello?\n", capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(WORDS), done.stderr
    assert done.stdout.endswith("False\n")


TYPING = """
from pvec.cli.chat import typed_lines
from pvec.cli.console import Console
for line in typed_lines(Console(), lambda text: ["/steer"] if text.startswith("/s") else []):
    print("line:", line.strip(), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no readline")
def test_a_terminal_has_editing_completion_and_the_history_of_earlier_chats(
    tmp_path: Path,
) -> None:
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    assert typed("/s\thello wrold\x7f\x7f\x7f\x7forld\n", env) == ["/steer hello world"]
    assert typed("\x1b[A!\n", env) == ["/steer hello world!"]  # arrow up
    assert (tmp_path / "pvec" / "chat-history").stat().st_mode & 0o077 == 0


def typed(keys: str, env: dict[str, str]) -> list[str]:
    """Return the lines that a chat reads when ``keys`` are pressed on a terminal, and then ^D."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TYPING], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    shown = ""
    waiting = [keys, "\x04"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(ours, 4096).decode()
        except OSError:  # the terminal's other end is closed
            break
        if waiting and shown.count("you> ") > 2 - len(waiting):
            os.write(ours, waiting.pop(0).encode())
    process.wait(10)
    os.close(ours)
    return [line.removeprefix("line: ") for line in shown.splitlines() if line.startswith("line: ")]
