import random

import pytest
import torch

from mpp.core.loss import MaskedPriorLoss
from mpp.core.masks import NEGLIGIBLE, as_mask, blur_mask, process_mask, split_regions
from tests import reference


def tiers():
    values = torch.tensor([255, 128, 80, 0]) / 255
    return values.view(1, 1, 1, 1, 4)


def test_tiers_give_the_published_table():
    processed = process_mask(tiers(), gamma=0.7, min_weight=0.0, blur=0)
    assert [round(v, 2) for v in processed.flatten().tolist()] == [1.0, 0.62, 0.44, 0.0]
    prior = split_regions(tiers(), processed, threshold=None).prior
    torch.testing.assert_close(prior, 1 - processed, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_blur_matches_plain_loops(kernel):
    mask = torch.rand(2, 1, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(kernel))
    got = blur_mask(mask, kernel)
    for b in range(2):
        for f in range(3):
            want = torch.tensor(reference.blur(mask[b, 0, f].tolist(), kernel), dtype=torch.float64)
            torch.testing.assert_close(got[b, 0, f], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", range(18))
def test_a_constant_stays_exactly_what_it_is_and_rounding_makes_no_region(number):
    chance = random.Random(number)
    dtype = [torch.float32, torch.float64, torch.float16, torch.bfloat16][number % 4]
    value = [1.0, 0.0, chance.random()][number % 3]
    shape = (chance.randint(1, 2), 1, chance.randint(1, 3), chance.randint(1, 9), chance.randint(1, 9))
    mask = torch.full(shape, value).to(dtype)
    raw = as_mask(mask, torch.promote_types(dtype, torch.float32))
    for kernel in (7, 13, 31, 33, 1 + 2 * chance.randint(1, 40)):
        assert torch.equal(blur_mask(raw, kernel), raw)
        loss = MaskedPriorLoss(
            prior_weight=1.0,
            prior_threshold=chance.choice([None, None, 0.1]),
            mask_gamma=chance.choice([0.1, 0.7, 1.0, 3.0]),
            mask_min_weight=chance.choice([0.0, 0.02, 0.05, 0.3]),
            mask_blur=kernel,
        )
        weights = loss.weights(mask)
        unblurred = MaskedPriorLoss(**{**vars(loss), "mask_blur": 0})
        assert torch.equal(weights.target, unblurred.weights(weights.raw).target)
        if value == 1:
            assert (weights.target == 1).all()
            assert (weights.prior == 0).all()
            assert not weights.needs_prior().any()


@pytest.mark.parametrize("kernel", [3, 7, 13])
def test_cells_that_see_nothing_but_white_have_no_prior_and_all_others_have_one(kernel):
    mask = torch.zeros(1, 1, 1, 40, 40)
    mask[..., 10:] = 1
    prior = MaskedPriorLoss(prior_weight=1.0, mask_blur=kernel).weights(mask).prior[0, 0, 0]
    want = reference.weights(
        mask[0].tolist()[0], threshold=None, gamma=1.0, floor=0.0, kernel=kernel, prior_applies=True
    )[2]
    assert torch.equal(prior > 0, torch.tensor(want[0]) > 0)
    assert (prior[:, 10 + kernel // 2 :] == 0).all()
    assert (prior[:, : 10 + kernel // 2] > 0).all()


def test_a_prior_weight_counts_from_a_millionth_on():
    processed = torch.tensor([1 - 2**-24, 1 - 2 * NEGLIGIBLE, 1 + 2**-23]).view(1, 1, 1, 1, 3)
    prior = split_regions(processed.clamp(0, 1), processed, threshold=None).prior.flatten()
    assert prior[0] == 0
    assert float(prior[1]) == pytest.approx(2 * NEGLIGIBLE, rel=0.05)
    assert prior[2] == 0


def test_autocast_does_not_round_the_blur():
    mask = torch.rand(1, 1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = blur_mask(mask, 5)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, blur_mask(mask, 5))


def test_blur_keeps_frames_and_samples_apart():
    mask = torch.zeros(2, 1, 2, 5, 5)
    mask[0, 0, 0, 2, 2] = 1
    got = blur_mask(mask, 3)
    assert got[0, 0, 0].sum() > 0
    assert got[0, 0, 1].sum() == 0
    assert got[1].sum() == 0


def test_threshold_is_decided_on_the_raw_mask_before_blur_gamma_and_floor():
    raw = torch.tensor([0.0, 0.09, 0.1, 0.5, 1.0]).view(1, 1, 1, 1, 5)
    processed = process_mask(raw, gamma=0.1, min_weight=0.2, blur=3)
    assert float(processed.min()) > 0.1  # would all pass a threshold on the processed mask
    regions = split_regions(raw, processed, threshold=0.1)
    assert regions.prior.flatten().tolist() == [1, 1, 0, 0, 0]
    assert (regions.target * regions.prior == 0).all()


def test_floor_is_affine_and_full_weight_stays_one():
    processed = process_mask(tiers(), gamma=1.0, min_weight=0.05, blur=0)
    assert processed.flatten().tolist() == pytest.approx([1, 128 / 255 * 0.95 + 0.05, 80 / 255 * 0.95 + 0.05, 0.05])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_any_dtype_are_clamped(dtype):
    mask = torch.tensor([0, 1, 3]).to(dtype).view(1, 1, 1, 3)
    assert as_mask(mask).flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (1, 2, 3, 4), (1, 2, 1, 3, 4), (1, 1, 1, 1, 3, 4)])
def test_other_shapes_are_refused_with_the_shape(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* got \(" + ", ".join(map(str, shape))):
        as_mask(torch.ones(shape))
