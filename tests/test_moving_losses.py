"""What docs/moving.md calls equal: our masked loss against other trainers' formulas, written out in plain Python."""

import math
import random
import re
from itertools import product
from pathlib import Path
from statistics import NormalDist, mean

import pytest
import torch

from mpp.config import build
from tests import helpers

GUIDE = (Path(__file__).parents[1] / "docs/moving.md").read_text(encoding="utf-8")
CHANNELS, FRAMES, HEIGHT, WIDTH = 2, 3, 4, 5


def ours(program, *rows, **values):
    """What the guide's rows of a program say to type, with values for its letters."""
    section = GUIDE[GUIDE.index(f"## From {program}") :]
    words = []
    for theirs in rows:
        cell = next(line for line in section.splitlines() if line.startswith(f"| {theirs}")).split(" | ")[1]
        typed = re.findall(r"((?:loss|model)[\w.]*)=([^\s`,]+)", cell)
        words += [f"{key}={eval(value, {}, values) if is_formula(value) else value}" for key, value in typed]
    return words


def is_formula(text):
    return re.fullmatch(r"(1\+)?[A-Z]", text) is not None


def loss_of(words):
    composed = helpers.config("train", ["data.cache_dir=x", *words])
    return build(composed.loss)


class Drawn:
    """A batch: predictions, targets, the base's predictions and masks, and their errors as lists."""

    def __init__(self, seed, samples, frames=1, *, greys=True):
        drawn = torch.Generator().manual_seed(seed)
        shape = (samples, CHANNELS, frames, HEIGHT, WIDTH)
        self.pred, self.target, self.base = (torch.randn(shape, generator=drawn).double() for _ in range(3))
        values = torch.rand(shape, generator=drawn).double()[:, :1]
        black, white = values < 0.3, values > 0.6
        self.mask = torch.where(black, 0.0, torch.where(white, 1.0, values if greys else 1.0))

    def cells(self, other):
        """Of each sample a list of (squared error, raw mask), a pair for each channel of each cell."""
        errors, masks = (self.pred - other).square(), self.mask.expand_as(self.pred)
        return [
            list(zip(error.flatten().tolist(), mask.flatten().tolist(), strict=True))
            for error, mask in zip(errors, masks, strict=True)
        ]

    def loss(self, words):
        return loss_of(words)(self.pred, self.target, self.mask, self.base).total.item()


def weighted(cells, weigh):
    """Weighted mean, 0 of nothing."""
    total = sum(weigh(m) for _, m in cells)
    return sum(error * weigh(m) for error, m in cells) / total if total > 1e-8 else 0.0


def blissful(batch, w, threshold, gamma, floor, per_sample):
    def processed(m):
        return m**gamma * (1 - floor) + floor

    def target(m):
        return 0.0 if threshold is not None and m < threshold else processed(m)

    def prior(m):
        return 1 - processed(m) if threshold is None else float(m < threshold)

    terms = []
    for other, weigh, factor in ((batch.target, target, 1), (batch.base, prior, w)):
        samples = batch.cells(other)
        if per_sample:
            terms.append(factor * mean(weighted(cells, weigh) for cells in samples))
        else:
            terms.append(factor * weighted([pair for cells in samples for pair in cells], weigh))
    return sum(terms)


@pytest.mark.parametrize(
    ("with_threshold", "per_sample"),
    [pytest.param(*case, marks=pytest.mark.slow if sum(case) else ()) for case in product([True, False], repeat=2)],
)
def test_the_loss_is_that_of_blissful_tuner(with_threshold, per_sample):
    drawn = random.Random(f"{with_threshold} {per_sample}")
    threshold = round(drawn.uniform(0.05, 0.9), 3) if with_threshold else None
    w, gamma, floor = (round(drawn.uniform(0.1, 2), 3) for _ in range(3))
    floor /= 4
    rows = ["`--use_mask_loss`", "`--prior_preservation_weight", "`--mask_gamma", "`--mask_min_weight"]
    rows.append("`--prior_mask_threshold" if with_threshold else "none given")
    words = ours("blissful-tuner", *rows, W=w, T=threshold, G=gamma, M=floor)
    words += ours("blissful-tuner", "`--normalize_per_sample`") if per_sample else ["loss.normalization=global"]
    batch = Drawn(0, 4, FRAMES)
    batch.mask[0], batch.mask[1] = 1.0, 0.0  # nothing is preserved, nothing is learned
    want = blissful(batch, w, threshold, gamma, floor, per_sample)
    assert batch.loss(words) == pytest.approx(want, rel=1e-9)


