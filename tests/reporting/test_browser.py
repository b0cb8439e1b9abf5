"""The page as its reader sees it: words, colours on the cells, clips and layers, many samples, narrow windows."""

import numpy as np
import pytest

from mpp.reporting.output import Report
from tests.reporting.browsing import (
    ALL,
    ARROW_RIGHT,
    CONTINUOUS,
    END,
    GREY,
    HATCHING,
    HOSTILE,
    KEEP,
    LEARN,
    THRESHOLD,
    TIERS,
    cells_of,
    in_chromium,
    off_colour,
)
from tests.reporting.drawn import Drawn, disc

pytestmark = in_chromium


# ---------------------------------------------------------------- what is shown


def test_it_opens_without_complaint_and_asks_for_nothing(browser, page):
    browser.open(page)
    browser.until("[...document.querySelectorAll('.card img')].filter((image) => image.src).length > 5")
    for kind in ("[data-value='mask']", "#help-open"):
        browser.click(kind)
    assert browser.complaints() == []
    assert browser.requests() == []


def test_the_head_says_what_the_set_is_and_what_the_teacher_costs(browser, page):
    browser.open(page)
    assert browser.js("document.title") == "mychar: mpp report"
    assert browser.find("#cache-name").text == "mychar"
    assert browser.find("#loss summary").text == "loss=threshold: masked prior preservation, threshold mode"
    browser.click("#loss summary")
    assert "prior_threshold 0.1" in " ".join(browser.texts(".settings li")).replace("\n", " ")
    tiles = browser.texts(".tile")
    assert tiles[0] == "10\nsamples, 1 of them for validation"
    assert tiles[1] == "90 %\nhave a mask"
    assert tiles[4].startswith("89 %\nof the training visits run the teacher\nsteps take about 1.20x")


def test_all_samples_are_there_with_their_words(browser, page):
    browser.open(page)
    assert browser.shown() == ALL  # p10 after p2
    assert browser.find("#count").text == "10 samples"
    words = browser.find(".card[data-key='p2'] .words").text.split("\n")
    assert words[0] == "p2"
    assert "a dog by the sea" in words
    assert "128x128 · mask: masklabel" in words
    assert browser.texts(".card[data-key='black'] .flag") == ["Empty mask"]
    assert "6 frames" not in browser.find(".card[data-key='clip@0'] .meta").text
    assert "128x64, 21 frames" in browser.find(".card[data-key='clip@0'] .meta").text


def test_hostile_captions_are_text(browser, page):
    browser.open(page)
    card = ".card[data-key='hostile']"
    assert browser.find(f"{card} .caption").text == HOSTILE
    browser.click(f"{card} .open")
    assert browser.find("#detail .facts .caption").text == HOSTILE
    assert browser.js("document.querySelectorAll('.facts img, .words img, .words b').length") == 0
    assert browser.js("document.title") == "mychar: mpp report"


def test_a_sample_without_preview_says_so_and_shows_its_weights(browser, page):
    browser.open(page)
    card = ".card[data-key='blind']"
    browser.js(f'document.querySelector("{card}").scrollIntoView()')
    browser.until(f'!document.querySelector("{card} canvas").hidden')
    assert browser.find(f"{card} .absent").text == "no preview"
    assert browser.find(f"{card} img").is_displayed() is False


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("overlay", ["target", "prior", "both", "mask"])
def test_the_overlays_colours_lie_on_the_cells_that_the_loss_says(browser, page, overlay):
    browser.open(page, f"overlay={overlay}")
    browser.js("document.querySelector(\".card[data-key='tiers']\").scrollIntoView()")
    got = cells_of(browser, ".card[data-key='tiers'] canvas", TIERS.shape)
    weights = THRESHOLD.weights(TIERS[None, None])
    target, prior = weights.target[0, 0, 0].numpy(), weights.prior[0, 0, 0].numpy()
    if overlay == "mask":
        assert np.abs(got[..., :3] - 255 * TIERS.numpy()[..., None]).max() <= 1
        assert (got[..., 3] == 255).all()
        return
    shown = {"target": target, "prior": prior, "both": target + prior}[overlay]
    assert np.abs(got[..., 3] - 255 * shown).max() <= 1
    for field, colour in ((target, LEARN), (prior, KEEP)):
        cells = (field > 0) & (shown > 0)
        if overlay == "both" or (overlay == "target") == (colour is LEARN):
            colours = (colour,) if colour is LEARN else (KEEP, HATCHING)
            assert off_colour(got[cells][:, :3], colours) <= 3  # stored with its alpha multiplied in


