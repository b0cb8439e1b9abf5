import itertools
import random

import pytest
import torch

from mpp.core.loss import LossSums, MaskedPriorLoss
from tests import reference
from tests.helpers import unchecked_error


def settings(number):
    """Random settings, every combination of mode and normalisation in turn."""
    chance = random.Random(number)
    modes = list(itertools.product([None, 0.1, 0.4], ["global", "per_sample"], ["mse", "huber", "l1"]))
    threshold, normalization, error = modes[number % len(modes)]
    return {
        "prior_weight": chance.choice([0.0, 0.5, 1.0, 3.0]),
        "prior_threshold": threshold,
        "mask_gamma": chance.choice([0.7, 1.0, 2.0]),
        "mask_min_weight": chance.choice([0.0, 0.05, 0.3]),
        "normalization": normalization,
        "mask_blur": chance.choice([0, 0, 3]),
        "area_scale_beta": chance.choice([0.0, 0.5]),
        "error": error,
        "huber_delta": chance.choice([0.5, 1.0]),
    }


def case(number, dtype=torch.float64):
    """Random latents and masks; some masks empty, full, or tiered; images and videos."""
    random_ = torch.Generator().manual_seed(number)
    b, c = 1 + number % 3, 1 + number % 4
    drawn = torch.randint(1, 5, (3,), generator=random_).tolist()  # also a single cell or frame
    cells = tuple(drawn[number % 2 :])  # a video, or an image without a frame axis
    pred, target, prior = (torch.randn(b, c, *cells, generator=random_, dtype=torch.float64).to(dtype) for _ in "abc")
    mask = torch.rand(b, 1, *cells, generator=random_, dtype=torch.float64)
    for sample in range(b):
        kind = (number + sample) % 5
        if kind == 0:
            mask[sample] = 0
        elif kind == 1:
            mask[sample] = 1
        elif kind == 2:
            mask[sample] = (mask[sample] * 3).floor() / 2
    return pred, target, mask, prior


def oracle(pred, target, mask, prior, s):
    def video(tensor):
        return (tensor if tensor.ndim == 5 else tensor.unsqueeze(2)).double().tolist()

    masks = [sample[0] for sample in video(mask)]
    prior = None if prior is None else video(prior)
    return reference.loss(video(pred), video(target), masks, prior, s)


@pytest.mark.parametrize("number", range(18))
def test_loss_matches_plain_loops(number):
    s, (pred, target, mask, prior) = settings(number), case(number)
    prior = None if number % 7 == 0 else prior
    got = MaskedPriorLoss(**s)(pred, target, mask, prior)
    want = oracle(pred, target, mask, prior, s)
    assert [float(got.total), float(got.target), float(got.prior)] == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("number", range(18))
def test_low_precision_inputs_are_reduced_in_float32(number):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number // 3 % 3]  # each with each kind of error
    s, (pred, target, mask, prior) = settings(number), case(number, dtype)
    got = MaskedPriorLoss(**s)(pred, target, mask.float(), prior)
    want = oracle(pred, target, mask.float(), prior, s)
    assert got.total.dtype == torch.float32
    assert [float(got.total), float(got.target), float(got.prior)] == pytest.approx(want, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("number", range(18))
def test_gradients_equal_finite_differences(number):
    s, (pred, target, mask, prior) = settings(number), case(number)
    loss = MaskedPriorLoss(**{**s, "error": "mse" if s["error"] == "l1" else s["error"]})
    pred.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p: loss(p, target, mask, prior).total, (pred,), eps=1e-6, atol=1e-6)


def test_no_gradient_reaches_target_mask_or_prior():
    pred, target, mask, prior = (t.requires_grad_(True) for t in case(4))
    MaskedPriorLoss(prior_weight=1.0)(pred, target.detach(), mask.detach(), prior).total.backward()
    assert pred.grad is not None
    assert prior.grad is None


