"""The page as its reader works with it: search, filters, order, address, keys, the detail view."""

from tests.reporting.browsing import (
    ALL,
    ARROW_DOWN,
    ARROW_LEFT,
    ARROW_RIGHT,
    END,
    ENTER,
    ESCAPE,
    in_chromium,
)

pytestmark = in_chromium


# ---------------------------------------------------------------- filters and order


def test_search_by_key_and_typing(browser, page):
    browser.open(page)
    browser.press("/")
    browser.press("cat SEA")
    assert browser.shown() == ["p1"]
    assert browser.find("#count").text == "1 of 10 samples"
    browser.press(ESCAPE)
    assert browser.shown() == ALL
    assert browser.js("document.activeElement === document.body")


def test_a_finding_filters_and_lets_go(browser, page):
    browser.open(page)
    titles = browser.texts(".finding .title")
    assert titles == ["Empty mask", "Mask without media", "No mask", "No preview image"]
    browser.click(".finding[data-kind='missing']")
    assert browser.shown() == ["bare"]
    assert browser.find(".finding[data-kind='missing']").get_attribute("aria-pressed") == "true"
    assert browser.find("#finding").get_property("value") == "missing"
    browser.click(".finding[data-kind='missing']")
    assert browser.shown() == ALL
    browser.click(".findings details summary")
    assert browser.texts(".findings details li") == ["stray.png"]


def test_selects_filter_by_split_mask_bucket_and_any_finding(browser, page):
    browser.open(page)
    for name, value, want in (
        ("split", "val", ["@val/v"]),
        ("mask", "masklabel", ["p2"]),
        ("mask", "none", ["bare"]),
        ("bucket", "160x96", ["p10"]),
        ("finding", "any", ["bare", "black", "blind"]),
        ("finding", "none", [key for key in ALL if key not in ("bare", "black", "blind")]),
    ):
        browser.select(name, value)
        assert browser.shown() == want
        browser.click("#clear")
        assert browser.shown() == ALL


def test_filters_add_up_and_each_chip_takes_its_own_away(browser, page):
    browser.open(page)
    browser.select("mask", "folder")
    browser.press("/")
    browser.press("cat")
    assert browser.shown() == ["p1", "p10"]
    assert [text.split("\n")[0] for text in browser.texts(".chip")] == ["“cat”", "mask: folder"]
    browser.click(".chip")
    assert browser.shown() == [key for key in ALL if key not in ("bare", "p2")]


def test_nothing_left_is_said_and_undone(browser, page):
    browser.open(page, "q=zebra")
    assert browser.shown() == []
    browser.click("#nothing-clear")
    assert browser.shown() == ALL


def test_bars_filter_and_say_what_they_are(browser, page):
    browser.open(page)
    browser.click(".chart.bucket .bar:nth-of-type(2) .hit")
    assert len(browser.shown()) == 1
    assert browser.find(".chart.bucket .bar:nth-of-type(2)").get_attribute("aria-pressed") == "true"
    browser.click("#clear")
    bar = ".chart.learn .bar[aria-label^='nothing']"
    browser.hover(f"{bar} .hit")
    assert browser.find(".chart.learn .readout").text == "nothing: 1 sample"
    browser.click(f"{bar} .hit")
    assert browser.shown() == ["black"]
    assert [text.split("\n")[0] for text in browser.texts(".chip")] == ["learns nothing"]


def test_bars_can_be_reached_by_keys(browser, page):
    browser.open(page)
    browser.js("document.querySelector('.chart.learn .bar').focus()")
    stops = browser.js("document.querySelectorAll(\".chart.learn .bar[tabindex='0']\").length")
    browser.press(ARROW_LEFT, ENTER)  # round to the last
    assert (stops, browser.shown()) == (1, ["bare"])
    assert browser.js("document.activeElement.getAttribute('aria-label')") == "all of it: 1 sample"


