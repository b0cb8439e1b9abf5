import math
import random
from bisect import bisect_left, bisect_right
from statistics import NormalDist

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from mpp.core.flow import EmpiricalShift, LinearShift, SigmaLaw, interpolate, velocity

UNIFORM = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STRATIFIED = (torch.arange(20_000) + UNIFORM[:20_000]) / 20_000
LTX2 = SigmaLaw("stretched_logit_normal", shift=LinearShift(1024, 0.95, 4096, 2.05))


def test_interpolation_ends_at_latents_and_noise():
    latents, noise = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4)
    assert torch.equal(interpolate(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(2)), noise)


def test_each_sample_has_its_own_sigma():
    latents, noise = torch.zeros(3, 1, 1, 2, 2), torch.ones(3, 1, 1, 2, 2)
    got = interpolate(latents, noise, torch.tensor([0.1, 0.5, 0.9]))
    assert got[:, 0, 0, 0, 0].tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_one_euler_step_of_diffusers_with_the_true_velocity_lands_on_the_latents():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents, noise = torch.randn(2, 4, 1, 3, 3), torch.randn(2, 4, 1, 3, 3)
    for index in (0, 4, 9):
        scheduler._step_index = index
        sigma, following = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        noisy = interpolate(latents, noise, sigma.repeat(2))
        stepped = scheduler.step(velocity(latents, noise), scheduler.timesteps[index], noisy).prev_sample
        torch.testing.assert_close(stepped, interpolate(latents, noise, following.repeat(2)))


def test_static_shift_is_diffusers_schedule():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=1000)
    level = torch.arange(1, 1001, dtype=torch.float64) / 1000
    got = SigmaLaw(shift=3.0).quantile(level, 100)
    torch.testing.assert_close(got, scheduler.sigmas[:1000].flip(0).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6000])
def test_resolution_dependent_shifts_are_diffusers_own(tokens):
    flux = math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert LinearShift()(tokens) == pytest.approx(flux, rel=1e-12)
    qwen = math.exp(calculate_shift(tokens, 256, 8192, 0.5, 0.9))
    assert LinearShift(max_tokens=8192, max_mu=0.9)(tokens) == pytest.approx(qwen, rel=1e-12)
    assert EmpiricalShift(28)(tokens) == pytest.approx(math.exp(compute_empirical_mu(tokens, 28)), rel=1e-12)


def test_larger_samples_get_more_noise():
    law = SigmaLaw("logit_normal", shift=LinearShift())
    assert law.quantile(UNIFORM, 4096).mean() > law.quantile(UNIFORM, 256).mean() + 0.05


def test_logit_normal_has_the_moments_of_sampling_it():
    got = SigmaLaw("logit_normal", mean=0.3, std=0.8).quantile(UNIFORM, 1)
    normal = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.sigmoid(0.3 + 0.8 * normal)
    assert float(got.mean()) == pytest.approx(float(want.mean()), abs=2e-3)
    assert float(got.std()) == pytest.approx(float(want.std()), abs=2e-3)


