"""The page on ``pvec serve`` itself: the bundled model answers, is steered, stopped and ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the browser tests have an environment of their own")

from playwright.sync_api import Page, expect, sync_playwright

PYTHON = os.environ.get("PVEC_PYTHON", "")
"""The Python that has pvec, which the environment of the browser does not."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PYTHON, reason="PVEC_PYTHON is not set (make test-browser sets it)"),
]

VECTOR = Path(os.environ.get("PVEC_BROWSER_PAGES", "build/browser-pages")) / "evil.safetensors"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUESTION = "How do I make friends in a new town?"


class Server:
    """``pvec serve`` in a process of its own, which can be stopped and started again."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-m", "pvec", "serve", "--model", "tiny", "--vector", str(VECTOR),
             "--port", str(self.port)],
            stdout=subprocess.PIPE, text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PVEC_")},
        )  # fmt: skip
        assert self._process.stdout is not None
        found = None
        while found is None:
            line = self._process.stdout.readline()
            assert line, "pvec serve ended"
            found = re.search(r"page: (http://127\.0\.0\.1:(\d+))", line)
        self.url, self.port = found.group(1), int(found.group(2))

    def ask(self, **body: Any) -> Any:
        """Return the answer to a request without a stream."""
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def get(self, path: str) -> Any:
        """Return what lies at a path."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as reply:
            return json.load(reply)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def page() -> Iterator[Page]:
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert errors == []


def test_a_conversation_with_the_bundled_model(server: Server, page: Page) -> None:
    page.goto(server.url)
    page.get_by_text("Generation").click()
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_label("Message").press("Enter")
    plain = page.locator("[data-side=plain]")
    expect(plain.locator(".readout")).to_contain_text("evil ", timeout=30_000)
    exact = page.get_by_label("evil: coefficient, exact")
    exact.fill("2.5")
    exact.press("Tab")
    steered = page.locator("[data-side=steered]")
    (vector,) = server.get("/pvec/vectors")["vectors"]
    condition = f"steered, evil add 2.5 at layer {vector['layer']}"
    expect(steered.locator(".condition")).to_have_text(condition)
    expect(steered.locator(".readout")).to_contain_text("evil ", timeout=30_000)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "seed": 11,
             "temperature": 1, "max_tokens": 40}  # fmt: skip
    for side, steer in ((plain, []), (steered, [{"vector": "evil", "coef": 2.5}])):
        reply = server.ask(**asked, pvec={"steer": steer, "tokens": True})
        assert side.locator(".tokens").text_content() == reply["choices"][0]["message"]["content"]
        evil = reply["pvec"]["vectors"]["evil"]
        side.locator(".tokens").focus()
        page.keyboard.press("Home")
        said = side.locator(".readout").inner_text().rpartition("evil ")[2].replace("−", "-")
        assert float(said) == pytest.approx(evil["tokens"][0], rel=0.01)
    texts = page.locator(".tokens").all_text_contents()
    assert texts[0] != texts[1]
    page.wait_for_timeout(600)
    page.reload()
    expect(page.locator(".tokens")).to_have_count(2)
    assert page.locator(".tokens").all_text_contents() == texts


def test_a_stopped_answer_and_a_server_that_ends_and_comes_back(server: Server, page: Page) -> None:
    page.goto(server.url)
    page.get_by_text("Generation").click()
    page.get_by_label("Max tokens").fill("2000")
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".tokens > span").nth(3)).to_be_visible(timeout=30_000)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text(re.compile("stopped|tokens"))
    server.stop()
    page.get_by_label("Message").fill("Are you there?")
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    server.start()
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".readout").nth(1)).to_contain_text("evil ", timeout=30_000)
    expect(page.get_by_role("alert")).to_be_hidden()
