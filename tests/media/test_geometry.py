"""Drawn sizes, resolutions, steps, aspects: every image has a bucket, a crop inside it, and a value in every cell."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mpp.media.geometry import Buckets, Geometry, crop_image, latent_mask, overlaps

RESOLUTIONS = (256, 512, 624, 720, 832, 1024)
STEPS = (4, 8, 16, 32, 64)  # of the models' latents
USUAL = ((1920, 1080), (1344, 768), (1440, 1080), (6000, 4000), (4000, 6000), (1, 1), (1, 4000), (4096, 2160))


def drawn_size(draw, longest=8000):
    """Width and height of an image: any area, mostly of an ordinary aspect ratio, either way up."""
    long = round(longest ** draw.uniform(0.1, 1))
    short = max(1, round(long / 2 ** abs(draw.gauss(0, 1.2))))
    return draw.choice([(long, short), (short, long)])


def kept(source, size):
    """The kept part of a source as exact fractions of its width and height, by what a crop is for."""
    width = min(Fraction(1), Fraction(size[0], size[1]) / Fraction(*source))
    height = min(Fraction(1), Fraction(*source) / Fraction(size[0], size[1]))
    return width, height


def check_box(geometry, width, height):
    """Pillow takes the box, as the float32 that it makes of it, and it is the exact one."""
    box = geometry.box(width, height)
    left, top, right, bottom = np.float32(box).tolist()
    assert 0 <= left < right <= width, (geometry, width, height)
    assert 0 <= top < bottom <= height, (geometry, width, height)
    across, down = kept(geometry.source, geometry.size)
    exact = [(1 - across) / 2 * width, (1 - down) / 2 * height, (1 + across) / 2 * width, (1 + down) / 2 * height]
    assert all(math.isclose(edge, want, rel_tol=1e-12, abs_tol=1e-9) for edge, want in zip(box, exact, strict=True))
    assert math.isclose(geometry.cropped, 1 - across * down, abs_tol=1e-12)


def check_cells(start, stop, cells, pixels):
    """Every cell takes a whole share, all from pixels that are there."""
    shares = overlaps(start, stop, cells, pixels)
    assert shares.shape == (cells, pixels)
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=0, atol=1e-12)


def mask_size(draw, size):
    """A size of the same shape at another resolution, as far as whole pixels allow it."""
    factor = draw.choice([1, 2, 0.5, draw.uniform(0.1, 3)])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def check_sizes(draw, count, checked):
    for number in range(count):
        size = USUAL[number] if number < len(USUAL) else drawn_size(draw)
        for resolution in RESOLUTIONS:
            for step in STEPS:
                bucket = Buckets(resolution, step).choose(*size)
                geometry = Geometry(size, bucket, draw.random() < 0.5)
                check_box(geometry, *size)
                other = mask_size(draw, size)
                check_box(geometry, *other)
                if draw.random() < checked:
                    left, top, right, bottom = geometry.box(*other)
                    check_cells(left, right, bucket[0] // step, other[0])
                    check_cells(top, bottom, bucket[1] // step, other[1])


def test_a_crop_lies_in_its_image_whatever_the_sizes():
    check_sizes(random.Random(0), 100, checked=0.02)


@pytest.mark.slow
@pytest.mark.draws
def test_a_crop_lies_in_its_image_for_5000_sizes():
    check_sizes(random.Random(1), 5000, checked=0.001)


def test_pillow_cuts_every_drawn_image():
    draw = random.Random(2)
    for _ in range(250):
        size = drawn_size(draw, 600)
        bucket = Buckets(draw.randint(64, 160), draw.choice([8, 16])).choose(*size)
        assert crop_image(Image.new("L", size, 7), Geometry(size, bucket)).getextrema() == (7, 7)


def averages(mask, left, top, right, bottom, cells):
    """Area averages of cells, from sums of the mask up to each edge: another way than shares of pixels."""
    sums = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows, columns = np.linspace(top, bottom, cells[0] + 1), np.linspace(left, right, cells[1] + 1)
    down = np.stack([np.interp(rows, range(len(sums)), column) for column in sums.T], 1)
    edges = np.stack([np.interp(columns, range(sums.shape[1]), line) for line in down])
    area = (bottom - top) * (right - left) / (cells[0] * cells[1])
    return np.diff(np.diff(edges, axis=0), axis=1) / area


def test_masks_of_any_resolution_have_a_value_in_every_cell():
    draw = random.Random(3)
    for number in range(120):
        size = drawn_size(draw, 400)
        bucket = Buckets(draw.randint(64, 256), 16).choose(*size)
        geometry = Geometry(size, bucket, draw.random() < 0.5)
        width, height = mask_size(draw, size)
        mask = np.random.default_rng(number).random((height, width)).astype(np.float32)
        cells = bucket[1] // 8, bucket[0] // 8
        across, down = (float(part) for part in kept(size, bucket))
        edges = ((1 - across) / 2 * width, (1 - down) / 2 * height, (1 + across) / 2 * width, (1 + down) / 2 * height)
        wanted = averages(mask, *edges, cells)
        found = latent_mask(mask, geometry, cells)[0, 0].numpy()
        np.testing.assert_allclose(found, wanted[:, ::-1] if geometry.flip else wanted, rtol=0, atol=1e-5)


def test_every_resolution_step_and_aspect_has_a_bucket():
    draw = random.Random(4)
    for _ in range(1500):
        step = draw.choice(STEPS)
        resolution = draw.randint(step, 1200)
        aspect = draw.choice([1, 1 + draw.random() / 10, 1 + 4 * draw.random()])
        sizes = Buckets(resolution, step, aspect).sizes()
        assert sizes, (resolution, step, aspect)
        for width, height in sizes:
            assert width % step == height % step == 0
            assert 0 < width * height <= resolution**2
            assert max(width, height) / min(width, height) <= aspect


@pytest.mark.parametrize("aspect", [0.5, 0, -1, math.nan, math.inf])
def test_aspects_that_are_none_are_refused(aspect):
    with pytest.raises(ValueError, match="data.max_aspect must be at least 1 and finite"):
        Buckets(512, 16, aspect)
