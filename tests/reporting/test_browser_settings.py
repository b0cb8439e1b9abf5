"""Other settings tried on the page: its regions and areas are those that the core computes under them."""

import random
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

import mpp.report
from mpp.cache.coverage import Coverage, cover
from mpp.core.loss import MaskedPriorLoss
from mpp.reporting.output import Report
from tests.helpers import config
from tests.reporting.browsing import (
    ARROW_LEFT,
    ARROW_RIGHT,
    CONTINUOUS,
    HATCHING,
    KEEP,
    LEARN,
    THRESHOLD,
    TIERS,
    cells_of,
    in_chromium,
    off_colour,
)
from tests.reporting.drawn import Drawn, disc
from tests.reporting.reading import Page

pytestmark = in_chromium
LEVELS = torch.arange(256).view(16, 16) / 255
DECIMALS = torch.tensor([n / 100 for n in range(100)]).view(10, 10)  # in float32 some are below their decimals
SHORTEST = 1 / 255
SELECT_ALL, DELETE = "\ue009a\ue000", "\ue017"
MEASURED = "!('measuring' in document.documentElement.dataset)"


def drawn_cache(folder, *, given=0):
    """Images and clips with drawn masks, and what lies at the ends."""
    generator = torch.Generator().manual_seed(given)
    drawn = Drawn(folder, given=given)
    frames = 1 + given
    for number in range(4):
        drawn.add(f"noise{number}", mask=torch.rand(frames, 7, 5 + number, generator=generator), image=None)
        drawn.add(f"disc{number}", mask=disc(12, 10, 0.1 + 0.1 * number).expand(frames, 12, 10), image=None, repeats=2)
    drawn.add("white", mask=torch.ones(frames, 8, 8), image=None)
    drawn.add("black", mask=torch.zeros(frames, 8, 8), image=None)
    drawn.add("levels", mask=LEVELS.expand(frames, 16, 16), image=None, repeats=3)
    drawn.add("decimals", mask=DECIMALS.expand(frames, 10, 10), image=None)
    drawn.add("tiers", mask=TIERS.expand(frames, *TIERS.shape), image=None)
    drawn.add("bare", mask=None, cells=(frames, 6, 6), image=None)
    drawn.add("clip", mask=torch.rand(6, 6, 8, generator=generator), image=None)
    drawn.add("long", mask=torch.stack([disc(8, 8, 0.05 * n) for n in range(1, 14)]), image=None)
    drawn.add("@val/v", mask=torch.rand(frames, 6, 6, generator=generator), split="val", image=None)
    return drawn


def drawn_settings(generator, loss):
    """Settings of a loss, some of them at their ends."""
    return replace(
        loss,
        prior_threshold=generator.choice([None, 0.2, 0.6, 0.7, 0.9, round(generator.uniform(0.01, 0.99), 2)]),
        mask_gamma=generator.choice([1.0, 0.05, round(generator.uniform(0.1, 4), 2)]),
        mask_min_weight=generator.choice([0.0, round(generator.uniform(0, 0.95), 2)]),
        mask_blur=generator.choice([0, 0, 1, 3, 5, 9, 15, 31]),
    )


def try_on(browser, loss):
    """Give the page the settings of a loss; what follows from them is there afterwards."""
    names = ("prior_threshold", "mask_gamma", "mask_min_weight", "mask_blur")
    values = {name: "none" if getattr(loss, name) is None else str(getattr(loss, name)) for name in names}
    browser.js("change(arguments[0])", values)
    browser.until(MEASURED)


def fields_of(browser, key):
    """Target and prior weights of a sample's views that are not given, `(2, views, h, w)`."""
    script = (
        "const done = arguments[1]; const sample = byKey.get(arguments[0]); rawOf(sample).then((raw) => done("
        "sample.views.map((_, view) => fieldsOf(sample, raw, view)).filter(Boolean)"
        ".map(({ target, prior }) => [[...target], [...prior]])))"
    )
    found = np.array(browser.driver.execute_async_script(script, key))
    height, width = browser.js("byKey.get(arguments[0]).cells", key)
    return found.transpose(1, 0, 2).reshape(2, -1, height, width)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_regions_and_areas_are_those_of_the_core_under_drawn_settings(browser, tmp_path, given, weight):
    drawn = drawn_cache(tmp_path / "mychar", given=given)
    cache, generator = drawn.write(), random.Random(int(10 * weight) + given)
    base = replace(CONTINUOUS, prior_weight=weight)
    browser.open(Report(str(cache.folder)).run(base)[0])
    for turn in range(20 if weight else 5):
        loss = drawn_settings(generator, replace(base, normalization=generator.choice(["global", "per_sample"])))
        try_on(browser, loss)
        for entry in drawn.entries:
            weights = loss.weights(cache.mask(entry)[None, :, given:])
            shown = [n - given for n in drawn.axis.shown(entry.shape[1]) if n >= given]
            want = torch.stack([weights.target[0, 0, shown], weights.prior[0, 0, shown]])
            got = fields_of(browser, entry.key)
            assert np.abs(got - want.numpy()).max() <= SHORTEST, (turn, entry.key, loss)
            own = cover(loss, cache.mask(entry)[None, :, given:], entry)
            area = browser.js("(({learn, preserve, taught}) => [learn, preserve, taught])(byKey.get(arguments[0]))", entry.key)  # fmt: skip  # noqa: E501
            assert area[:2] == pytest.approx([own.learn, own.preserve], abs=1e-5)
            assert area[2] == own.taught
        training = [entry for entry in drawn.entries if entry.split == "train"]
        total = Coverage.of(cover(loss, cache.mask(entry)[None, :, given:], entry) for entry in training)
        assert browser.js("[totals.learn, totals.preserve, totals.taught]") == pytest.approx(
            [total.learn, total.preserve, total.taught], abs=1e-5
        )
        assert browser.find(".tile.learn b").text == percent(total.learn)
        assert browser.find(".tile.keep b").text == percent(total.preserve)