def lightricks(normal, mu, std):
    """ShiftedLogitNormalTimestepSampler's sigma of a standard normal number, in plain Python."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    first, last = sigmoid(mu - 2.5758 * std), sigmoid(mu + 3.0902 * std)
    stretched = (sigmoid(normal * std + mu) - first) / (last - first)
    reflected = stretched if stretched >= 1e-3 else 2e-3 - stretched
    return min(max(reflected, 0.0), 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_stretched_law_is_that_of_lightricks_trainer(seed):
    drawn = random.Random(seed)
    tokens, std, mean, share = drawn.randint(1, 20_000), drawn.uniform(0.4, 2), drawn.gauss(0, 0.5), drawn.random()
    law = SigmaLaw("stretched_logit_normal", mean, std, LTX2.shift, uniform_share=share)
    count = 5_000
    mu = mean + 0.95 + (2.05 - 0.95) / (4096 - 1024) * (tokens - 1024)
    sigmas = sorted(lightricks(NormalDist().inv_cdf((k + 0.5) / count), mu, std) for k in range(count))
    assert float(law.cdf(torch.tensor([1e-3], dtype=torch.float64), tokens)) == 0
    levels = [drawn.random() for _ in range(50)]
    for level, sigma in zip(levels, law.quantile(torch.tensor(levels).double(), tokens).tolist(), strict=True):
        uniform = share * (sigma - 1e-3) / (1 - 1e-3)
        below, reached = (
            uniform + (1 - share) * found / count
            for found in (bisect_left(sigmas, sigma - 1e-12), bisect_right(sigmas, sigma + 1e-12))
        )
        assert below - 2 / count <= level <= reached + 2 / count  # two monotone pieces, each to one of the count


def test_draws_of_the_stretched_law_are_those_of_sampling_it_as_lightricks_does():
    drawn, count = random.Random(0), 5_000
    tokens = drawn.randint(1_000, 15_000)
    mu = 0.95 + (2.05 - 0.95) / (4096 - 1024) * (tokens - 1024)
    theirs = sorted(
        lightricks(drawn.gauss(0, 1), mu, 1) if drawn.random() > 0.1 else 1e-3 + (1 - 1e-3) * drawn.random()
        for _ in range(count)
    )
    keys = [f"sample{n}" for n in range(count)]
    ours = LTX2.draw(keys, 7, 3, tokens)
    assert torch.equal(LTX2.draw(keys[::-1], 7, 3, tokens).flip(0), ours)
    sampled = torch.tensor(theirs, dtype=torch.float64)
    reached = torch.searchsorted(ours.double().sort().values, sampled, right=True) / count
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    apart = (reached - steps)[sampled < 1].abs().max()
    assert float(apart) < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov at 0.1 %


def test_large_clips_of_ltx2_learn_low_noise():
    levels = torch.tensor([0.01, 0.05, 0.25, 0.5], dtype=torch.float64)
    want = torch.tensor([0.08, 0.36, 0.81, 0.91], dtype=torch.float64)
    torch.testing.assert_close(LTX2.quantile(levels, 12_288), want, rtol=0, atol=5e-3)
    huge = LTX2.quantile(levels, 2**20)  # float32 made NaN of it
    torch.testing.assert_close(huge, want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("law", [SigmaLaw(shift=12.0), SigmaLaw("logit_normal", shift=3.0, mean=-0.5), LTX2])
@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.2, 0.4)])
def test_a_range_keeps_the_shape_of_the_law_as_rejection_does(law, low, high):
    everything = law.quantile(STRATIFIED, 1)
    rejected = everything[(everything >= low) & (everything <= high)]
    ranged = SigmaLaw(law.distribution, law.mean, law.std, law.shift, low, high).quantile(STRATIFIED, 1)
    assert float(ranged.min()) >= low
    assert float(ranged.max()) <= high
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(ranged, levels), torch.quantile(rejected, levels), rtol=0, atol=6e-3)


def test_cdf_inverts_the_quantile():
    level = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for law in (SigmaLaw("logit_normal", shift=5.0, mean=0.2), LTX2):
        torch.testing.assert_close(law.cdf(law.quantile(level, 9), 9), level)


def test_the_ends_of_the_law_are_finite():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for law in (SigmaLaw(), SigmaLaw("logit_normal", shift=3.0), LTX2):
        got = law.quantile(ends, 1)
        assert torch.isfinite(got).all()
        assert 0 <= float(got.min()) <= float(got.max()) <= 1


@pytest.mark.parametrize(
    "bad",
    [
        {"std": 0.0},
        {"shift": 0.0},
        {"min_sigma": 0.5, "max_sigma": 0.5},
        {"min_sigma": -0.1},
        {"max_sigma": 1.1},
        {"max_sigma": 1e-3, "distribution": "stretched_logit_normal"},
        {"uniform_share": -0.1},
        {"uniform_share": 1.1},
        {"uniform_share": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"sigma.{next(iter(bad))}"):
        SigmaLaw(**bad)