@pytest.mark.parametrize("opacity", [100, 50])
def test_on_the_screen_the_cells_are_sharp_and_mixed_with_the_image(browser, page, tmp_path, opacity):
    browser.open(page, f"overlay=both&opacity={opacity}&open=tiers")
    cells_of(browser, "#detail .stage canvas")
    browser.until("document.querySelector('#detail .stage img').complete")
    box = browser.js("(() => { const b = document.querySelector('.stage .figure').getBoundingClientRect(); "
                     "return [b.left, b.top, b.width, b.height]; })()")  # fmt: skip
    screen = browser.screenshot(tmp_path / "cells.png").astype(float)
    weights = THRESHOLD.weights(TIERS[None, None])
    target, prior = weights.target[0, 0, 0].numpy(), weights.prior[0, 0, 0].numpy()
    for row in range(4):
        for column in range(6):
            share = (target + prior)[row, column] * opacity / 100
            colours = (LEARN,) if target[row, column] else (KEEP, HATCHING)
            for at in (0.1, 0.5, 0.9):  # smoothing would spread at the edges first
                x, y = box[0] + (column + at) * box[2] / 6, box[1] + (row + at) * box[3] / 4
                wanted = [GREY * (1 - share) + np.array(colour) * share for colour in colours]
                assert off_colour(screen[int(y), int(x)], wanted) <= 5, (row, column, at)


def test_the_panes_show_each_field_by_itself(browser, page):
    browser.open(page, "open=tiers")
    weights = THRESHOLD.weights(TIERS[None, None])
    fields = {"target": (weights.target, LEARN), "prior": (weights.prior, KEEP), "mask": (weights.raw, (255,) * 3)}
    for plane, (field, colour) in fields.items():
        got = cells_of(browser, f".pane.{plane} canvas")
        want = field[0, 0, 0].numpy()[..., None] * np.array(colour)
        assert np.abs(got[..., :3] - want).max() <= 2
        said = browser.find(f".pane.{plane} b").text
        assert float(said.split()[0]) == pytest.approx(100 * float(field.mean()), abs=0.6)


def test_pointing_at_a_cell_reads_its_weights(browser, page):
    browser.open(page, "open=tiers")
    box = browser.find("#detail .stage .figure")
    from selenium.webdriver.common.action_chains import ActionChains

    width, height = box.size["width"], box.size["height"]
    for column, text in (
        (2.5, "mask 0.50, learned 0.50, preserved 0.00"),
        (4.5, "mask 0.05, learned 0.00, preserved 1.00"),
    ):
        offset = round((column / 6 - 0.5) * width), round((0.5 / 4 - 0.5) * height)
        ActionChains(browser.driver).move_to_element_with_offset(box, *offset).perform()
        browser.until(f"document.querySelector('#cell-readout').textContent.includes('{text}')")


# ---------------------------------------------------------------- clips and layers


