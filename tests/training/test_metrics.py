"""Losses by noise level, against the loss of the samples in each band alone."""

import random

import pytest
import torch

from mpp.core.loss import MaskedPriorLoss
from mpp.training.metrics import BANDS, LossMetrics
from mpp.training.step import StepOutput


def drawn(count, loss, draw):
    """A step's output with drawn predictions, masks and noise levels; some samples have nothing to preserve."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    pred, target, prior = (torch.randn(count, 3, 1, 4, 5, generator=generator) for _ in range(3))
    mask = torch.rand(count, 1, 1, 4, 5, generator=generator).round(decimals=1)
    mask[draw.randrange(count)] = draw.choice([0.0, 1.0])
    weights = loss.weights(mask)
    sigma = torch.tensor([draw.choice([draw.random(), 0.0, 1.0, draw.randrange(BANDS) / BANDS]) for _ in range(count)])
    prior = prior if loss.prior_weight > 0 else None
    sums = loss.sums(pred, target, weights, prior)
    return mask, StepOutput(sums, weights, weights.prior, pred, target, sigma, prior, count)


@pytest.mark.parametrize("seed", range(12))
def test_a_bands_losses_are_those_of_its_samples_alone(seed):
    draw = random.Random(seed)
    loss = MaskedPriorLoss(
        prior_weight=draw.choice([0.0, 0.7]),
        prior_threshold=draw.choice([None, 0.3]),
        normalization=draw.choice(["global", "per_sample"]),
        area_scale_beta=draw.choice([0.0, 0.5]),
    )
    measured, rows = LossMetrics(loss), []
    for _ in range(draw.randint(1, 4)):
        mask, output = drawn(draw.randint(1, 5), loss, draw)
        measured.update(output)
        rows += [
            (float(output.sigma[n]), *(x[n : n + 1] for x in (output.pred, output.target, mask)),
             None if output.prior is None else output.prior[n : n + 1])
            for n in range(len(output.pred))
        ]  # fmt: skip
    found = {name: value for name, value in measured.compute().items() if "/" in name}
    expected = {}
    for band in range(BANDS):
        low, high = band / BANDS, (band + 1) / BANDS
        own = [row[1:] for row in rows if low <= row[0] < high or (row[0] == high == 1)]
        if own:
            pred, target, mask = (torch.cat([row[n] for row in own]) for n in range(3))
            prior = None if own[0][3] is None else torch.cat([row[3] for row in own])
            terms = loss(pred.double(), target.double(), mask.double(), None if prior is None else prior.double())
            expected[f"sigma_{low:.2f}-{high:.2f}/target_loss"] = float(terms.target)
            if prior is not None:
                expected[f"sigma_{low:.2f}-{high:.2f}/prior_loss"] = float(terms.prior)
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)
