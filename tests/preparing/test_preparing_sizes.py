"""Media of drawn sizes through the whole of prepare: each becomes a sample of its bucket, its mask in every cell."""

import random

import numpy as np
import pytest
from PIL import Image

from mpp.cache.format import Cache
from tests import helpers
from tests.media import videos
from tests.media.test_geometry import averages, drawn_size, kept


def draw_media(root, draw, count):
    """Images, and clips of five frames, with masks of other resolutions; sizes of the media by key, masks by key."""
    sizes, masks = {}, {}
    for folder in ("photos", "masks"):
        (root / folder).mkdir()
    for number in range(count):
        key, size, factor = f"p{number}", drawn_size(draw, 300), draw.choice([1, 2, 3])
        shape = size[1] * factor, size[0] * factor
        values = np.random.default_rng(number)
        frames = 5 if number % 5 == 0 and min(size) >= 16 else 1  # FFV1 takes no smaller ones
        pixels = list(values.integers(0, 256, (frames, size[1], size[0], 3), dtype=np.uint8))
        drawn = list(values.integers(0, 2, (frames, *shape), dtype=np.uint8) * 255)
        sizes[key], masks[key] = size, drawn
        if frames > 1:
            videos.write_video(root / "photos" / f"{key}.mkv", pixels, codec="ffv1", pix_fmt="bgr0", rate=16)
            videos.write_frames(root / "masks" / key, drawn)
        else:
            Image.fromarray(pixels[0]).save(root / "photos" / f"{key}.{draw.choice(['png', 'jpg', 'webp'])}")
            Image.fromarray(drawn[0]).save(root / "masks" / f"{key}.png")
    return sizes, masks


def wanted_mask(size, bucket, masks):
    """By latent frame (here the first frame, and the mean of the four others) the average of every cell."""
    height, width = masks[0].shape
    across, down = (float(part) for part in kept(size, bucket))
    edges = ((1 - across) / 2 * width, (1 - down) / 2 * height, (1 + across) / 2 * width, (1 + down) / 2 * height)
    cells = [averages(mask / 255, *edges, (bucket[1] // 8, bucket[0] // 8)) for mask in masks]
    return np.stack([cells[0], *([np.mean(cells[1:], axis=0)] if len(cells) > 1 else [])])


def prepare_and_check(pipeline, root, seed, count, resolution):
    sizes, masks = draw_media(root, random.Random(seed), count)
    helpers.prepare(pipeline, root, f"data.resolution={resolution}", "data.clips.frames=[5]")
    cache = Cache(root / "cache")
    found = {entry.origin: entry for entry in cache.entries()}
    assert sorted(found) == sorted(sizes)
    for key, entry in found.items():
        assert cache.latents(entry).shape == entry.shape
        bucket = entry.shape[3] * 8, entry.shape[2] * 8
        mask = cache.mask(entry)[0].numpy()
        np.testing.assert_allclose(mask, wanted_mask(sizes[key], bucket, masks[key]), rtol=0, atol=1e-5)


def test_media_of_drawn_sizes_are_prepared(pipeline, tmp_path):
    prepare_and_check(pipeline, tmp_path, 0, 10, 79)


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [79, 108, 116, 144, 172])
def test_200_media_of_drawn_sizes_are_prepared(pipeline, tmp_path, resolution):
    prepare_and_check(pipeline, tmp_path, resolution, 40, resolution)
