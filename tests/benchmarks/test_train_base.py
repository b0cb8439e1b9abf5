import copy

import pytest
import torch

from benchmarks.phantom_limb.sampling import toy
from benchmarks.phantom_limb.study import BASE
from benchmarks.phantom_limb.train_base import Batches, make_fast, mean_error, rate_at, save, untrained


def test_the_fast_model_computes_what_diffusers_does_up_to_bfloat16():
    architecture = toy(pretrained=str(BASE))
    plain = architecture.load_transformer()
    fast = copy.deepcopy(plain)
    make_fast(fast)
    latents, noise, sigma, conditioning = Batches(architecture, 8, 0, "cpu")()
    noisy = (1 - sigma.view(-1, 1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1, 1) * noise
    expected = architecture.velocity(plain, noisy, sigma, conditioning)
    got = architecture.velocity(fast, noisy, sigma, conditioning)
    assert not torch.equal(got, expected)
    assert (got - expected).square().mean() < 1e-3 * expected.square().mean()


def test_batches_follow_the_seed_and_the_shipped_base_knows_them():
    architecture = toy(pretrained=str(BASE))
    first, again, other = (Batches(architecture, 64, seed, "cpu")() for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first[0], other[0])
    with torch.no_grad():
        assert mean_error(architecture, architecture.load_transformer(), other) < 0.1
        assert mean_error(architecture, untrained(architecture), other) > 0.8


def test_weights_are_saved_in_float16_as_diffusers_reads_them(tmp_path):
    architecture = toy(pretrained=str(tmp_path))
    model = untrained(architecture)
    save(model, architecture, tmp_path)
    architecture.check()
    loaded = dict(architecture.load_transformer().named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter.half().float())


@pytest.mark.parametrize(("step", "share"), [(0, 1 / 200), (199, 1.0), (400, 1.0), (700, 0.5), (999, 1 / 600)])
def test_the_rate_warms_up_holds_and_falls_to_nothing(step, share):
    assert rate_at(step, 1000, 0.4) == pytest.approx(share)
