"""The page of the server in a real browser: wide and on a phone, light and dark, by keyboard."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import axe, browser, faults, opened, scrolls_sideways  # noqa: F401  fixtures
from tests.page import shop_with_encoder
from tests.serving import start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]

LOOKS = [("wide", "light"), ("wide", "dark"), ("phone", "light")]


@pytest.fixture(scope="module")
def address(forked, tmp_path_factory):
    root = shop_with_encoder(tmp_path_factory.mktemp("page"))
    places = {"bundle": "run/bundle", "store": "table", "data": "data", "encoder": "encoder"}
    words = [word for flag, place in places.items() for word in (f"--{flag}", str(root / place))]
    server, address = start(*words, python=forked["MIM_PYTHON"])
    yield address
    server.terminate()
    server.wait()


def users(page: Page) -> list[str]:
    links = page.get_by_role("navigation", name="Users").get_by_role("link")
    expect(links.first).to_be_visible()
    return links.evaluate_all("all => all.map(one => one.dataset.user)")


def shows(page: Page, user: str) -> None:
    expect(page.locator("body")).to_have_attribute("data-user", user)
    expect(page.locator("#found a[aria-current=page]")).to_have_attribute("data-user", user)


def try_item(page: Page) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    files = {"name": "red-chair.png", "mimeType": "image/png", "buffer": picture.getvalue()}
    page.get_by_label("Picture: choose").set_input_files(files)
    expect(page.get_by_label("Title")).to_have_value("red chair")
    page.get_by_role("button", name="Rank it").click()
    expect(page.locator(".card.new")).to_have_count(1)


@pytest.mark.parametrize("size", ["wide", "phone"])
def test_a_person_picks_a_user_and_sees_what_content_changes(address, browser, size, tmp_path: Path):  # noqa: F811
    page = opened(browser, address, size)
    listed = users(page)
    page.locator(f"#found a[data-user='{listed[1]}']").click()
    shows(page, listed[1])
    assert page.url.endswith(f"?user={listed[1]}")
    scores = page.locator(".score").all_inner_texts()
    assert scores == sorted(scores, key=lambda text: -float(text.rstrip("%"))) and len(scores) == 5
    words = r"Content leaves its rank\.|[▲▼] (up|down) \d+ places? by content, from \d+"
    assert all(re.fullmatch(words, text) for text in page.locator(".move").all_inner_texts())
    assert page.locator(".alike li").count() == 15
    low, high = re.search(r"from ([\d.]+)% to ([\d.]+)%", page.locator("#legend").inner_text()).groups()
    assert float(low) < min(float(text.rstrip("%")) for text in scores) + 0.1 and float(high) < 100
    ends = page.locator(".track b").evaluate_all("all => all.map(one => parseFloat(one.style.left))")
    assert (min(ends), max(ends)) == (0, 100)  # the scale is that of what is shown
    page.wait_for_function(
        "[...document.images].every(one => !one.complete || !one.src || one.naturalWidth > 0)"
    )
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.go_back()
    shows(page, listed[0])
    assert not scrolls_sideways(page) and not page.problems, page.problems


def test_a_link_to_a_user_opens_it_and_the_search_finds_others_by_keyboard(address, browser):  # noqa: F811
    listed = users(opened(browser, address))
    page = opened(browser, f"{address}?user={listed[2]}")
    shows(page, listed[2])
    page.keyboard.press("Tab")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type(listed[1][-3:])
    expect(page.locator("#found a").first).to_have_attribute("data-user", re.compile(listed[1][-3:]))
    page.keyboard.press("Enter")
    found = page.locator("#found a").first.get_attribute("data-user")
    shows(page, found)
    page.get_by_role("searchbox").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("There is no user whose id holds “nobody”.")
    assert not page.problems


def test_every_control_is_reached_by_the_keyboard(address, browser):  # noqa: F811
    page = opened(browser, address)
    count = len(users(page))
    shows(page, users(page)[0])
    reached = []
    for _ in range(count + 8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:2] == ["search", "numbers"] and reached[2 : 2 + count] == ["A"] * count
    assert reached[2 + count : 7 + count] == ["history", "picture", "title", "category", "BUTTON"]
    page.get_by_role("checkbox", name="Numbers").focus()
    expect(page.locator(".numbers").first).to_be_hidden()
    page.keyboard.press("Space")
    expect(page.locator(".numbers").first).to_contain_text("logit lost without content interest")


def test_a_picture_and_a_title_are_ranked_among_the_candidates(address, browser):  # noqa: F811
    page = opened(browser, address)
    shows(page, users(page)[0])
    before = page.locator(".card h3").all_inner_texts()
    try_item(page)
    said = re.fullmatch(r"The new item ranks (\d+) of 6; without content it would rank \d+\.",
                        page.get_by_role("status").inner_text())  # fmt: skip
    assert page.locator(".card h3").nth(int(said[1]) - 1).inner_text() == f"{said[1]}. red chair"
    assert page.locator(".card.new img").first.evaluate("one => one.src.startsWith('blob:')")
    page.get_by_role("button", name="Remove it").click()
    expect(page.locator(".card.new")).to_have_count(0)
    assert page.locator(".card h3").all_inner_texts() == before
    page.get_by_label("Picture: choose").set_input_files(
        {"name": "note.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    page.get_by_role("button", name="Rank it").click()
    expect(page.get_by_role("alert")).to_contain_text(
        "The new item cannot be ranked: picture: the image of 10"
    )


@pytest.mark.registry
@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_axe_finds_no_fault(address, browser, axe, size, scheme):  # noqa: F811
    page = opened(browser, address, size, scheme)
    shows(page, users(page)[0])
    page.get_by_label("Numbers").check()
    try_item(page)
    assert faults(page, axe) == [] and not scrolls_sideways(page)
    page.evaluate("document.querySelector('label[for=title]').remove()")
    assert [one.split(":")[0] for one in faults(page, axe)] == ["label"]


@pytest.mark.parametrize(("pattern", "status", "said"), [
    ("**/demo/users/*", 503, "This user cannot be shown: the store is away"),
    ("**/demo/about", 503, "the store is away"),
])  # fmt: skip
def test_what_cannot_be_shown_is_said(address, browser, pattern, status, said):  # noqa: F811
    page = browser.new_page()
    away = {"error": "the store is away"}
    page.route(pattern, lambda route: route.fulfill(status=status, json=away))
    page.goto(address)
    expect(page.get_by_role("alert")).to_have_text(said)


def test_where_there_is_no_encoder_the_page_says_so(address, browser):  # noqa: F811
    page = browser.new_page()
    answer = {"what_if_problem": "this server has no encoder", "categories": []}
    page.route("**/demo/about", lambda route: route.fulfill(json=answer))
    page.goto(address)
    expect(page.locator("#no-what-if")).to_have_text("Not here: this server has no encoder.")
    expect(page.get_by_role("button", name="Rank it")).to_be_hidden()
