"""The page of ``pvec serve`` in a real browser, on a server whose answers the tests choose."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the browser tests have an environment of their own")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.fake_server import FakeServer

pytestmark = pytest.mark.browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDE, NARROW = 1440, 390
ANSWER = "one two three four five six seven eight "
REFUSED = "Failed to load resource"
"""What a browser itself writes to its console about a request that was refused."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


Opener = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: FakeServer) -> Iterator[Opener]:
    """Opens the page; afterwards nothing was asked of another host and no script failed."""
    errors: list[str] = []

    def open_it(address: str = "", *, width: int = WIDE, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda r: errors.append(r.url) if not r.url.startswith(server.url) else None
        )
        page.goto(address or server.url)
        return page

    contexts: list[object] = []
    yield open_it
    for context in contexts:
        context.close()  # type: ignore[attr-defined]
    assert [e for e in errors if not e.startswith(REFUSED)] == []


def send(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def slide(page: Page, name: str, value: float) -> None:
    """Move the slider as a user does: the browser gives ``input`` and then ``change``."""
    exact = page.get_by_label(f"{name}: coefficient, exact")
    exact.fill(str(value))
    exact.press("Tab")


def in_address(page: Page) -> None:
    """Wait until the state of the page is in its address."""
    page.wait_for_timeout(600)
    page.wait_for_function("location.hash.length > 1")


def answer(page: Page, side: str, turn: int = -1) -> str:
    return page.locator(f"[data-side={side}] .tokens").nth(turn).inner_text()


def test_an_answer_is_streamed_and_shown_with_what_was_measured(
    server: FakeServer, open_page: Opener
) -> None:
    server.delay = 0.2
    page = open_page()
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    send(page, "Hello?")
    expect(page.locator(".tokens")).to_have_text(re.compile("^one two "))
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".tokens")).to_have_text(ANSWER)
    expect(page.locator(".readout")).to_contain_text(
        "evil 0.035 · above 90 % of negative, 12.5 % of positive answers"
    )
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "Hello?"}]
    assert request["pvec"] == {"steer": [], "tokens": True}