def onetrainer(batch, floor, w, normalize):
    means = []
    for learned, kept in zip(batch.cells(batch.target), batch.cells(batch.base), strict=True):
        clamped = [min(max(m, floor), 1.0) for _, m in learned]
        inside, outside = (mean(clamped), 1 - mean(clamped)) if normalize else (1, 1)
        pairs = zip(learned, kept, clamped, strict=True)
        means += [mean(e * m / inside + (w * p * (1 - m) / outside if w else 0) for (e, _), (p, _), m in pairs)]
    return mean(means)


@pytest.mark.parametrize(
    ("floor", "w", "normalize"), [(0, 0.7, True), pytest.param(0.1, 0.4, True, marks=pytest.mark.slow), (0, 0, False)]
)
def test_the_loss_is_that_of_onetrainer(floor, w, normalize):
    batch = Drawn(1, 3, greys=floor == 0)  # of images; greys are not equal with a floor, as the guide says
    rows = ["`masked_training`", "`unmasked_weight U`", "`masked_prior_preservation_weight W`"]
    rows.append(f"`normalize_masked_area_loss` {'on' if normalize else 'off'}")
    words = ours("OneTrainer", *rows, U=floor, W=w)
    assert batch.loss(words) == pytest.approx(onetrainer(batch, floor, w, normalize), rel=1e-9)
    if floor:
        grey = Drawn(1, 3)
        assert grey.loss(words) != pytest.approx(onetrainer(grey, floor, w, normalize), rel=1e-3)


def ai_toolkit(batch, least, w):
    every, kept = ([pair for cells in batch.cells(other) for pair in cells] for other in (batch.target, batch.base))
    remapped = [m * (1 - least) + least for _, m in every]
    inside, outside = mean(remapped), 1 - mean(remapped)
    target = mean(e * m / inside for (e, _), m in zip(every, remapped, strict=True))
    return target + (w * mean(e * (1 - m) / outside for (e, _), m in zip(kept, remapped, strict=True)) if w else 0)


@pytest.mark.parametrize(("samples", "w"), [(1, 0.5), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_the_loss_is_that_of_ai_toolkit(samples, w):
    batch = Drawn(2, samples)
    words = ours("ai-toolkit", "(always)", "`mask_min_value V`", "`inverted_mask_prior: true`", V=0.1, W=w)
    assert batch.loss(words) == pytest.approx(ai_toolkit(batch, 0.1, w), rel=1e-9)


def shifted(factor, t):
    return factor * t / (1 + (factor - 1) * t)


@pytest.mark.parametrize(
    ("program", "row"),
    [
        ("OneTrainer", "`timestep_distribution UNIFORM`"),
        pytest.param("OneTrainer", "`timestep_distribution LOGIT_NORMAL`", marks=pytest.mark.slow),
        pytest.param("ai-toolkit", "`timestep_type: sigmoid`", marks=pytest.mark.slow),
    ],
)
def test_the_laws_of_noise_are_those_of_the_guide(program, row):
    drawn = random.Random(row)
    bias, weight, shift = (round(drawn.uniform(0.2, 3), 3) for _ in range(3))
    words = ours(program, row, B=bias, V=weight, S=shift)
    law = build(helpers.config("train", ["model=wan", "data.cache_dir=x", *words]).model).sigma
    levels = [drawn.uniform(0.001, 0.999) for _ in range(200)]
    if "sigmoid" in row:  # 1 - sigmoid(normal)
        want = [1 - 1 / (1 + math.exp(-NormalDist().inv_cdf(1 - level))) for level in levels]
    else:
        base = [1 / (1 + math.exp(-bias - (weight + 1) * NormalDist().inv_cdf(level))) for level in levels]
        want = [shifted(shift, t) for t in (levels if "UNIFORM" in row else base)]
    got = law.quantile(torch.tensor(levels, dtype=torch.float64), 1).tolist()
    assert got == pytest.approx(want, abs=1e-9)