@pytest.mark.parametrize("normalization", ["global", "per_sample"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_empty_region_gives_zero_never_nan(normalization, value):
    pred, target, _, prior = case(1)
    pred.requires_grad_(True)
    mask = torch.full_like(pred[:, :1], value).detach()
    terms = MaskedPriorLoss(prior_weight=1.0, normalization=normalization)(pred, target, mask, prior)
    terms.total.backward()
    assert torch.isfinite(pred.grad).all()
    assert (terms.prior if value == 1 else terms.target).detach() == 0
    assert (terms.target if value == 1 else terms.prior).detach() > 0


@pytest.mark.parametrize("normalization", ["global", "per_sample"])
def test_a_tiny_region_counts_in_full(normalization):
    """One cell of hardly any weight is its region's whole mean."""
    pred, target, prior = (torch.full((1, 2, 1, 8, 8), value, dtype=torch.float64) for value in (0.0, 3.0, 2.0))
    loss = MaskedPriorLoss(1.0, normalization=normalization)
    for rest, cell, learned in ((0.0, 1e-5, True), (1.0, 1 - 1e-5, False)):
        mask = torch.full((1, 1, 1, 8, 8), rest, dtype=torch.float64)
        mask[..., 3, 4] = cell
        terms = loss(pred, target, mask, prior)
        assert float(terms.target if learned else terms.prior) == pytest.approx(9 if learned else 4)


def test_full_mask_is_plain_flow_matching():
    pred, target, mask, prior = case(3)
    terms = MaskedPriorLoss(prior_weight=2.0, normalization="per_sample")(pred, target, torch.ones_like(mask), prior)
    torch.testing.assert_close(terms.total, torch.nn.functional.mse_loss(pred, target))


def test_no_mask_is_the_plain_mean():
    pred, target, _, prior = case(5)
    for kind, plain in (("mse", torch.nn.functional.mse_loss), ("l1", torch.nn.functional.l1_loss)):
        got = MaskedPriorLoss(prior_weight=1.0, error=kind, area_scale_beta=0.5)(pred, target, None, prior)
        torch.testing.assert_close(got.total, plain(pred, target))


def test_prior_weight_is_independent_of_the_mask_area():
    pred, target = torch.zeros(1, 2, 1, 10, 10), torch.ones(1, 2, 1, 10, 10)
    for side in (1, 5, 9):
        mask = torch.zeros(1, 1, 1, 10, 10)
        mask[..., :side] = 1
        terms = MaskedPriorLoss(prior_weight=0.5)(pred, target, mask, 2 * target)
        assert float(terms.target) == pytest.approx(1)
        assert float(terms.prior) == pytest.approx(0.5 * 4)


def test_a_threshold_without_prior_weight_changes_nothing_bit_for_bit():
    pred, target, mask, prior = (t.float() for t in case(8))
    plain = MaskedPriorLoss(mask_gamma=0.7)(pred, target, mask)
    with_threshold = MaskedPriorLoss(mask_gamma=0.7, prior_threshold=0.4)(pred, target, mask, prior)
    assert torch.equal(plain.total, with_threshold.total)
    assert with_threshold.prior == 0


@pytest.mark.parametrize("normalization", ["global", "per_sample"])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_sums_of_parts_give_the_loss_of_the_whole(normalization, threshold):
    loss = MaskedPriorLoss(1.5, threshold, normalization=normalization, area_scale_beta=0.5, mask_min_weight=0.1)
    pred, target, mask, prior = case(2)
    assert len(pred) == 3
    whole = loss(pred, target, mask, prior)
    halves = (slice(0, 1), slice(1, 3))
    weights = [loss.weights(mask[s]) for s in halves]
    parts = [loss.sums(pred[s], target[s], w, prior[s]) for s, w in zip(halves, weights, strict=True)]
    together = loss.terms(parts[0] + parts[1])
    torch.testing.assert_close(together.total, whole.total)
    over = [loss.normalizers(w, pred.shape[1]) for w in weights]
    added = sum(float(loss.terms(part, over[0] + over[1]).total) for part in parts)
    assert added == pytest.approx(float(whole.total), rel=1e-12)
    assert torch.equal(LossSums(*parts[0].stacked()).stacked(), parts[0].stacked())


def test_needs_prior_names_samples_with_a_cell_to_preserve():
    masks = torch.stack([torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2)])
    assert MaskedPriorLoss(1.0).weights(masks).needs_prior().tolist() == [False, True, True]
    assert MaskedPriorLoss(1.0, 0.1).weights(masks).needs_prior().tolist() == [False, True, False]
    off = MaskedPriorLoss(0.0, 0.1)
    assert off.weights(masks).needs_prior().tolist() == [False, False, False]
    assert off.split(off.weights(masks)).needs_prior().tolist() == [False, True, False]


def test_one_cell_of_many_calls_for_the_prior():
    masks = torch.ones(3, 1, 1, 64, 64)
    masks[1, ..., 5, 7], masks[2, ..., 5, 7] = 0.0, 0.999
    assert MaskedPriorLoss(1.0).weights(masks).needs_prior().tolist() == [False, True, True]
    assert MaskedPriorLoss(1.0, 0.1).weights(masks).needs_prior().tolist() == [False, True, False]


BAD = {
    "prior_weight": [-0.1, float("nan"), float("inf"), "1", True],
    "prior_threshold": [0, 0.0, 1.0, -1, 2, "a", float("nan")],
    "mask_gamma": [0.0, -1, float("nan")],
    "mask_min_weight": [-0.1, 1.0, 2],
    "mask_blur": [2, -1, 1.5],
    "area_scale_beta": [-1],
    "normalization": ["batch", None],
    "error": ["l2"],
    "huber_delta": [0],
}


def test_settings_out_of_range_are_refused_by_name_and_value():
    for name, value in ((name, value) for name, values in BAD.items() for value in values):
        message = unchecked_error(MaskedPriorLoss, **{name: value})
        assert message.startswith(f"ValueError: loss.{name} must be ")
        assert message.endswith(f"got {value!r}")


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"prior_weight.*mask_gamma"):
        MaskedPriorLoss(prior_weight=-1, mask_gamma=0)


