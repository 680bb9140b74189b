"""The page of the server in a real browser."""

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.pipeline.test_ctr_main import write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.pipeline.test_serving_main import start
from tests.serving import trained_bundle

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]


MISSING = "the tests need a browser: apt-get install chromium"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    run = trained_bundle(root, "run")
    server, address = start("--bundle", str(run / "bundle"), "--store", str(root / "table"), "--data",
                            str(root / "data"))  # fmt: skip
    yield address
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, MISSING
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as one:
            yield one


@pytest.mark.parametrize("width", [1280, 400])
def test_a_person_picks_a_user_and_sees_what_content_contributes(address, browser, width, tmp_path: Path):
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda answer: problems.append(answer.url) if answer.status >= 400 else None)
    page.goto(address)
    expect(page.locator("#ranked figure")).to_have_count(4)
    options = page.locator("#user option").evaluate_all("all => all.map(one => one.value)")
    page.get_by_label("User").select_option(options[1])
    expect(page.locator("body")).to_have_attribute("data-user", options[1])
    scores = page.locator(".score").all_inner_texts()
    assert scores == sorted(scores, key=lambda text: -float(text.rstrip("%"))) and len(scores) == 4
    assert all(re.fullmatch(r"[+−]\d+\.\d", text) for text in page.locator(".part").all_inner_texts())
    page.wait_for_function("[...document.images].every(one => !one.complete || one.naturalWidth > 0)")
    assert page.locator("#history figure").count() >= 1
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert wide and not problems, problems


def test_what_cannot_be_shown_is_said(address, browser):
    page = browser.new_page()
    away = {"error": "the store is away"}
    page.route("**/demo/users/*", lambda route: route.fulfill(status=503, json=away))
    page.goto(address)
    expect(page.get_by_role("alert")).to_have_text("This user cannot be shown: the store is away")
