"""The chat page: needs no key, allows only its own script and style, and streams an answer in Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from serve.servers import server, serving, write_model
from stand_in_link import StandInLink, stand_in

from fastgpt.serve.feedback.route import Feedback
from fastgpt.serve.guard import Limits
from fastgpt.serve.page import HTML, digest
from fastgpt.serve.watch.store import Store

KEY = "secret"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    with server(folder, limits=Limits(keys=(KEY,))) as (_, found):
        yield found


def test_the_page_needs_no_key_and_loads_nothing_else(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert digest("script") in policy and digest("style") in policy
    assert len(re.findall("<script", HTML)) == len(re.findall("<style", HTML)) == 1
    assert not re.search(r"https?://|\bon\w+=|style=|innerHTML", HTML)
    assert "Answers are AI-generated" in HTML


def test_every_field_has_a_label() -> None:
    fields = re.findall(r'<(?:input|select|textarea) id="(\w+)"', HTML)
    labelled = re.findall(r'<label for="(\w+)"', HTML)
    for block in re.findall(r"<label(?: class=\"wide\")?>(.*?)</label>", HTML, re.S):
        labelled += re.findall(r'<(?:input|select|textarea) id="(\w+)"', block)
    assert sorted(fields) == sorted(labelled) and len(fields) == 7


@contextmanager
def browser() -> Iterator[tuple[Any, Any]]:
    """Yield playwright and a page of Chromium; skip where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as p:
        yield playwright, p.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()


@pytest.mark.slow
def test_a_conversation_in_a_browser(client: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 20, "temperature": 0}
    asked = client.post("/v1/chat/completions", json=body, headers={"x-api-key": KEY}).json()
    expected = asked["choices"][0]["message"]["content"]
    with browser() as (playwright, page):
        broken: list[Any] = []
        page.on("pageerror", lambda e: broken.append(e))
        page.goto(str(client.base_url))
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#keys", state="hidden")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("20")
        page.get_by_label("Message", exact=True).fill("the cat")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#status")).to_have_text("The answer is complete", timeout=60_000)
        assert page.locator("article.assistant p").first.text_content() == expected
        assert page.evaluate("document.activeElement.id") == "text"
        page.reload()
        assert page.locator("article").count() == 2
        page.get_by_role("button", name="New chat").click()
        assert page.locator("article").count() == 0 and not broken


@pytest.mark.slow
def test_thumbs_and_several_answers_in_a_browser(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)
    model = stand_in("m", "First.")
    assert isinstance(model.link, StandInLink)

    def kept() -> list[tuple[str, str]]:
        return [(record["answer"], record["rating"]) for record in store.records("feedback")]

    with serving({"m": model}, Limits(), parts=[Feedback(store).add]) as client, browser() as (playwright, page):
        expect, broken = playwright.expect, list[Any]()
        page.on("pageerror", lambda e: broken.append(e))
        page.goto(str(client.base_url))
        assert "the server keeps it" in page.locator("#about").text_content()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System message").fill("Be short.")
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("The answer is complete")
        good, bad = page.get_by_role("button", name="Good answer"), page.get_by_role("button", name="Bad answer")
        good.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Rated as good")
        expect(good).to_have_attribute("aria-pressed", "true")
        model.link.text = "Second."
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator("#status")).to_have_text("The answer is complete")
        assert page.evaluate("document.activeElement.textContent") == "Regenerate"
        expect(page.locator("article.assistant p").first).to_have_text("Second.")
        expect(good).to_have_attribute("aria-pressed", "false")
        bad.click()
        expect(page.locator("#status")).to_have_text("Rated as bad")
        page.get_by_role("button", name="Previous answer").click()
        expect(page.locator("article.assistant p").first).to_have_text("First.")
        page.reload()
        expect(page.locator(".foot")).to_contain_text("1 of 2")
        expect(good).to_have_attribute("aria-pressed", "true")
        page.get_by_label("Message", exact=True).fill("And?")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("The answer is complete")
        assert page.locator("article").count() == 4 and page.get_by_role("button", name="Regenerate").count() == 1
        assert kept() == [("First.", "up"), ("Second.", "down")]
        good.first.click()
        expect(page.locator("#status")).to_have_text("Rating taken back")
        assert kept()[2] == ("First.", "none") and not broken
        asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
        assert [record["messages"] for record in store.records("feedback")] == [asked] * 3
        assert len({record["user"] for record in store.records("feedback")}) == 1
