"""The chat page of `jaxmllm serve` in headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.serve_case import png

pytestmark = pytest.mark.long
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 20_000  # milliseconds, as the library counts


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `clients` is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium or Chrome on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        path.write_bytes(png((60, 40), i))
    return [*map(str, paths)]


@pytest.fixture
def opened(browser, request):
    """The page of a server with these arguments, in a new tab; nothing may go wrong in it unnoticed."""
    command = [sys.executable, "-m", "tests.serve_case", *request.param]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    page, errors = browser.new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(process.stdout.readline().strip())
    yield page
    page.close()
    process.terminate()
    process.wait(30)
    assert not errors


def ask(page, text: str) -> None:
    """Sends a question and waits for the end of its reply."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#stop[disabled]", state="attached")


@pytest.mark.parametrize("opened", [()], indirect=True)
def test_a_conversation_about_pictures(opened, pictures):
    page = opened
    page.wait_for_selector('#model:text("counting")')
    page.set_input_files("#files", pictures)
    page.wait_for_selector("#chosen img >> nth=1")
    ask(page, "why 1")
    first = page.inner_text(".assistant")
    assert first.endswith("tokens and 2 pictures ,") and page.locator(".user img").count() == 2
    sizes = page.eval_on_selector_all(".user img", "all => all.map(image => image.naturalWidth)")
    assert sizes == [60, 60] and "tokens read, 7 made" in page.inner_text("#status")
    ask(page, "why 2")
    second = page.inner_text(".assistant >> nth=1")
    assert int(second.split()[0]) > int(first.split()[0]) and second.endswith("2 pictures ,")  # the whole conversation
    ask(page, "why " * 50)
    assert "too long" in page.inner_text(".wrong") and page.input_value("#text") == ("why " * 50).strip()
    ask(page, "why 3")
    assert page.locator(".assistant").count() == 3
    page.click("#anew")
    page.set_input_files("#files", pictures)
    page.wait_for_selector("#chosen img >> nth=1")
    page.click("#chosen button >> nth=0")
    page.click("summary")
    page.fill("#temperature", "1.5")
    page.fill("#seed", "7")
    page.fill("#text", "why")
    page.click("#send")
    page.wait_for_selector('.assistant:text("1 pictures seed 7 ,")')


@pytest.mark.parametrize("opened", [("endless",)], indirect=True)
def test_a_reply_can_be_stopped(opened):
    page = opened
    page.fill("#text", "why")
    page.click("#send")
    page.wait_for_selector('.assistant:text("tokens and and")')  # it comes as it is made
    assert page.is_disabled("#send")
    page.click("#stop")
    page.wait_for_selector('#status:text("stopped")')
    said = page.inner_text(".assistant")
    page.wait_for_timeout(300)
    assert page.inner_text(".assistant") == said and page.is_enabled("#send")


@pytest.mark.parametrize("opened", [("key",)], indirect=True)
def test_a_key_is_asked_for(opened):
    page = opened
    page.wait_for_selector('#status:text("the server asks for a key")')
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_selector('#model:text("counting")')
    ask(page, "why")
    assert page.inner_text(".assistant") == "3 tokens and 0 pictures ,"
