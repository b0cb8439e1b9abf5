import pytest
import torch

from mpp.core.masks import as_mask, blur_mask, process_mask, split_regions
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


def test_samples_the_prior_does_not_apply_to_keep_plain_weights():
    raw = torch.rand(3, 1, 1, 4, 4)
    processed = process_mask(raw, gamma=1.0, min_weight=0.0, blur=0)
    regions = split_regions(raw, processed, threshold=0.5, applies=torch.tensor([True, False, True]))
    assert torch.equal(regions.target[1], processed[1])
    assert regions.prior[1].sum() == 0
    assert regions.prior[0].sum() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_any_dtype_are_clamped(dtype):
    mask = torch.tensor([0, 1, 3]).to(dtype).view(1, 1, 1, 3)
    assert as_mask(mask).flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (1, 2, 3, 4), (1, 2, 1, 3, 4), (1, 1, 1, 1, 3, 4)])
def test_other_shapes_are_refused_with_the_shape(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* got \(" + ", ".join(map(str, shape))):
        as_mask(torch.ones(shape))