def test_shapes_that_do_not_match_are_refused_with_both_shapes():
    x, mask, loss = torch.zeros(2, 3, 1, 4, 4), torch.ones(2, 1, 1, 4, 4), MaskedPriorLoss(1.0)
    for shape in [(2, 1, 1, 4, 5), (1, 1, 1, 4, 4), (2, 1, 2, 4, 4)]:
        message = unchecked_error(loss, x, x, torch.ones(shape))
        assert message.startswith(f"ValueError: mask {shape} does not match latents (2, 3, 1, 4, 4)")
    for inputs, start in [
        ((x, x, mask, x[:1]), "prior has shape (1, 3, 1, 4, 4), pred has (2, 3, 1, 4, 4)"),
        ((x, x[:, :1], None), "target has shape (2, 1, 1, 4, 4), pred has (2, 3, 1, 4, 4)"),
        ((x[0, 0], x, None), "pred has shape (batch, channels, height, width) or"),
        ((x, x, torch.ones(2, 4, 4)), "a mask has shape (batch, 1, height, width) or"),
    ]:
        assert unchecked_error(loss, *inputs).startswith(f"ValueError: {start}")


def test_advice_names_each_setting_once_with_its_remedy():
    assert len(MaskedPriorLoss(1.0, mask_min_weight=0.1).advice()) == 2
    assert any("normalization=per_sample" in line for line in MaskedPriorLoss(1.0).advice())
    assert any("no effect" in line for line in MaskedPriorLoss(0.0, 0.1).advice())
    assert MaskedPriorLoss(1.0, 0.1, normalization="per_sample").advice() == []
    assert MaskedPriorLoss(0.0, mask_min_weight=0.05).advice() == []
