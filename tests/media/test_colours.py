"""Colour profiles: drawn ones and those of cameras and monitors, against the formulas of the specification."""

import random

import numpy as np
import pytest
from PIL import Image, ImageCms

from mpp.media.images import image_head, read_image, read_mask
from tests.media import profiles

KINDS = {  # modes that are saved, and the formats that hold them without loss
    "RGB": ["png", "tif", "webp"],
    "RGBA": ["png", "tif", "webp"],
    "P": ["png"],
    "L": ["png", "tif"],
    "LA": ["png"],
}


def drawn_image(draw, mode):
    """An image of a mode with soft colours and, where it has one, alpha."""
    values = np.random.default_rng(draw.randrange(10**6))
    small = Image.fromarray(values.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    image = small.resize((24, 30), Image.Resampling.BICUBIC)
    if mode == "P":
        return image.quantize(60)
    image = image.convert("L" if mode[0] == "L" else "RGB")
    if mode[-1] == "A":
        image.putalpha(Image.fromarray(values.integers(0, 256, (30, 24), dtype=np.uint8)))
    return image


def save(image, path, profile):
    lossless = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
    image.save(path, icc_profile=profile, **lossless)
    return path


def close(found, wanted):
    """Numbers of 8 bits against the formula: rounded, and half a level of LittleCMS's own arithmetic."""
    assert np.abs(np.asarray(found, dtype=float) - wanted).max() <= 1


def test_drawn_profiles_are_shown_as_their_formulas_say_and_alpha_stays(tmp_path):
    draw = random.Random(0)
    for number in range(60):
        mode = draw.choice(["RGB", "RGBA", "P"])
        matrix = draw.choice([profiles.P3, profiles.ADOBE, profiles.drawn_matrix(draw)])
        gamma = draw.choice(["srgb", 1.8, 2.2, draw.uniform(1.5, 2.7)])
        image = drawn_image(draw, mode)
        path = tmp_path / f"{number}.{draw.choice(KINDS[mode])}"
        save(image, path, profiles.rgb_profile(matrix, gamma))
        assert image_head(path).profile == "converted"
        plain, found = read_image(path), read_image(path, srgb=True)
        close(found.rgb, profiles.shown(np.asarray(plain.rgb), gamma, matrix))
        assert np.array_equal(np.asarray(plain.rgb), np.asarray(image.convert("RGB")))
        assert (plain.alpha is None) == (found.alpha is None) == (mode != "RGBA")
        assert plain.alpha is None or np.array_equal(plain.alpha, found.alpha)


def test_greys_have_profiles_of_their_own_at_any_depth(tmp_path):
    draw = random.Random(1)
    for number in range(30):
        mode, gamma = draw.choice(["L", "LA", "I;16"]), draw.choice([1.0, 1.8, 2.2, draw.uniform(1.2, 3)])
        image = drawn_image(draw, "L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
        path = save(image, tmp_path / f"{number}.png", profiles.grey_profile(gamma))
        found = np.asarray(read_image(path, srgb=True).rgb)
        assert np.ptp(found.astype(int), axis=2).max() <= 1
        close(found[..., 1], profiles.shown(np.asarray(read_image(path).rgb)[..., 0], gamma))


def test_a_profile_of_srgb_changes_no_bit(tmp_path):
    draw = random.Random(2)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number in range(40):
        mode = draw.choice(list(KINDS))
        profile = profiles.grey_profile("srgb")
        if mode[0] != "L":
            profile = draw.choice([own, profiles.rgb_profile(profiles.SRGB, "srgb")])
        path = save(drawn_image(draw, mode), tmp_path / f"{number}.{draw.choice(KINDS[mode])}", profile)
        assert image_head(path).profile == "none"
        assert read_image(path, srgb=True).rgb.tobytes() == read_image(path).rgb.tobytes()


def test_a_profile_that_does_not_fit_is_left_out(tmp_path):
    draw = random.Random(3)
    for number in range(60):
        mode = draw.choice(list(KINDS))
        rgb, grey = profiles.rgb_profile(profiles.ADOBE, 2.2), profiles.grey_profile(1.8)
        other = rgb if mode[0] == "L" else grey
        profile = draw.choice([other, other, draw.randbytes(draw.randint(1, 600)), rgb[: draw.randint(1, 300)]])
        path = save(drawn_image(draw, mode), tmp_path / f"{number}.{draw.choice(KINDS[mode])}", profile)
        assert image_head(path).profile == "misfit"
        assert read_image(path, srgb=True).rgb.tobytes() == read_image(path).rgb.tobytes()


def test_a_turned_cmyk_photo_is_read_with_a_profile_of_other_channels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = drawn_image(random.Random(4), "RGB").convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=95, exif=exif, icc_profile=profiles.rgb_profile(profiles.P3, "srgb"))
    assert image_head(tmp_path / "a.jpg").profile == "misfit"
    assert read_image(tmp_path / "a.jpg", srgb=True).rgb.size == image_head(tmp_path / "a.jpg").size == (30, 24)


def test_inks_are_shown_as_their_profile_says(tmp_path):
    values = np.random.default_rng(5)
    corners = np.stack([values.integers(60, 230, 16), *values.integers(113, 143, (2, 16))], axis=1)
    corners[0], corners[15] = (255, 128, 128), (0, 128, 128)  # paper is shown as white, all inks as black
    profile = profiles.cmyk_profile(corners)
    for number in range(16):
        inks = tuple(255 * (number >> bit & 1) for bit in (3, 2, 1, 0))
        path = save(Image.new("CMYK", (8, 8), inks), tmp_path / f"{number}.tif", profile)
        assert image_head(path).profile == "converted"
        found = np.asarray(read_image(path, srgb=True).rgb)[4, 4]
        assert np.abs(found - profiles.lab_shown(corners[number])).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_are_never_converted(tmp_path, mode):
    greys = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    profile = profiles.grey_profile(1.0) if mode == "L" else profiles.rgb_profile(profiles.ADOBE, 1.0)
    path = save(greys, tmp_path / "m.png", profile)
    assert np.array_equal(read_mask(path), (np.arange(256, dtype=np.float32) / 255).reshape(16, 16))