def percent(share):
    return f"{100 * share:.{1 if 0 < share < 0.1 else 0}f} %"


def test_everything_that_follows_from_the_loss_is_the_page_of_those_settings(browser, tmp_path):
    drawn = drawn_cache(tmp_path / "my char")
    drawn.write()
    other = replace(THRESHOLD, prior_threshold=0.37, mask_gamma=0.6, mask_min_weight=0.05, mask_blur=3)
    script = (
        "[charts.learn.counts, charts.preserve.counts, samples.map((s) => [s.bins.learn, s.bins.preserve]), "
        "[...document.querySelectorAll('.tile, .figures, .mark-text, .readout')].map((e) => e.textContent)]"
    )
    browser.open(Report(str(drawn.cache.folder)).run(THRESHOLD, ("threshold", THRESHOLD))[0])
    at_first = browser.js(script)
    try_on(browser, other)
    tried = browser.js(script)
    assert tried != at_first
    command = browser.find("#command-report").text
    assert command.endswith(
        "loss=threshold loss.prior_threshold=0.37 loss.mask_gamma=0.6 loss.mask_min_weight=0.05 loss.mask_blur=3"
    )
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "mpp.report"]
    out = tmp_path / "same.html"
    mpp.report.run(config("report", [*words[3:], f"output={out}"]))
    assert Page(out).data["loss"]["settings"] == vars(other)
    browser.open(out)
    assert browser.js(script) == tried


def test_sliders_by_keys_reset_and_the_address(browser, page):
    browser.open(page)
    assert not browser.find("#reset").is_enabled()
    browser.js("document.querySelector('#range-prior_threshold').focus()")
    browser.press(ARROW_RIGHT, ARROW_RIGHT)
    assert browser.find("#exact-prior_threshold").get_attribute("value") == "0.12"
    assert browser.find("#command-train").text == "loss=threshold loss.prior_threshold=0.12"
    assert browser.js("location.hash") == "#prior_threshold=0.12"
    assert browser.js("document.activeElement.id") == "range-prior_threshold"  # nothing took the focus away
    browser.js("document.querySelector('#range-mask_blur').focus()")
    browser.press(ARROW_RIGHT, ARROW_RIGHT, ARROW_LEFT)
    assert browser.find("#command-train").text.endswith("loss.mask_blur=3")
    browser.until(MEASURED)
    browser.open(page, browser.js("location.hash.slice(1)"))
    browser.until(MEASURED)
    assert browser.find("#exact-prior_threshold").get_attribute("value") == "0.12"
    assert browser.find("#findings").value_of_css_property("opacity") == "0.45"
    assert browser.find(".made-note").is_displayed()
    browser.click("#reset")
    assert browser.find("#command-train").text == "loss=threshold"
    assert browser.js("location.hash") in ("", "#")
    assert browser.find("#findings").value_of_css_property("opacity") == "1"
    assert not browser.find(".made-note").is_displayed()


def test_the_legend_says_three_words_and_shows_what_masks_between_come_to(browser, page):
    browser.open(page, "prior_threshold=0.5")
    assert browser.texts("#legend li") == ["learned", "between", "preserved"]
    learned, ramp, preserved = (
        cells_of(browser, f"#legend li:nth-child({n}) canvas", cells)
        for n, cells in ((1, (1, 1)), (2, (1, 8)), (3, (1, 1)))
    )
    assert off_colour(learned[..., :3], [LEARN]) <= 1
    assert off_colour(preserved[..., :3], (KEEP, HATCHING)) <= 1
    assert off_colour(ramp[0, :4, :3], [LEARN]) <= 3  # the weaker the darker the mask
    assert (np.diff(ramp[0, :4, 3]) < -20).all()
    assert off_colour(ramp[0, 4:, :3], (KEEP, HATCHING)) <= 1
    assert (ramp[0, 4:, 3] == 255).all()