def test_orders(browser, page):
    browser.open(page)
    browser.select("sort", "learn")
    areas = browser.js("[...document.querySelectorAll('.card')].map((c) => samples[c.dataset.place].learn)")
    assert areas == sorted(areas)
    assert browser.shown()[0] == "black"
    browser.click("#down")
    assert browser.shown()[-1] == "black"
    browser.click("#down")
    browser.select("sort", "findings")
    assert browser.shown()[:3] == ["black", "bare", "blind"]  # error, warning, hint
    browser.select("sort", "preserve")
    areas = browser.js("[...document.querySelectorAll('.card')].map((c) => samples[c.dataset.place].preserve)")
    assert areas == sorted(areas)


def test_the_address_keeps_what_is_chosen(browser, page):
    browser.open(page)
    browser.select("mask", "folder")
    browser.select("sort", "learn")
    browser.press("/")
    browser.press("sea & <x>")
    browser.press(ESCAPE)
    browser.press("o")
    address = browser.js("location.hash")
    assert address == "#mask=folder&sort=learn&overlay=target"
    want = browser.shown()
    browser.open(page, address[1:])
    assert browser.shown() == want
    assert browser.js("document.querySelector('#overlays [aria-pressed=true]').textContent") == "Learned"
    browser.driver.get(f"{page.as_uri()}#q=cat&sort=nonsense&open=none")  # the same page: only the address changes
    browser.until("document.querySelectorAll('.card').length === 2")
    assert browser.find("#sort").get_property("value") == "key"
    assert browser.complaints() == []


# ---------------------------------------------------------------- keys and detail


def test_arrows_and_letters_go_through_the_grid(browser, page):
    browser.open(page)
    columns = browser.js("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    focused = "document.activeElement.closest('.card')?.dataset.key"
    browser.press("j")
    assert browser.js(focused) == ALL[0]
    browser.press(ARROW_RIGHT, "j", "k")
    assert browser.js(focused) == ALL[1]
    browser.press(ARROW_DOWN)
    assert browser.js(focused) == ALL[1 + columns]
    browser.press(END)  # End
    assert browser.js(focused) == ALL[-1]
    assert browser.js("document.querySelectorAll(\".open[tabindex='0']\").length") == 1


def test_a_sample_opens_steps_and_closes_by_keys(browser, page):
    browser.open(page)
    browser.press("j", ARROW_RIGHT, ENTER)
    assert browser.find("#detail-key").text == "bare"
    facts = browser.find("#detail .facts").text
    assert "none: learns everywhere" in facts
    assert "No mask" in facts
    assert "is skipped" in facts
    browser.press(ARROW_RIGHT)
    assert browser.find("#detail-key").text == "black"
    assert browser.js("location.hash") == "#open=black"
    browser.press("k", "k", "k")
    assert browser.find("#detail-key").text == ALL[0]
    browser.press("o")
    assert browser.js("location.hash").endswith("overlay=target&open=%40val%2Fv")
    browser.press(ESCAPE)
    assert browser.js("document.getElementById('detail').open") is False
    browser.until("location.hash === '#overlay=target'")
    assert browser.js("document.activeElement.closest('.card').dataset.key") == ALL[0]


def test_help_lists_the_keys_and_closes(browser, page):
    browser.open(page)
    browser.press("?")
    assert browser.find("#help").is_displayed()
    assert "next, previous overlay" in browser.find("#help").text
    browser.press(ESCAPE)
    assert not browser.find("#help").is_displayed()


def test_o_goes_round_the_overlays_and_none_hides_them(browser, page):
    browser.open(page)
    pressed = "document.querySelector('#overlays [aria-pressed=true]').textContent"
    seen = [browser.js(pressed)]
    for _ in range(4):
        browser.press("o")
        seen.append(browser.js(pressed))
    assert seen == ["Both", "Learned", "Preserved", "Mask", "None"]
    browser.until("[...document.querySelectorAll('.card canvas')].every((canvas) => canvas.hidden)")
    browser.press("O", "O")
    assert browser.js(pressed) == "Preserved"


def test_names_of_what_is_shown_can_be_copied(browser, page):
    browser.open(page, "q=cat")
    browser.click("#copy")
    browser.until("document.querySelector('#toast').textContent === '2 names copied'")