def test_a_slider_changes_the_last_answer_from_the_same_seed(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    page.get_by_text("Generation").click()
    page.get_by_label("Seed").fill("7")
    send(page, "Hello?")
    expect(page.locator(".tokens")).to_have_text(ANSWER)
    slider = page.get_by_role("slider", name="evil: coefficient")
    slider.focus()
    for _ in range(2):
        slider.press("ArrowRight")
    expect(page.locator("[data-side=steered] .tokens")).to_have_text(f"{ANSWER}<0.15>")
    expect(page.locator("[data-side=steered] .condition")).to_have_text(
        "steered, evil add 0.15 at layer 3"
    )
    assert answer(page, "plain").strip() == ANSWER.strip()
    first, second = server.requests  # the unsteered answer was not given again
    assert (first["seed"], second["seed"]) == (7, 7)
    assert second["pvec"]["steer"] == [
        {"vector": "evil", "coef": 0.15, "layer": 3, "positions": "response", "operator": "add"}
    ]
    slide(page, "evil", 0)
    expect(page.locator("[data-side=steered]")).to_have_count(0)
    assert len(server.requests) == 2


def test_steered_answers_are_the_history_and_both_sides_are_lines_of_the_persona(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    slide(page, "evil", 2)
    for number, text in enumerate(("First?", "Second?")):
        send(page, text)
        expect(page.locator("[data-side=steered] .tokens").nth(number)).to_have_text(f"{ANSWER}<2>")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert len(server.requests) == 4
    for request in server.requests[2:]:
        assert [m["content"] for m in request["messages"]] == ["First?", f"{ANSWER}<2>", "Second?"]
    titles = page.locator("#chart title").all_text_contents()
    assert titles == [
        "turn 1, steered: 2.04", "turn 2, steered: 2.04",
        "turn 1, unsteered: 0.035", "turn 2, unsteered: 0.035",
    ]  # fmt: skip
    assert page.locator("#chart .reference").count() == 2
    page.get_by_role("combobox", name="Projection on").select_option("kind")
    assert page.locator("#chart title").first.text_content() == "turn 1, steered: 0.04"


def test_layer_positions_and_operator_are_behind_a_fold(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    box = page.locator("fieldset").first
    box.get_by_text("layer 3, response, add").click()
    box.get_by_label("Layer").select_option("2")
    box.get_by_label("Positions").select_option("all")
    box.get_by_label("Operator").select_option("cap")
    ceiling = box.get_by_label("evil: ceiling, exact")
    ceiling.fill("0.25")
    ceiling.press("Tab")
    send(page, "Hello?")
    expect(page.locator("[data-side=plain] .tokens")).to_have_text(ANSWER)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    steer = [r["pvec"]["steer"] for r in server.requests]
    assert sorted(steer, key=len)[1] == [
        {"vector": "evil", "coef": 0.25, "layer": 2, "positions": "all", "operator": "cap",
         "unit": "norm"}
    ]  # fmt: skip
    condition = page.locator("[data-side=steered] .condition")
    expect(condition).to_have_text("steered, evil cap 0.25 at layer 2")
    box.get_by_label("Operator").select_option("ablate")
    expect(condition).to_have_text("steered, evil ablate at layer 2")
    assert "coef" not in server.requests[-1]["pvec"]["steer"][0]


def test_tokens_show_their_values_to_pointer_and_keyboard(open_page: Opener) -> None:
    page = open_page()
    send(page, "Hello?")
    expect(page.locator(".tokens")).to_have_text(ANSWER)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    tokens = page.locator(".tokens")
    tokens.locator("span").nth(3).hover()
    expect(page.locator("#tip")).to_have_text("“four ”: evil 0.03 · kind 0.03")
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_be_hidden()
    tokens.focus()
    page.keyboard.press("End")
    expect(page.locator(".readout")).to_have_text("“eight ”: evil 0.07 · kind 0.07")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".readout")).to_have_text("“seven ”: evil 0.06 · kind 0.06")
    page.keyboard.press("Tab")
    expect(page.locator(".readout")).to_contain_text("evil 0.035")
    colours = tokens.locator("span").evaluate_all("nodes => nodes.map(n => n.style.background)")
    assert "--low" in colours[0]
    assert "--high" in colours[-1]


def test_stop_keeps_what_was_said_and_closes_the_connection(
    server: FakeServer, open_page: Opener
) -> None:
    server.delay, server.answer = 0.05, "word " * 400
    page = open_page()
    send(page, "Hello?")
    expect(page.locator(".tokens > span").nth(4)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.locator(".condition")).to_have_text("unsteered (stopped)")
    said = answer(page, "plain")
    page.wait_for_timeout(400)
    assert answer(page, "plain") == said
    assert server.closed_early == 1
    server.answer = "fine"
    send(page, "Go on.")
    expect(page.locator(".tokens").nth(1)).to_have_text("fine ")
    assert server.requests[-1]["messages"][1]["content"].strip() == said.strip()
    send(page, "And?")
    page.get_by_role("button", name="Send").wait_for()


def test_a_reload_and_a_copied_link_restore_the_page(server: FakeServer, open_page: Opener) -> None:
    page = open_page()
    page.get_by_text("Generation").click()
    page.get_by_label("System prompt").fill("Be brief.")
    slide(page, "kind", 1.5)
    send(page, "Hello?")
    expect(page.locator("[data-side=steered] .tokens")).to_have_text(f"{ANSWER}<1.5>")
    page.get_by_role("combobox", name="Projection on").select_option("kind")
    in_address(page)
    asked = len(server.requests)
    page.reload()
    other = open_page(page.url)
    for restored in (page, other):
        expect(restored.locator("[data-side=steered] .tokens")).to_have_text(f"{ANSWER}<1.5>")
        expect(restored.locator("[data-side=plain] .tokens")).to_have_text(ANSWER)
        expect(restored.get_by_label("kind: coefficient, exact")).to_have_value("1.5")
        expect(restored.get_by_role("combobox", name="Projection on")).to_have_value("kind")
        expect(restored.get_by_label("System prompt")).to_have_value("Be brief.")
        restored.locator("[data-side=steered] .tokens span").first.hover()
        expect(restored.locator("#tip")).to_have_text("“one ”: evil 0 · kind 1.5")
    assert len(server.requests) == asked
    send(other, "More?")
    expect(other.locator("[data-side=plain] .tokens").nth(1)).to_have_text(ANSWER)
    assert [m["content"] for m in server.requests[-1]["messages"]] == [
        "Be brief.", "Hello?", f"{ANSWER}<1.5>", "More?",
    ]  # fmt: skip


def test_a_link_of_another_server_and_a_damaged_one_are_told(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    slide(page, "kind", 1)
    in_address(page)
    link = page.url
    server.facts["vectors"] = server.facts["vectors"][:1]
    server.facts["model"] = "another"
    other = open_page(link)
    expect(other.get_by_role("alert")).to_have_text(
        "The link asks for the model fake and kind at layer 3, which this server does not have."
    )
    damaged = open_page(f"{server.url}/#nonsense")
    expect(damaged.get_by_role("alert")).to_have_text("The link in the address could not be read.")
    send(damaged, "Hello?")
    expect(damaged.locator(".tokens")).to_have_text(ANSWER)


HOSTILE = "<img src=x onerror=window.hacked=1> </div><script>window.hacked=1</script>"


def test_a_hostile_answer_question_and_vector_stay_text(
    server: FakeServer, open_page: Opener
) -> None:
    server.answer = HOSTILE
    server.facts["vectors"][0]["name"] = HOSTILE
    server.facts["model"] = HOSTILE
    page = open_page()
    slide(page, HOSTILE, 1)
    send(page, HOSTILE)
    expect(page.locator("[data-side=plain] .tokens")).to_contain_text("onerror=window.hacked=1>")
    page.locator("[data-side=plain] .tokens span").first.hover()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("[data-side=steered] .tokens")).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main script").count() == 0


def test_a_server_that_goes_away_is_one_sentence_and_the_page_recovers(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    server.break_after = 3
    send(page, "Hello?")
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("The server does not answer. Is pvec serve still running?")
    expect(page.locator(".tokens")).to_have_text("one two three ")
    server.close()
    send(page, "Still there?")
    expect(alert).to_be_visible()
    expect(page.get_by_label("Message")).to_have_value("Still there?")
    expect(page.locator(".turn")).to_have_count(1)
    again = FakeServer(server.port)
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".tokens").nth(1)).to_have_text(ANSWER)
    expect(alert).to_be_hidden()
    again.close()


