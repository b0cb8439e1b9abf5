"""The step in plain torch: what it asks for, and what it makes of the answers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpp.core.flow import Noisy
from mpp.core.loss import MaskedPriorLoss
from mpp.training.passes import Predictions
from mpp.training.step import MaskedPriorStep, Position
from mpp.training.teacher import Teacher
from tests.helpers import batch, four_masks

LOSSES = [
    MaskedPriorLoss(1.0, 0.1, normalization="per_sample"),
    MaskedPriorLoss(0.5, None, 0.7, mask_blur=3),
    MaskedPriorLoss(0.0, 0.1, mask_min_weight=0.05),
]


class Answers:
    """Stands for both passes: remembers what was asked, answers with simple tensors."""

    def __init__(self):
        self.asked = []

    def __call__(self, noisy, conditioning, samples):
        self.asked.append((noisy, tuple(samples)))
        return Predictions(noisy.latents / 3 if samples else None, noisy.latents / 2)


@pytest.mark.parametrize(("loss", "samples"), list(zip(LOSSES, [(0, 2), (0, 2), ()], strict=True)))
def test_one_object_is_asked_once_for_both_predictions_and_the_loss_is_the_public_one(architecture, loss, samples):
    answers, data = Answers(), batch(four_masks())
    output = MaskedPriorStep(architecture, loss, answers)(data, Position(0, 3))
    ((noisy, asked),) = answers.asked
    assert asked == samples
    assert output.taught == len(samples)
    want = loss(noisy.latents / 2, noisy.target, data.mask, noisy.latents / 3 if samples else None)
    assert torch.equal(loss.terms(output.sums).total, want.total)
    assert torch.equal(output.kept, output.weights.prior)


@pytest.mark.parametrize("loss", LOSSES)
def test_measuring_asks_the_teacher_also_where_training_has_no_prior(architecture, loss):
    answers, data = Answers(), batch(four_masks())
    step = MaskedPriorStep(architecture, loss, answers)
    outputs = list(step.measure(data, 7, [0.25, 0.75]))
    assert [noisy.sigma.tolist() for noisy, _ in answers.asked] == [[0.25] * 4, [0.75] * 4]
    assert [samples for _, samples in answers.asked] == [(0, 2)] * 2
    for output, (noisy, _) in zip(outputs, answers.asked, strict=True):
        want = loss(noisy.latents / 2, noisy.target, data.mask, noisy.latents / 3)
        assert torch.equal(loss.terms(output.sums).total, want.total)
    again = list(step.measure(data, 7, [0.25, 0.75]))
    for output, other in zip(outputs, again, strict=True):
        assert torch.equal(output.sums.stacked(), other.sums.stacked())
        assert output.kept[0].any()
        assert bool(output.weights.prior.any()) == (loss.prior_weight > 0)
    assert not torch.equal(answers.asked[0][0].target, answers.asked[1][0].target)  # each level has noise of its own


class Ops(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


WAITING = {"aten::index.Tensor", "aten::index_put_", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_a_teacher_of_some_samples_asks_the_device_nothing(monkeypatch, architecture):
    random, seen = torch.Generator().manual_seed(0), []

    def velocity(self, transformer, latents, sigma, conditioning):
        seen.append((latents, sigma, conditioning.text))
        return 2 * latents

    monkeypatch.setattr(type(architecture), "velocity", velocity)
    data, sigma = batch(torch.ones(5, 1, 1, 4, 4)), torch.rand(5, generator=random)
    noisy = Noisy(data.latents, sigma, data.latents)
    for rows in ((0,), (4, 1), (0, 2, 3)):
        with Ops() as ops:
            found = Teacher().predict(architecture, torch.nn.Linear(1, 1), noisy, data.conditioning, rows)
        assert ops.names.isdisjoint(WAITING), ops.names & WAITING
        want = torch.zeros_like(noisy.latents)
        want[list(rows)] = 2 * noisy.latents[list(rows)]
        assert torch.equal(found, want)
        whole = (noisy.latents, sigma, data.conditioning.text)
        assert all(torch.equal(part, of[list(rows)]) for part, of in zip(seen.pop(), whole, strict=True))


def test_without_levels_the_quantiles_of_the_law_are_measured(architecture):
    answers, data = Answers(), batch(four_masks())
    assert len(list(MaskedPriorStep(architecture, LOSSES[0], answers).measure(data, 0))) == 4
    tokens = architecture.latents.tokens(data.latents.shape)
    shares = architecture.sigma.cdf(torch.stack([noisy.sigma[0] for noisy, _ in answers.asked]), tokens)
    torch.testing.assert_close(
        shares, torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64), rtol=0, atol=1e-5
    )