def test_hovering_plays_a_clips_key_frames_and_leaving_stops(browser, page):
    browser.open(page)
    browser.js("document.querySelector(\".card[data-key='clip@0']\").scrollIntoView({block: 'center'})")
    figure = "document.querySelector(\".card[data-key='clip@0'] .figure\")"
    browser.until(f"{figure}.dataset.live === '1'")
    browser.js(
        "(() => { const seen = window.seen = []; const image = arguments[0].querySelector('img'); "
        "new MutationObserver(() => seen.push([arguments[0].dataset.view, image.src]))"
        ".observe(image, {attributes: true, attributeFilter: ['src']}); })()",
        browser.find(".card[data-key='clip@0'] .figure"),
    )
    browser.hover(".card[data-key='clip@0'] .open")
    browser.until("window.seen.length >= 7")
    views = browser.js("window.seen.slice(0, 7).map((pair) => Number(pair[0]))")
    assert views == [1, 2, 3, 4, 5, 0, 1]
    assert browser.js("new Set(window.seen.slice(0, 6).map((pair) => pair[1])).size") == 6
    browser.hover("#count")
    browser.until(f"{figure}.dataset.view === '0'")
    count = browser.js("window.seen.length")
    browser.driver.execute_async_script("setTimeout(arguments[0], 700)")
    assert browser.js("window.seen.length") == count


def test_reduced_motion_keeps_clips_still(browser, page):
    browser.open(page, features=[("prefers-reduced-motion", "reduce")])
    browser.hover(".card[data-key='clip@0'] .open")
    browser.driver.execute_async_script("setTimeout(arguments[0], 700)")
    assert browser.js("document.querySelector(\".card[data-key='clip@0'] .figure\").dataset.view") == "0"


def test_a_clips_frames_by_scrubber_keys_film_and_play(browser, page):
    browser.open(page, "open=clip%400")
    name = "document.querySelector('#view-name').textContent"
    assert browser.js("document.querySelectorAll('.film button').length") == 6
    first = cells_of(browser, ".pane.mask canvas")
    browser.press(".", ".")
    assert browser.js(name) == "latent frame 2"
    browser.until("document.querySelector('#scrubber').value === '2'")
    browser.driver.execute_async_script("setTimeout(arguments[0], 100)")
    third = cells_of(browser, ".pane.mask canvas")
    want = disc(8, 16, 0.3, (0.5, 0.4)).numpy() * 255
    assert np.abs(third[..., 0] - want).max() <= 1
    assert np.abs(first - third).max() > 100
    browser.press(",")
    assert browser.js(name) == "latent frame 1"
    browser.find("#scrubber").send_keys(ARROW_RIGHT)
    assert browser.js(name) == "latent frame 2"
    browser.click(".film button:last-child")
    assert browser.js(name) == "latent frame 5"
    browser.press("p")
    assert browser.find("#play").get_attribute("aria-label") == "Pause (p)"
    browser.until(f"{name} === 'latent frame 1'")
    browser.press("p")
    assert browser.find("#play").get_attribute("aria-label") == "Play (p)"


def test_layers_have_tabs_and_their_own_weights(browser, layers):
    browser.open(layers)
    card = ".card[data-key='l1']"
    assert browser.texts(f"{card} .tab") == ["whole", "0", "1"]
    before = cells_of(browser, f"{card} canvas", (8, 8))
    browser.click(f"{card} .tab:nth-child(3)")
    browser.until(f"document.querySelector(\"{card} .figure\").dataset.view === '2'")
    browser.driver.execute_async_script("setTimeout(arguments[0], 100)")
    after = cells_of(browser, f"{card} canvas", (8, 8))
    weights = CONTINUOUS.weights(disc(8, 8)[None, None])
    only_learn = (weights.prior[0, 0, 0] == 0).numpy()
    only_keep = (weights.target[0, 0, 0] == 0).numpy()
    assert np.abs(after[only_learn][:, :3] - LEARN).max() <= 1
    assert off_colour(after[only_keep][:, :3], (KEEP, HATCHING)) <= 1
    assert np.abs(before[..., :3] - LEARN).max() <= 1
    browser.click(f"{card} .open")
    assert browser.texts(".film button") == ["whole", "layer 0", "layer 1"]
    assert browser.js("document.querySelector('#play')") is None


