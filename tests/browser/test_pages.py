"""Every page of the report in a real browser: no error, accessible, and its controls work.

Run by ``make test-browser``: pages and facts come from ``make_pages.py``, Chromium from the system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the browser tests have an environment of their own")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

FOLDER = Path(os.environ.get("PVEC_BROWSER_PAGES", "build/browser-pages"))
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDE, NARROW = 1440, 390
KINDS = ("extract", "steer", "train", "monitor", "shift", "screen", "all", "grid", "trainings",
         "screening", "tokens", "beside", "sampled", "turns", "answers")  # fmt: skip
LIKE_OTHERS = ("all", "beside", "sampled")
"""Pages made of what other pages have, which axe need not read twice."""
MINUS = "−"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def facts() -> Any:
    return json.loads((FOLDER / "facts.json").read_text())


class Opened:
    """A page in a context of its own, whose errors and requests are noted."""

    def __init__(self, browser: Browser, *, width: int = WIDE, dark: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light"
        )
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "request",
            lambda r: (
                self.errors.append(r.url) if not r.url.startswith(("file:", "data:")) else None
            ),
        )

    def open(self, name: str, address: str = "") -> Page:
        self.page.goto((FOLDER / f"{name}.html").resolve().as_uri() + address)
        return self.page


@pytest.fixture
def wide(browser: Browser) -> Iterator[Opened]:
    opened = Opened(browser)
    yield opened
    opened.context.close()
    assert opened.errors == []


def numbers(texts: list[str]) -> list[float]:
    return [float(t.split()[-1].replace(MINUS, "-").replace(",", "")) for t in texts]


@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (NARROW, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_an_error_and_is_accessible(
    browser: Browser, kind: str, width: int, *, dark: bool
) -> None:
    opened = Opened(browser, width=width, dark=dark)
    page = opened.open(kind)
    page.wait_for_timeout(200)
    for details in page.locator("details:not([open]) > summary").all():
        if details.is_visible():
            details.click()
    violations = [] if kind in LIKE_OTHERS else Axe().run(page).response["violations"]
    serious = [
        (v["id"], v["nodes"][0]["html"][:200], v["nodes"][0].get("failureSummary", "")[:300])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    hacked = page.evaluate("window.hacked")
    opened.context.close()
    assert opened.errors == []
    assert serious == []
    assert overflow <= 0
    assert hacked is None


@pytest.mark.parametrize(
    "kind", ["extract", "steer", "train", "monitor", "shift", "screen", "grid", "trainings"]
)
def test_every_mark_of_a_figure_says_what_it_is(wide: Opened, kind: str) -> None:
    page = wide.open(kind)
    for figure in page.locator("figure").all():
        assert figure.locator("svg title").count() > 0


@pytest.mark.parametrize("kind", ["extract", "steer", "monitor", "grid", "turns"])
def test_a_series_is_switched_off_and_on_by_its_key(wide: Opened, kind: str) -> None:
    page = wide.open(kind)
    for summary in page.locator("details.still > summary").all():
        summary.click()
    key = page.locator("figure .key[role=button]").first
    marks = page.locator(
        f"figure [data-series='{key.get_attribute('data-series')}']:not(.key)"
    ).first
    key.focus()
    page.keyboard.press("Enter")
    expect(key).to_have_attribute("aria-pressed", "false")
    assert marks.evaluate("node => getComputedStyle(node).display") == "none"
    key.click()
    assert marks.evaluate("node => getComputedStyle(node).display") != "none"


@pytest.mark.parametrize("kind", ["extract", "monitor", "shift", "screening", "tokens", "turns"])
def test_every_control_is_reached_by_keyboard_and_shows_where_the_focus_is(
    wide: Opened, kind: str
) -> None:
    page = wide.open(kind)
    page.wait_for_timeout(200)
    every = page.evaluate(
        """() => {
          const controls = [...document.querySelectorAll(
            "a[href], button, select, input, summary, [tabindex='0']")];
          return controls.filter((node) => node.checkVisibility({ visibilityProperty: true }))
            .map((node, i) => { node.dataset.place = i; return i; });
        }"""
    )
    assert every
    reached = set()
    for _ in range(len(every) + 5):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            """() => [document.activeElement.dataset.place,
                      getComputedStyle(document.activeElement).outlineStyle]"""
        )
        if place is None:
            break
        handle = page.locator(f"[data-place='{place}']")
        assert outline != "none" or handle.get_attribute("role") == "slider"
        reached.add(int(place))
    assert reached == set(every)


def test_a_wide_table_says_so_keeps_its_first_column_and_scrolls_by_keyboard(
    browser: Browser,
) -> None:
    opened = Opened(browser, width=NARROW)
    page = opened.open("steer")
    box = page.locator("section > .scroll").first
    expect(box).to_have_class(re.compile("wide"))
    box.focus()
    before = box.locator("tbody tr > *").first.bounding_box()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(400)
    assert box.evaluate("node => node.scrollLeft") > 0
    after = box.locator("tbody tr > *").first.bounding_box()
    assert before is not None
    assert after is not None
    assert abs(after["x"] - before["x"]) < 1
    opened.context.close()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_answers_are_searched_on_both_sides_marked_ordered_and_linked(wide: Opened) -> None:
    page = wide.open("answers")
    status = page.locator(".count").first
    expect(status).to_have_text("10,000 of 10,000 answers of “steered”")
    search = page.get_by_label("Contains (either side)")
    search.fill("answer 4444 ")  # on the left; the right side of the pair is answer 4445
    expect(status).to_have_text("1 of 10,000 answers of “steered”")
    expect(page.locator(".pair mark")).to_have_text("Answer 4444 ")
    page.get_by_role("button", name="Copy link").click()
    address = page.url.partition("#")[2]
    search.fill("")
    page.get_by_label("Order", exact=True).select_option(label="evil, right most above left")
    gaps = [
        numbers(pair.locator(".chip").all_inner_texts())
        for pair in page.locator(".pair").all()[:10]
    ]
    rises = [scores[2] - scores[0] for scores in gaps]
    assert rises == sorted(rises, reverse=True)
    other = wide.context.new_page()
    other.goto((FOLDER / "answers.html").resolve().as_uri() + "#" + address)
    expect(other.locator(".count").first).to_have_text("1 of 10,000 answers of “steered”")


def test_twenty_thousand_answers_open_in_a_second_and_a_half(wide: Opened) -> None:
    seconds = []
    for _ in range(3):
        page = wide.open("answers")
        page.locator(".pair").first.wait_for()
        seconds.append(
            page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        )
    assert min(seconds) < 1.5, seconds


# ── tokens and turns ────────────────────────────────────────────────────────────────────────────


def test_tokens_show_their_values_to_pointer_and_keyboard(wide: Opened, facts: Any) -> None:
    page, fact = wide.open("tokens"), facts["tokens"]
    card = page.locator(".pair").first
    text = card.locator(".tokens")
    expect(text.locator("span").first).to_be_visible()
    assert text.inner_text() == fact["text"]
    assert card.locator("h4").inner_text().startswith(f"line {fact['order'][0]} ")
    text.locator("span").nth(5).hover()
    shown = f"evil, layer 3 {fact['first'][5][0]:.1f}"
    assert shown in page.locator(".tip").inner_text()
    text.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(card.locator(".readout")).to_contain_text("token 9 of 40")
    page.keyboard.press("Home")
    expect(card.locator(".readout")).to_contain_text("token 1 of 40")
    box = card.locator(".strip").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 20.5 / 40, box["y"] + 10)
    expect(card.locator(".readout")).to_contain_text("token 21 of 40")
    colours = text.locator("span").evaluate_all("nodes => nodes.map(n => n.style.background)")
    values = [row[0] for row in fact["first"]]
    assert "--high" in colours[values.index(max(values))]
    assert "--low" in colours[values.index(min(values))]


def test_passages_are_listed_and_lead_to_their_answers(wide: Opened, facts: Any) -> None:
    page, fact = wide.open("tokens"), facts["tokens"]
    heads = [h.split()[1] for h in page.locator(".pair h4").all_inner_texts()[:5]]
    assert [int(n) for n in heads] == fact["order"]
    page.locator(".top-passages summary").click()
    values = numbers(page.locator(".passages").first.locator(".chip").all_inner_texts())
    assert values == sorted(values, reverse=True)
    page.locator(".passage-link").nth(1).click()
    expect(page.locator(".pair h4")).to_have_count(1)
    assert page.locator(".pair h4").inner_text().startswith(f"line {fact['order'][1]} ")
    page.get_by_label("Line", exact=True).fill("")
    page.get_by_label("Contains").fill(f"question {fact['order'][3]}.1?")
    expect(page.locator(".pair")).to_have_count(1)
    expect(page.locator(".asked mark")).to_have_text(f"Question {fact['order'][3]}.1?")


def test_tokens_beside_the_page_come_when_needed(wide: Opened, facts: Any) -> None:
    page, fact = wide.open("beside"), facts["beside"]
    expect(page.locator(".pair .tokens").first).to_have_text(fact["text"])
    assert page.locator("script.part").count() == 0
    loaded = page.locator("head script[src]").count()
    page.get_by_label("Line", exact=True).fill("199")
    expect(page.locator(".pair .tokens")).to_have_count(1)
    assert page.locator("head script[src]").count() >= loaded


def test_a_page_that_holds_a_sample_says_so_and_lists_all(wide: Opened) -> None:
    page = wide.open("sampled")
    expect(page.locator(".count").first).to_have_text("10,000 of 10,000 answers")
    assert re.search(
        r"holds the tokens of [\d,]+ of 10,000 answers", page.locator("main").inner_text()
    )
    expect(page.locator(".pair .tokens").first).to_be_visible()
    page.get_by_label("Order", exact=True).select_option(label="as in the file")
    expect(page.locator(".pair").filter(has_text="--beside").first).to_be_visible()


def test_the_extractions_means_are_lines_of_the_chart_and_of_the_strips(wide: Opened) -> None:
    page = wide.open("turns")
    titles = page.locator(".chart .level title").all_text_contents()
    assert [title.split(": ")[1] for title in titles] == ["8.0", "12.5"]
    expect(page.locator(".token-legend")).to_contain_text("extraction's positive answers: 12.5")
    assert page.locator(".pair .strip").first.locator(".level").count() == 2
    page.get_by_label("Projection on", exact=True).select_option(label="kind, layer 3")
    expect(page.locator(".chart .level")).to_have_count(0)


def test_the_ticks_of_an_axis_have_the_same_decimals(wide: Opened) -> None:
    for kind in ("turns", "screening"):
        page = wide.open(kind)
        texts = page.locator(".chart").first.locator("text[text-anchor=end]").all_text_contents()
        ticks = [text.removesuffix(" %") for text in texts if text[-1] in "0123456789%"]
        assert len(ticks) > 1
        assert len({len(tick.partition(".")[2]) for tick in ticks}) == 1, ticks


def test_a_conversation_that_moved_can_be_read(wide: Opened, facts: Any) -> None:
    page, (line, turn) = wide.open("turns"), facts["turns"]["moved"]
    assert page.locator(".thread").count() == facts["turns"]["conversations"]
    row = page.locator(".widget table tbody tr").first
    assert row.locator("td, th").all_inner_texts()[:2] == [f"line {line}", str(turn)]
    row.get_by_role("button").click()
    heads = page.locator("[data-kind=tokens] .pair h4").all_inner_texts()
    assert [h.split(" mean")[0] for h in heads][:2] == [
        f"line {line}, turn 1",
        f"line {line}, turn 2",
    ]
    page.get_by_label("Line", exact=True).fill("")
    page.locator(".thread").nth(3).dispatch_event("click")
    assert page.locator("[data-kind=tokens] .pair h4").first.inner_text().startswith("line 3,")


# ── screening ───────────────────────────────────────────────────────────────────────────────────


def removed(facts: Any, limits: list[float]) -> tuple[int, int]:
    """Return how many samples lie above the first limit, and above any."""
    rows = facts["data"]
    first = sum(row[0] > limits[0] for row in rows)
    return first, sum(any(v > limit for v, limit in zip(row, limits, strict=True)) for row in rows)


def test_the_threshold_is_dragged_and_the_counts_follow(wide: Opened, facts: Any) -> None:
    page, fact = wide.open("screening"), facts["screening"]
    verdict, handle = page.locator(".verdict"), page.locator(".threshold")
    first, both = removed(fact, fact["limits"])
    expect(verdict).to_contain_text(f"{first:,} of 2,000 samples would be removed")
    expect(verdict).to_contain_text(f"all 2 columns: {both:,} ")
    box = page.locator(".drag").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 300, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, middle, steps=4)
    dragged = float(handle.get_attribute("aria-valuenow") or "nan")
    limits = [dragged, fact["limits"][1]]
    first, both = removed(fact, limits)
    expect(verdict).to_contain_text(f"{first:,} of 2,000 samples would be removed")
    expect(verdict).to_contain_text(f"all 2 columns: {both:,} ")
    page.mouse.up()
    lost = sum(row[0] > dragged for row in fact["reference"])
    expect(verdict).to_contain_text(f"{lost} of 500 of the clean set")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    moved = float(handle.get_attribute("aria-valuenow") or "nan")
    assert moved < dragged
    expect(verdict).to_contain_text(f"{removed(fact, [moved, limits[1]])[0]:,} of 2,000")


def test_every_kind_of_sample_can_be_read(wide: Opened, facts: Any) -> None:
    page, fact = wide.open("screening"), facts["screening"]
    status, limits = page.locator(".count").last, fact["limits"]
    rows = {n: fact["data"][n] for n in fact["browsed"]}
    gone = {n for n, row in rows.items() if row[0] > limits[0] or row[1] > limits[1]}
    expect(status).to_contain_text(f"{len(gone):,} samples")
    kind = page.get_by_label("Samples that")
    kind.select_option(label="would be kept")
    expect(status).to_contain_text(f"{len(rows) - len(gone):,} samples")
    kind.select_option(label="borderline")
    page.get_by_label("Order", exact=True).select_option(label="nearest to the threshold")
    nearest = min(rows, key=lambda n: abs(rows[n][0] - limits[0]))
    expect(page.locator(".pair h4").first).to_contain_text(f"question {nearest}?")
    kind.select_option(label="all")
    page.get_by_label("Contains").fill("natural 502")
    expect(page.locator(".pair")).to_have_count(1)
    expect(page.locator(".pair mark")).to_have_text("natural 502")
    assert "What a threshold costs" in page.locator(".widget").inner_text()
    assert page.locator(".points").count() == 2


def test_a_mark_of_the_scatter_says_its_differences(wide: Opened) -> None:
    page = wide.open("screening")
    cloud = page.locator(".chart").nth(1).locator("svg")
    points = page.locator(".points.data").get_attribute("d") or ""
    across, down = map(float, points.split("h0")[0].removeprefix("M").split())
    size = cloud.evaluate("node => node.getBoundingClientRect().width / node.viewBox.baseVal.width")
    cloud.hover(position={"x": across * size, "y": down * size})
    expect(page.locator(".tip")).to_contain_text("evil, layer 3")
