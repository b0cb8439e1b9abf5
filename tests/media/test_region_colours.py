"""How regions are shown: the same colours everywhere, told apart on any image."""

import numpy as np
import pytest
from PIL import Image

from mpp.media.lettering import below_each_other, fitted, font, font_size, panels
from mpp.media.region_colours import field_image, legend, plain_weights, region_overlay, with_legend

LEARNED, PRESERVED, HATCHING = (213, 94, 0), (0, 114, 178), (150, 205, 245)


def drawn_image(generator, size=(40, 30)):
    """An image of one drawn colour with noise on it: green, dark, bright, orange, anything."""
    colour = generator.integers(0, 256, 3)
    noise = generator.integers(-60, 60, (size[1], size[0], 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("seed", range(10))
def test_the_overlay_mixes_the_grey_image_with_both_colours_by_the_weights(seed):
    generator = np.random.default_rng(seed)
    image = drawn_image(generator)
    learned = generator.random((6, 8)).astype(np.float32)
    preserved = (1 - learned) * generator.random((6, 8)).astype(np.float32)
    got = np.asarray(region_overlay(image, learned, preserved)).astype(float)
    for y in range(30):
        for x in range(40):
            grey, cell = image.convert("L").getpixel((x, y)), (y * 6 // 30, x * 8 // 40)
            wanted = [
                [grey * (1 - (learned[cell] + preserved[cell]) / 2) + (learned[cell] * a + preserved[cell] * b) / 2
                 for a, b in zip(LEARNED, keep, strict=True)]
                for keep in (PRESERVED, HATCHING)
            ]  # fmt: skip
            assert min(np.abs(got[y, x] - want).max() for want in wanted) <= 0.51


@pytest.mark.parametrize("seed", range(20))
def test_on_any_image_learned_is_reddish_preserved_is_bluish_and_neither_is_grey(seed):
    image = drawn_image(np.random.default_rng(seed))
    ones, none = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    learned, preserved, neither = (
        np.asarray(region_overlay(image, *fields)).astype(int) for fields in ((ones, none), (none, ones), (none, none))
    )
    assert (learned[..., 0] - learned[..., 2]).min() >= 100
    assert (preserved[..., 2] - preserved[..., 0]).min() >= 45
    assert np.ptp(neither, axis=2).max() == 0
    lines = preserved[..., 1] - neither[..., 1] / 2  # without colour the hatching still shows
    assert set(np.unique(np.rint(lines * 2) // 20)) == {57 * 2 // 20, 102 * 2 // 20}


def test_fields_by_themselves_are_the_weights_in_the_colour():
    field = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    got = np.asarray(field_image(field, (70, 50), LEARNED)).astype(float)
    assert np.abs(got[5::10, 5::10] - field[..., None] * LEARNED).max() <= 0.5


def test_the_legend_shows_each_colour_and_what_lies_between_under_a_rule():
    def threshold(values):
        below = (values < 0.5).astype(np.float32)
        return values * (1 - below), below

    size, line = 16, np.asarray(legend(600, 16)).astype(int)
    middle = line[line.shape[0] // 2]
    reddish, bluish = middle[:, 0] - middle[:, 2] > 50, middle[:, 2] - middle[:, 0] > 50
    assert reddish[: 2 * size].all()
    assert bluish.any()
    assert not bluish[: 2 * size].any()
    sharp = np.asarray(legend(600, 16, threshold)).astype(int)[line.shape[0] // 2]
    ramp = sharp[np.flatnonzero(np.abs(sharp - middle).max(1))]
    assert 0 < len(ramp) <= 4 * size  # the swatch between is all that differs


@pytest.mark.parametrize("width", [280, 400, 512, 1024])
def test_all_three_words_are_in_a_legend_of_any_width(width):
    line = np.asarray(legend(width, font_size(width))).astype(int)
    dark = (line.max(2) < 100).any(0)  # letters
    gaps = np.flatnonzero(np.diff(np.flatnonzero(dark)) > 15)
    assert len(gaps) == 2
    assert not dark[-2:].any()


def test_an_image_above_its_legend_is_untouched():
    image = drawn_image(np.random.default_rng(3), (300, 100))
    sheet = np.asarray(with_legend(image, font_size(300)))
    assert sheet.shape[1] == 300
    np.testing.assert_array_equal(sheet[:100], np.asarray(image))
    assert (sheet[100:] < 200).any()


def test_without_a_loss_what_is_not_learned_is_preserved():
    learned, preserved = plain_weights(np.array([[0.0, 0.25, 1.0]]))
    assert (learned + preserved == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_is_too_long_is_cut_at_the_last_letter_that_fits(seed):
    generator = np.random.default_rng(seed)
    text = "".join(generator.choice(list("abc iWM"), 80)) + "x"
    size, width = int(generator.integers(13, 28)), int(generator.integers(60, 400))
    found = fitted(text, size, width)
    plain = " ".join(text.split())
    if found != plain:
        assert font(size).getlength(found) <= width
        kept = found.removesuffix("...")
        assert plain.startswith(kept)
        longer = plain[: len(kept) + 2].rstrip()
        assert font(size).getlength(f"{longer}...") > width
    assert fitted("face\nbody", size, 400) == "face body"
    assert fitted(text, size, 1) == ""


def test_panels_have_gaps_and_columns_as_wide_as_their_labels():
    parts = [("a", Image.new("RGB", (20, 10), "red")), ("a label that is long", Image.new("RGB", (20, 10), "red"))]
    sheet = np.asarray(panels(parts, 13))
    red = (sheet == (255, 0, 0)).all(2).any(0)
    assert red.sum() == 40
    assert red[:20].all()
    assert not red[20:40].any()
    assert font(13).getlength("a label that is long") < sheet.shape[1] / 2
    stacked = below_each_other([Image.fromarray(sheet)] * 2, 5, 5)
    assert stacked.size == (sheet.shape[1] + 10, 2 * sheet.shape[0] + 15)