# ---------------------------------------------------------------- many samples, windows, readers


def test_of_many_samples_only_those_near_the_window_hold_images(browser, many):
    browser.open(many)
    assert len(browser.shown()) == 250
    with_image = "[...document.querySelectorAll('.card img')].filter((image) => image.getAttribute('src')).length"
    browser.until(f"{with_image} > 0")
    assert browser.js(with_image) < 60
    last = "document.querySelector(\".card[data-key='s249'] img\")"
    assert browser.js(f"{last}.getAttribute('src')") is None
    browser.press("j", END)  # End
    browser.until(f"{last}.getAttribute('src') !== null")
    assert browser.js("document.activeElement.closest('.card').dataset.key") == "s249"
    browser.until(f"{with_image} < 60")
    seconds = browser.js(
        "(() => { const start = performance.now(); change({sort: 'learn', down: '1'}); document.body.offsetHeight; "
        "return (performance.now() - start) / 1000; })()"
    )
    assert seconds < 1.0
    assert browser.shown()[0] == "s249"


def test_what_is_not_on_the_page_is_said(browser, page, tmp_path):
    browser.open(page)
    assert not browser.find("#notice").is_displayed()
    drawn = Drawn(tmp_path / "large")
    for number in range(12):
        drawn.add(f"s{number:02}", mask=None if number < 8 else disc(4, 4), cells=(4, 4), image=None)
    drawn.write()
    browser.open(Report(str(drawn.cache.folder), limit=6).run(THRESHOLD)[0])
    shown = [key for key in browser.shown() if key < "s08"]
    assert browser.find("#notice").text.startswith("6 of 12 samples are on this page: some with each finding")
    remedy = browser.find(".findings > li:first-child .remedy").text
    assert remedy.endswith(f"{8 - len(shown)} samples of these not on this page.")
    assert browser.find(".finding[data-kind='missing'] .number").text == "8"


@pytest.mark.parametrize("size", [(1280, 900), (420, 900)])
@pytest.mark.parametrize("address", ["", "open=clip%400"])
def test_no_window_needs_scrolling_sideways(browser, page, size, address):
    browser.open(page, address, size=size)
    assert browser.js("document.documentElement.scrollWidth") == size[0]
    if address:
        left, right = browser.js("(({left, right}) => [left, right])(document.querySelector('#detail').getBoundingClientRect())")  # fmt: skip  # noqa: E501
        assert left >= 0
        assert right <= size[0]


def test_it_follows_the_systems_colours(browser, page, tmp_path):
    means = []
    for scheme in ("light", "dark"):
        browser.open(page, features=[("prefers-color-scheme", scheme)])
        means.append(browser.screenshot(tmp_path / f"{scheme}.png")[:40, :300].mean())
    assert means[0] > 225
    assert means[1] < 60


@pytest.mark.parametrize(("address", "root", "least"), [("q=c", "body", 40), ("q=c&open=clip%400", "#detail", 11)])
def test_every_control_has_a_name_and_images_do_not_speak(browser, page, address, root, least):
    browser.open(page, address)
    controls = browser.driver.find_elements(
        "css selector", f"{root} :is(button, input, select, [role=button]):not(dialog:not([open]) *, [hidden] *)"
    )
    assert len(controls) >= least
    nameless = [one.get_attribute("outerHTML") for one in controls if not one.accessible_name.strip()]
    assert nameless == []
    assert browser.js("['#clear', '.chip', '.open', '.finding[data-kind]'].every((css) => "
                      "document.querySelector(css).tagName === 'BUTTON')")  # fmt: skip
    assert browser.js("[...document.querySelectorAll('img')].every((image) => image.alt === '')")
    assert browser.js("document.querySelector('#count').getAttribute('aria-live')") == "polite"
