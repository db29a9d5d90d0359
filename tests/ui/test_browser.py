"""The pages in a real browser: no serious finding of axe, no page wider than a phone, everything within reach of the keyboard.

Needs Chromium, and `pip install playwright axe-playwright-python`; the tests are skipped without.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from lora_lab import cli
from tests.ui.test_ui import PAGES

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright axe-playwright-python")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")

pytestmark = pytest.mark.long

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS, SCHEMES = (1400, 400), ("light", "dark")


@pytest.fixture(scope="module")
def address(place):
    """A server of its own, as a user starts it; the link that it shows."""
    line = [sys.executable, "-m", "lora_lab", "ui", str(place), "port=0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
        server.terminate()
        assert server.wait(120) == 143


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def cookies(browser, address):
    context = browser.new_context()
    page = context.new_page()
    assert page.goto(address).status == 200
    assert page.goto(address).status == 403
    return context.storage_state()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_read_by_everybody(browser, address, cookies, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, storage_state=cookies)
    page, told = context.new_page(), []
    page.on("console", lambda message: told.append(message.text))
    for path in PAGES:
        assert page.goto(address.partition("/enter")[0] + path).status == 200
        found = [(one["id"], one["impact"]) for one in axe.Axe().run(page).response["violations"]]
        assert found == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    assert told == []  # nothing was refused by the content security policy, so nothing was tried
    context.close()


def test_two_runs_are_compared_by_keyboard_alone(browser, address, cookies):
    context = browser.new_context(storage_state=cookies)
    page = context.new_page()
    page.goto(address.partition("/enter")[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for name in ("sweep/0", "sweep/1"):
        page.get_by_label(f"Compare {name}").focus()
        page.keyboard.press("Space")
    page.get_by_role("button", name="Compare the chosen runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?*")
    assert page.get_by_role("heading", level=1).inner_text() == "2 runs compared"
    assert page.get_by_role("cell", name="adapter.r").is_visible()
    context.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_base_and_two_runs_are_asked_by_keyboard(browser, address, cookies, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, storage_state=cookies)
    page = context.new_page()
    page.goto(address.partition("/enter")[0])
    for name in ("sweep/0", "sweep/1"):
        page.get_by_label(f"Compare {name}").check()
    page.get_by_role("button", name="Chat with the chosen runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/chat?*")
    for count, said in enumerate(("two red tables", "and a lamp?"), start=1):
        page.get_by_label("Say to all of them").fill(said)
        page.get_by_role("button", name="Say").focus()
        page.keyboard.press("Enter")
        page.get_by_role("region", name=f"Turn {count}").wait_for(timeout=500_000)
        assert page.locator(".answer").count() == 3 * count
    assert [(one["id"], one["impact"]) for one in axe.Axe().run(page).response["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_a_received_page_runs_nothing(browser, address, cookies):
    context = browser.new_context(storage_state=cookies)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address.partition("/enter")[0] + "/page?name=received&file=evaluation.html")
    assert len(asked) == 1
    context.close()


@pytest.fixture(scope="module")
def reports(place, tmp_path_factory):
    """The pages that verbs write beside runs."""
    config = (place / "sweep/0/config.yaml").read_text(encoding="utf-8")
    rows = re.search(r"train: *(\S+\.jsonl)", config)[1]
    base = re.search(r"path: *(\S+)", config)[1]
    data = tmp_path_factory.mktemp("pages") / "data.html"
    told = ["model=hub", f"model.path={base}", "quant=none", "hardware=cpu", f"data.train={rows}", "data.check=warn"]
    assert cli.main(["data", *told, "--html", str(data)]) == 0
    assert cli.main(["inspect", f"run={place}/sweep/0", "among=4"]) == 0
    return [data, *(place / name for name in ("sweep/report.html", "sweep/0/evaluation.html", "sweep/0/inspect.html"))]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_of_verbs_are_read_by_everybody(browser, reports, width, scheme):
    view = {"width": width, "height": 900}
    context = browser.new_context(viewport=view, color_scheme=scheme, bypass_csp=True)  # axe is a script
    page = context.new_page()
    for file in reports:
        page.goto(file.as_uri())
        found = [(one["id"], one["impact"]) for one in axe.Axe().run(page).response["violations"]]
        assert found == [], file.name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name
        broken = page.eval_on_selector_all("td, th", "cells => cells.filter(one => one.offsetHeight > 200).length")
        assert broken == 0, file.name  # a word that is broken letter by letter
    context.close()
