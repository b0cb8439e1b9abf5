"""The images of regions at the start of a run: they show what the loss computes."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.core.loss import MaskedPriorLoss
from mpp.media.lettering import font_size, line_height
from mpp.training.regions import region_sheet, region_strip
from tests import reference
from tests.reporting.drawn import Drawn, smooth

LEARNED, PRESERVED = (213, 94, 0), (0, 114, 178)


def panel(strip, number, side):
    """A panel of a strip of square images, without its label."""
    size = font_size(side)
    left, top = number * (side + size // 2), 2 * line_height(size)
    return np.asarray(strip)[top : top + side, left : left + side].astype(float)


@pytest.mark.parametrize("seed", range(8))
def test_the_panels_are_the_weights_of_the_loss(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(8, 8, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    draw = lambda low, high: low + (high - low) * float(torch.rand((), generator=generator))  # noqa: E731
    loss = MaskedPriorLoss(
        prior_weight=float(seed % 4 > 0),
        prior_threshold=draw(0.05, 0.6) if seed % 2 else None,
        mask_gamma=draw(0.3, 2),
        mask_min_weight=draw(0, 0.3),
        mask_blur=3 * (seed % 3 == 0),
    )
    drawn = Drawn(tmp_path / "cache").add("a", mask=mask, image=smooth(seed, 64, 64))
    cache = drawn.write()
    strip = region_strip(cache, drawn.entries[0], loss, drawn.axis)
    fields = reference.weights(
        mask[None].tolist(),
        threshold=loss.prior_threshold,
        gamma=loss.mask_gamma,
        floor=loss.mask_min_weight,
        kernel=loss.mask_blur,
        prior_applies=loss.prior_weight > 0,
    )
    for number, (field, colour) in enumerate(zip(fields, ((255,) * 3, LEARNED, PRESERVED), strict=True), 2):
        got = panel(strip, number, 256)[16::32, 16::32]
        want = np.array(field)[0][..., None] * colour
        assert np.abs(got - want).max() <= 0.5 + 1e-3
    _, target, prior = (np.array(field)[0] for field in fields)
    shown = panel(strip, 1, 256)[16::32, 16::32]
    assert (shown[..., 0] - shown[..., 2] > 40)[target > 0.9].all()
    assert (shown[..., 2] - shown[..., 0] > 30)[prior > 0.9].all()


def test_layers_and_samples_stand_below_each_other_above_one_legend(tmp_path):
    drawn = Drawn(tmp_path / "cache", layered=True)
    masks = torch.stack([torch.full((4, 4), value) for value in (1.0, 0.25, 0.75)])
    drawn.add("a", mask=masks, image=[smooth(n, 32, 32) for n in range(3)])
    cache = drawn.write()
    loss = MaskedPriorLoss(prior_weight=1.0)
    strip = region_strip(cache, drawn.entries[0], loss, drawn.axis)
    high = 2 * line_height(13) + 256
    assert strip.height == 3 * high + 2 * 13
    second = np.asarray(strip)[high + 13 :]
    assert second[2 * line_height(13) + 10, 2 * (256 + 6) + 10].tolist() == [64, 64, 64]
    sheet = region_sheet([strip, strip], loss)
    assert sheet.height == 2 * strip.height + line_height(13) + 4 * 13
    assert sheet.width == strip.width + 2 * 13


def test_large_images_become_smaller(tmp_path):
    drawn = Drawn(tmp_path / "cache", side=2048).add("a", mask=torch.ones(8, 16), image=Image.new("RGB", (1600, 800)))
    strip = region_strip(drawn.write(), drawn.entries[0], MaskedPriorLoss(), drawn.axis)
    assert strip.size == (5 * 512 + 4 * (font_size(512) // 2), 256 + 2 * line_height(font_size(512)))
