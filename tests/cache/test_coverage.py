"""Coverage and cost are one source for the run's banner and the page."""

import pytest
import torch

from mpp.cache.coverage import Coverage, SampleCoverage, cover, measure_coverage, mode_of, step_cost
from mpp.core.loss import MaskedPriorLoss
from tests import reference
from tests.reporting.drawn import Drawn, disc

LOSSES = {
    "threshold": MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.4, normalization="per_sample"),
    "continuous": MaskedPriorLoss(prior_weight=1.0, mask_gamma=0.7, normalization="per_sample"),
    "masked": MaskedPriorLoss(mask_min_weight=0.05, mask_blur=3),
}


def oracle(mask, loss):
    """Mean target and prior weight by the loops over cells."""
    _, target, prior = reference.weights(
        mask.tolist(),
        threshold=loss.prior_threshold,
        gamma=loss.mask_gamma,
        floor=loss.mask_min_weight,
        kernel=loss.mask_blur,
        prior_applies=loss.prior_weight > 0,
    )
    means = []
    for field in (target, prior):
        cells = [v for frame in field for row in frame for v in row]
        means.append(sum(cells) / len(cells))
    return means


def entry_of(tmp_path, **changes):
    return Drawn(tmp_path).add("a", **changes).entries[0]


@pytest.mark.parametrize("name", LOSSES)
def test_coverage_of_a_sample_is_the_mean_over_its_cells(tmp_path, name):
    mask = torch.stack([disc(6, 9, 0.3), disc(6, 9, 0.2) * 0.5])
    found = cover(LOSSES[name], mask[None, None], entry_of(tmp_path, mask=mask))
    learn, preserve = oracle(mask, LOSSES[name])
    assert found.learn == pytest.approx(learn, abs=1e-6)
    assert found.preserve == pytest.approx(preserve, abs=1e-6)
    assert found.taught == (name != "masked")
    assert found.lowest == 0


def test_a_white_mask_preserves_nothing_whatever_blurs_it(tmp_path):
    for kernel in (7, 13, 31, 33):
        loss = MaskedPriorLoss(prior_weight=1.0, mask_gamma=0.7, mask_blur=kernel)
        found = cover(loss, torch.ones(1, 1, 1, 6, 9), entry_of(tmp_path, mask=torch.ones(1, 6, 9)))
        assert (found.learn, found.preserve, found.taught) == (1.0, 0.0, False)


def test_a_sample_counts_as_often_as_it_repeats():
    samples = [SampleCoverage(0.2, 0.8, True, 0.1, 3), SampleCoverage(1.0, 0.0, False, None, 1)]
    found = Coverage.of(samples)
    assert found.scanned == 2
    assert (found.learn, found.preserve, found.taught) == pytest.approx((0.4, 0.6, 0.75))
    assert found.lowest == 0.1


def test_without_a_sample_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="no sample"):
        Coverage.of([])


def test_frames_that_the_model_is_given_are_left_out(tmp_path):
    mask = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.ones(4, 4) * 0.5])
    drawn = Drawn(tmp_path).add("a", mask=mask)
    whole = measure_coverage(drawn.cache, drawn.entries, LOSSES["threshold"])
    rest = measure_coverage(drawn.cache, drawn.entries, LOSSES["threshold"], 1)
    assert (whole.learn, whole.preserve, whole.taught) == pytest.approx((0.5, 1 / 3, 1.0))
    assert (rest.learn, rest.preserve, rest.taught, rest.lowest) == pytest.approx((0.75, 0.0, 0.0, 0.5))


@pytest.mark.parametrize(("checkpointing", "student"), [(False, (2.0, 3.5)), (True, (3.0, 4.5))])
def test_the_cost_is_the_teachers_forward_over_the_students_step(checkpointing, student):
    least, most = step_cost(0.5, gradient_checkpointing=checkpointing)
    assert most == pytest.approx((student[0] + 0.5) / student[0])
    assert least == pytest.approx((student[1] + 0.5) / student[1])
    assert step_cost(0.0, gradient_checkpointing=checkpointing) == (1.0, 1.0)


def test_the_mode_says_what_the_loss_does():
    modes = {name: mode_of(loss) for name, loss in LOSSES.items()}
    assert modes == {
        "threshold": "masked prior preservation, threshold mode",
        "continuous": "masked prior preservation, continuous mode",
        "masked": "masked training without a prior",
    }
