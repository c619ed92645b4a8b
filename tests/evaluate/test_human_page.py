"""The rating page in headless Chromium, where playwright's Python package and a browser are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt.evaluate.human.ratings import Pair, Ratings, read_ratings
from fastgpt.evaluate.human.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright"),
]
CODE = "Here:\n\n```python\nx = '<b>&</b>'" + " + 1" * 100 + "\n```\nDone."
PAIRS = [
    Pair("1", "Which days?", "Monday.", "<script>document.title = 'broken'</script><img src=x>"),
    Pair("2", [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Code?"}], CODE, "no"),
    Pair("3", "ما هو؟", "التعلم الآلي\nplain English", ""),
    Pair("4", "Long?", "word " * 3000, "a" * 3000),
    Pair("5", "Last?", "1", "2"),
]


@pytest.fixture
def ratings(tmp_path: Path) -> Ratings:
    return Ratings(tmp_path / "ratings.jsonl", PAIRS, ("secret-one", "secret-two"))


def serving(ratings: Ratings, raters: tuple[str, ...] = ()) -> Iterator[Server]:
    with Server(ratings, "token", raters) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(ratings: Ratings) -> Iterator[Server]:
    yield from serving(ratings)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    found = context.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda e: problems.append(str(e)))
    found.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    found.problems = problems
    found.goto(server.url)
    yield found
    context.close()


def start(page: Any, name: str = "Ann") -> None:
    page.fill("#rater", name)
    page.keyboard.press("Enter")
    at(page, 1)


def at(page: Any, pair: int) -> None:
    """Wait for a pair."""
    page.wait_for_selector(f"#status:text-is('Pair {pair} of {len(PAIRS)}.')", state="attached")


def test_keyboard_undo_reload_and_end(page: Any, server: Server, ratings: Ratings) -> None:
    start(page)
    assert page.evaluate_handle("document.activeElement").get_attribute("id") == "prompt-title"  # read out first
    for i, key in enumerate(["1", "ArrowRight", "0"]):
        at(page, i + 1)
        page.keyboard.press(key)
    at(page, 4)
    page.keyboard.press("Backspace")
    at(page, 3)
    assert page.get_attribute("[data-choice=tie]", "aria-pressed") == "true"
    page.keyboard.press("9")
    at(page, 4)
    page.reload()
    at(page, 4)
    assert page.text_content("#count") == "3 of 5 rated"
    page.click("#more summary")
    page.fill("#comment", "too long 1290")  # digits are text here
    page.click("[data-choice=second]")
    at(page, 5)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#end:visible")
    order = ratings.order("Ann")
    kept = {r["id"]: r for r in read_ratings(ratings.path)}
    chosen = [kept[p.id]["winner"] for p in order]
    sides = [ratings.sides("Ann", p) for p in order]
    assert chosen == [sides[0][0], sides[1][1], "both_bad", sides[3][1], sides[4][0]]
    assert kept[order[3].id]["comment"] == "too long 1290" and all(r["seconds"] >= 0 for r in kept.values())
    assert page.problems == []


def test_texts_are_shown_as_text(page: Any) -> None:
    start(page)
    for i in range(len(PAIRS)):
        at(page, i + 1)
        assert "secret" not in page.content() and page.title() == "Compare answers"
        assert page.query_selector("main script, main img") is None
        for width in (1200, 360):
            page.set_viewport_size({"width": width, "height": 700})
            box = page.locator("html").bounding_box()
            main = page.locator("main").bounding_box()
            assert box["width"] == width and main["x"] + main["width"] <= width
        page.keyboard.press("1")
    page.wait_for_selector("#end:visible")
    assert page.problems == []


def test_shortcuts_can_be_switched_off(page: Any, ratings: Ratings) -> None:
    start(page)
    page.uncheck("#keys")
    page.locator("#prompt-title").focus()
    page.keyboard.press("1")
    page.reload()
    at(page, 1)
    assert not ratings.path.exists() and not page.is_checked("#keys")


def test_a_vote_that_is_not_kept_is_reported(page: Any, ratings: Ratings) -> None:
    start(page)
    ratings.path.mkdir()
    page.keyboard.press("1")
    page.wait_for_selector("#problem:visible")
    assert "The vote could not be written" in page.text_content("#problem")
    ratings.path.rmdir()
    page.keyboard.press("1")
    at(page, 2)
    assert page.is_hidden("#problem") and len(read_ratings(ratings.path)) == 1


def test_several_raters(page: Any, server: Server, ratings: Ratings) -> None:
    start(page)
    page.keyboard.press("1")
    at(page, 2)
    server.raters = ("Bob", "Eve")
    page.click("#leave")
    page.click("text=Eve")
    at(page, 1)
    assert page.text_content("#name") == "Eve"
    page.keyboard.press("0")
    at(page, 2)
    assert {r["rater"] for r in read_ratings(ratings.path)} == {"Ann", "Eve"}


def test_landmarks_and_labels(page: Any) -> None:
    start(page)
    names = [e.get_attribute("aria-labelledby") for e in page.query_selector_all("section:visible")]
    assert names == ["prompt-title", "first-title", "second-title"]
    assert all(page.locator(f"#{name}").count() == 1 for name in names)
    for role in ("banner", "main", "contentinfo", "status", "progressbar"):
        assert page.get_by_role(role).count() == 1, role
    for label in ("1 is better", "2 is better", "Tie", "Both bad", "Undo"):
        assert page.get_by_role("button", name=label).count() == 1, label
    page.click("#more summary")
    assert page.get_by_label("Why?").is_visible()
    assert json.loads(page.get_attribute("#bar", "max") or "") == len(PAIRS)
