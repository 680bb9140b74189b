"""A real browser for tests of pages, and axe, which finds what people with disabilities cannot use in them.

Import both fixtures into the module that uses them: while a browser is there, no event loop can run in its
thread, so it ends with the module.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

AXE = "axe-core@4.14.1"
expect.set_options(timeout=60_000)  # machines that run tests are slow at times
SIZES = {"wide": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "the tests need a browser: apt-get install chromium"
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as one:
            yield one


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The script of axe, from the registry of npm."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("axe comes by npm, which is not installed")
    folder = tmp_path_factory.mktemp("axe")
    words = [npm, "pack", AXE, "--silent", "--prefer-offline", "--fetch-retries=1", "--pack-destination"]
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the package registry cannot be reached: {done.stderr.strip()[-300:]}")
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as packed:
        script = packed.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def faults(page: Page, axe: str) -> list[str]:
    """What axe finds on a page."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [f"{one['id']}: {one['help']}: {node['html']}" for one in found for node in one["nodes"]]


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def opened(browser: Browser, address: str | Path, size: str = "wide", scheme: str = "light") -> Page:
    """A page at an address or of a file, whose errors and missing files fail the test that looks at them."""
    page = browser.new_page(viewport={"width": SIZES[size], "height": 900}, color_scheme=scheme)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("response", lambda one: page.problems.append(one.url) if one.status >= 400 else None)
    page.goto(address.as_uri() if isinstance(address, Path) else address)
    return page