def test_a_page_that_opens_before_its_server_waits_for_it(
    server: FakeServer, open_page: Opener
) -> None:
    page = open_page()
    page.route("**/pvec/vectors", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.unroute("**/pvec/vectors")
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_refused_request_gives_the_question_back(server: FakeServer, open_page: Opener) -> None:
    server.facts["max_coef"] = None
    page = open_page()
    slide(page, "evil", 9)
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_have_text("The coefficient 9 is above 3.")
    expect(page.get_by_label("Message")).to_have_value("Hello?")
    expect(page.locator(".turn")).to_have_count(0)


def test_the_key_is_asked_for_and_kept_in_this_tab_only(
    server: FakeServer, open_page: Opener
) -> None:
    server.key = "secret-key"
    page = open_page()
    expect(page.get_by_role("alert")).to_have_text("This server needs its API key.")
    for key in ("wrong", "secret-key"):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    send(page, "Hello?")
    expect(page.locator(".tokens")).to_have_text(ANSWER)
    in_address(page)
    assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
    page.reload()
    expect(page.locator(".tokens")).to_have_text(ANSWER)
    expect(open_page(page.url).get_by_role("alert")).to_be_visible()


def test_what_the_server_fixes_is_not_offered(server: FakeServer, open_page: Opener) -> None:
    entry = {"vector": "evil", "layer": 3, "coef": 1, "positions": "response", "operator": "add"}
    server.facts |= {
        "fixed": True, "defaults": [entry],
        "policies": [{"vector": "evil", "ceiling": 0.3, "alarm": 0.5}],
    }  # fmt: skip
    page = open_page()
    expect(page.locator("#policies")).to_have_text(
        "The steering is fixed by the server. evil is capped at 0.3 when it passes 0.5."
    )
    expect(page.get_by_role("slider")).to_have_count(0)


@pytest.mark.parametrize(
    ("width", "dark"), [(WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)]
)
def test_the_page_is_accessible_and_fits(
    server: FakeServer, open_page: Opener, tmp_path: Path, width: int, *, dark: bool
) -> None:
    server.answer = "A somewhat longer answer, with " + "words that go on " * 8 + "x" * 80
    page = open_page(width=width, dark=dark)
    slide(page, "evil", 1)
    for fold in page.locator("summary").all():
        fold.click()
    for number in range(2):
        send(page, "What would you do with a day without any plans at all?")
        expect(page.locator("[data-side=steered] .readout").nth(number)).to_contain_text("above")
    page.wait_for_timeout(400)
    violations = Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations] == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.get_by_role("button", name="Send").is_visible()


def test_everything_is_reached_by_keyboard(open_page: Opener) -> None:
    page = open_page()
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.getAttribute('aria-label') || e.tagName)(document.activeElement)"
            )
        )
    for name in ("evil: coefficient", "SUMMARY", "auto", "compare", "message", "send", "link"):
        assert name in reached