def test_exact_values_can_be_typed_and_others_are_refused(browser, page):
    browser.open(page)
    for name, text, said in (
        ("prior_threshold", "", "loss.prior_threshold=null"),
        ("prior_threshold", "0.1234", "loss.prior_threshold=0.1234"),
        ("mask_gamma", "7.5", "loss.mask_gamma=7.5"),
    ):
        browser.find(f"#exact-{name}").send_keys(SELECT_ALL, text or DELETE)
        browser.js("document.activeElement.blur()")
        assert said in browser.find("#command-train").text
    for name, text in (("mask_blur", "4"), ("mask_gamma", "0"), ("mask_min_weight", "1"), ("prior_threshold", "1.5")):
        before = browser.find("#command-train").text
        control = browser.find(f"#exact-{name}")
        was = control.get_attribute("value")
        control.send_keys(SELECT_ALL, text)
        browser.js("document.activeElement.blur()")
        assert browser.find("#command-train").text == before
        assert control.get_attribute("value") == was
        assert browser.find("#toast").text == f"loss.{name} has no such value"
    assert browser.open(page, "mask_blur=4&prior_threshold=2").js("isTried()") is False


def test_an_open_sample_follows_and_its_command_can_be_copied(browser, page):
    browser.open(page, "open=tiers&overlay=both")
    browser.js("document.querySelector('#detail #range-prior_threshold').focus()")
    loss = replace(THRESHOLD, prior_threshold=0.6)
    browser.js("change({prior_threshold: '0.6'})")
    browser.until(MEASURED)
    weights = loss.weights(TIERS[None, None])
    learn, keep = float(weights.target.mean()), float(weights.prior.mean())
    assert browser.texts("#detail .cover-large p span") == [f"learns {percent(learn)}", f"preserves {percent(keep)}"]
    got = cells_of(browser, "#detail .stage canvas", TIERS.shape)
    target, prior = weights.target[0, 0, 0].numpy(), weights.prior[0, 0, 0].numpy()
    assert np.abs(got[target == 1][:, :3] - LEARN).max() <= 1
    assert off_colour(got[prior == 1][:, :3], (KEEP, HATCHING)) <= 1
    assert browser.js("document.activeElement.id") == "range-prior_threshold"
    browser.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    browser.click("#detail .command:has(#command-train) button")
    browser.until("document.querySelector('#toast').textContent === 'Copied'")
    found = browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert found == "loss=threshold loss.prior_threshold=0.6"
    browser.press("")
    browser.js("closeDetail()")
    browser.until("document.querySelector('#try #settings') !== null")


def test_what_cannot_follow_says_that_it_is_of_the_pages_settings(browser, tmp_path, monkeypatch):
    drawn = drawn_cache(tmp_path / "mychar")
    drawn.write()
    monkeypatch.setattr("mpp.reporting.page._MASKS", 1000)
    browser.open(Report(str(drawn.cache.folder)).run(THRESHOLD)[0])
    before = browser.texts(".tile.learn, .tile.keep, .tile.wide")
    long = browser.js("byKey.get('long').learn")
    loss = replace(THRESHOLD, mask_gamma=0.4)
    try_on(browser, loss)
    after = browser.texts(".tile.learn, .tile.keep, .tile.wide")
    assert after == before
    assert browser.find(".tile.learn").value_of_css_property("opacity") == "0.45"
    assert browser.find(".chart.learn").value_of_css_property("opacity") == "0.45"
    card = ".card[data-key='long'] .figures"
    browser.js("document.querySelector(arguments[0]).scrollIntoView()", card)
    assert browser.find(card).value_of_css_property("opacity") == "0.45"
    assert browser.js("byKey.get('long').learn") == long
    entry = next(entry for entry in drawn.entries if entry.key == "long")
    shown = drawn.axis.shown(13)
    want = loss.weights(drawn.cache.mask(entry)[None]).target[0, 0, shown].numpy()
    assert np.abs(fields_of(browser, "long")[0] - want).max() <= SHORTEST  # its key frames follow all the same


def test_without_a_prior_the_threshold_is_no_choice(browser, tmp_path):
    drawn = Drawn(tmp_path / "mychar").add("a", image=None)
    browser.open(Report(str(drawn.write().folder)).run(MaskedPriorLoss(), ("masked", MaskedPriorLoss()))[0])
    assert not browser.find("#range-prior_threshold").is_enabled()
    assert browser.find("#no-prior").is_displayed()
    assert browser.find("#range-mask_gamma").is_enabled()
