import math

import numpy as np
import pytest
from scipy import ndimage

from mpp.masking.feather import Feather, blur, grow
from tests.masking.files import levels, run, save, write_video


def disc(radius):
    return np.array(
        [[x * x + y * y <= radius * radius for x in range(-radius, radius + 1)] for y in range(-radius, radius + 1)]
    )


def drawing(shape=(40, 57), dtype=np.uint8):
    """Tiers with corners, a single pixel, and areas that touch the border."""
    top = np.iinfo(dtype).max
    array = np.zeros(shape, dtype)
    array[:12, :20] = top
    array[20:30, 25:45] = top // 2
    array[24:27, 30:40] = top
    array[33, 8] = top
    array[15:, -3:] = top // 3
    return array


def gaussian(values, sigma):
    """By its formula up to four sigmas, shifted sums in float64, borders repeated."""
    reach = max(1, math.ceil(4 * sigma))
    weights = np.array([math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-reach, reach + 1)])
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(values.astype(np.float64), [(reach, reach) if axis == n else (0, 0) for n in range(2)], "edge")
        values = sum(w * np.roll(padded, reach - n, axis) for n, w in enumerate(weights))
        values = np.take(values, range(reach, values.shape[axis] - reach), axis)
    return values


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 9.0, 40.0])
def test_blur_is_a_gaussian_by_its_formula(sigma):
    values = drawing().astype(np.float32) / 255
    np.testing.assert_allclose(blur(values, sigma), gaussian(values, sigma), rtol=0, atol=1e-6)
    assert blur(values, sigma).dtype == np.float32


@pytest.mark.parametrize("radius", [1, 2, 5, 30, 70])
def test_growing_is_scipys_dilation_by_a_disc(radius):
    values = drawing().astype(np.float32) / 255
    want = ndimage.grey_dilation(values, footprint=disc(radius), mode="constant", cval=0)
    np.testing.assert_array_equal(grow(values, radius), want)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("radius", [1, 3, 6])
def test_shrinking_is_scipys_erosion_and_what_the_border_cuts_goes_on(tmp_path, dtype, radius):
    save(tmp_path / "in" / "m.png", drawing(dtype=dtype))
    run("feather", tmp_path / "in", tmp_path / "out", "tool.sigma=0", f"tool.grow={-radius}")
    got, top = levels(tmp_path / "out" / "m.png"), np.iinfo(dtype).max
    want = ndimage.grey_erosion(drawing(dtype=dtype), footprint=disc(radius), mode="constant", cval=top)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)
    assert got[0, 0] == top


def test_a_grown_then_shrunk_rectangle_is_the_same(tmp_path):
    array = np.zeros((30, 40), np.uint8)
    array[10:20, 10:30] = 255
    save(tmp_path / "in" / "m.png", array)
    run("feather", tmp_path / "in", tmp_path / "wide", "tool.sigma=0", "tool.grow=4")
    run("feather", tmp_path / "wide", tmp_path / "back", "tool.sigma=0", "tool.grow=-4")
    assert levels(tmp_path / "wide" / "m.png")[15, [5, 6, 33, 34]].tolist() == [0, 255, 255, 0]
    np.testing.assert_array_equal(levels(tmp_path / "back" / "m.png"), array)


def test_sides_leave_what_they_say(tmp_path):
    save(tmp_path / "in" / "m.png", drawing())
    got = {}
    for side in ("both", "out", "in"):
        run("feather", tmp_path / "in", tmp_path / f"to_{side}", "tool.sigma=2", f"tool.side={side}")
        got[side] = levels(tmp_path / f"to_{side}" / "m.png")
    before = drawing()
    assert (got["out"] >= before).all()
    assert (got["out"] > before).any()
    assert (got["in"] <= before).all()
    assert (got["in"] < before).any()
    np.testing.assert_array_equal(got["both"], np.where(got["out"] > before, got["out"], got["in"]))


def test_growing_comes_before_softening(tmp_path):
    save(tmp_path / "in" / "m.png", drawing())
    run("feather", tmp_path / "in", tmp_path / "out", "tool.sigma=1.5", "tool.grow=3")
    wide = ndimage.grey_dilation(drawing(), footprint=disc(3), mode="constant", cval=0)
    want = gaussian(wide, 1.5)
    assert np.abs(levels(tmp_path / "out" / "m.png") - want).max() <= 0.5 + 1e-3  # rounded once


def test_all_white_and_all_black_stay(tmp_path):
    for name, value in (("white", 255), ("black", 0)):
        save(tmp_path / "in" / f"{name}.png", np.full((8, 9), value, np.uint8))
    run("feather", tmp_path / "in", tmp_path / "out", "tool.sigma=3", "tool.grow=-2")
    assert (levels(tmp_path / "out" / "white.png") == 255).all()
    assert not levels(tmp_path / "out" / "black.png").any()


def test_frames_are_softened_each_alone(tmp_path):
    frames = [np.zeros((16, 16), np.uint8) for _ in range(3)]
    frames[1][4:12, 4:12] = 255
    write_video(tmp_path / "in" / "m.mkv", frames)
    run("feather", tmp_path / "in", tmp_path / "out", "tool.sigma=2", "video_format=frames")
    first, second, third = (levels(path) for path in sorted((tmp_path / "out" / "m").iterdir()))
    assert not first.any()
    assert not third.any()
    want = gaussian(frames[1], 2)
    assert np.abs(second - want).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tool.sigma=0 and tool.grow=0 change nothing"),
        ({"sigma": -1.0}, "tool.sigma must be at least 0, in pixels, got -1"),
        ({"sigma": math.nan}, "tool.sigma must be at least 0"),
        ({"sigma": math.inf}, "tool.sigma must be at least 0"),
        ({"sigma": 1.0, "side": "left"}, "tool.side must be both or out or in, got 'left'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Feather(**settings)
