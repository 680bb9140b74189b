"""The report of an experiment in a real browser: wide and on a phone, light and dark."""

import io
from pathlib import Path

import pytest
from PIL import Image

from mim_torchrec.benchmarks.harness.experiment_report import write_report
from mim_torchrec.benchmarks.harness.pages import Strip
from tests.browser import axe, browser, faults, opened, scrolls_sideways  # noqa: F401  fixtures
from tests.unit.test_report import ctr_run, full_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [ctr_run(folder / "base", 0, 0.5)], [ctr_run(folder / "mim", 10, 0.8)]
    picture = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(picture, "JPEG")
    strip = Strip([(picture.getvalue(), f"a hat {k}") for k in range(5)], "a hat 4: rank 5 by Base, 1 by MIM")
    Image.new("RGB", (900, 300), "blue").save(folder / "search.png")
    found = full_report(runs)
    found["config"] = {"a_long_word": "x" * 200}
    write_report(found, folder / "out", moved=[strip], search=folder / "search.png")
    return folder / "out" / "report.html"


@pytest.mark.registry
@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("wide", "dark"), ("phone", "light")])
def test_axe_finds_no_fault(report, browser, axe, size, scheme):  # noqa: F811
    page = opened(browser, report, size, scheme)
    page.locator("summary").click()
    assert faults(page, axe) == [] and not page.problems
    page.evaluate("document.images[0].removeAttribute('alt')")
    assert [one.split(":")[0] for one in faults(page, axe)] == ["image-alt"]


@pytest.mark.parametrize("size", ["wide", "phone"])
def test_nothing_scrolls_sideways(report, browser, size, tmp_path):  # noqa: F811
    page = opened(browser, report, size)
    page.locator("summary").click()
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert not scrolls_sideways(page)
    is_cut = "one => one.clientWidth && one.scrollWidth > one.clientWidth + 1"
    cut = page.evaluate(f"[...document.querySelectorAll('body *')].filter({is_cut}).map(one => one.tagName)")
    assert cut == []


def test_on_a_phone_every_cell_says_its_column(report, browser):  # noqa: F811
    page = opened(browser, report, "phone")
    cell = page.locator("td[data-column='test AUC']").first
    assert cell.evaluate("one => getComputedStyle(one, '::before').content") == '"test AUC: "'
    assert page.locator("tr.head").first.is_hidden()
