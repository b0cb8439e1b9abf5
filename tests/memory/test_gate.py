"""Every family trains on every base as on its dequantised weights, and the check of that catches a cut gradient."""

import random

import pytest
import torch

from mpp.core.flow import Noisy, interpolate
from mpp.lora.stack import load_base
from mpp.memory.bases import QUANTISED
from mpp.memory.linear import QuantisedLinear
from tests.families import variants, wan_first
from tests.families.base import architecture, batch
from tests.memory import gate

WAN = next(variant for variant in variants() if variant.name == "WAN 2.1 T2V")


def drawn(arch, variant, seed):
    """A batch of two clips of a drawn size with noise at drawn levels."""
    draw = random.Random(seed)
    cells = (draw.randint(1, 4), draw.randint(1, 4))
    data = batch(arch, variant, arch.load_encoders("cpu"), ("a red box", "a cat by the sea"), cells=cells, seed=seed)
    sigma = torch.tensor([draw.uniform(0.01, 0.6), draw.uniform(0.9, 0.99)])  # on both sides of where experts change
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(seed))
    return Noisy(interpolate(data.latents, noise, sigma), sigma, noise - data.latents), data


@pytest.mark.parametrize("variant", wan_first())
def test_an_adapter_learns_on_a_quantised_base_what_it_learns_on_the_dequantised_one(variant, built):
    arch = architecture(variant, built(variant))
    plain, (noisy, data) = load_base(arch), drawn(arch, variant, len(variant.name))
    for base in QUANTISED:
        gate.check(arch, load_base(arch, base), plain, noisy, data)


@pytest.mark.parametrize("variant", wan_first())
def test_it_does_in_bfloat16_under_autocast_too(variant, built):
    arch = architecture(variant, built(variant), "model.dtype=bfloat16")
    plain, (noisy, data) = load_base(arch), drawn(arch, variant, 100 + len(variant.name))
    for base in QUANTISED:
        gate.check(arch, load_base(arch, base), plain, noisy, data, low=True)


class Cut(torch.autograd.Function):
    """What a frozen layer of torchao's dynamic-activation configurations does: its input gets no gradient."""

    @staticmethod
    def forward(ctx, output):
        return output.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def test_the_check_catches_a_layer_that_passes_no_gradient(built, monkeypatch):
    arch = architecture(WAN, built(WAN))
    plain, quantised, (noisy, data) = load_base(arch), load_base(arch, "int8"), drawn(arch, WAN, 3)
    forward = QuantisedLinear.forward
    monkeypatch.setattr(QuantisedLinear, "forward", lambda layer, input: Cut.apply(forward(layer, input)))
    with pytest.raises(AssertionError, match=r"lora_|latents"):
        gate.check(arch, quantised, plain, noisy, data)


def test_the_check_catches_an_adapter_that_is_on_in_the_teacher(built, monkeypatch):
    arch = architecture(WAN, built(WAN))
    plain, quantised, (noisy, data) = load_base(arch), load_base(arch, "int8"), drawn(arch, WAN, 3)
    forward = QuantisedLinear.forward
    noise = lambda layer, input: forward(layer, input) * (1 if torch.is_grad_enabled() else 1.001)  # noqa: E731
    monkeypatch.setattr(QuantisedLinear, "forward", noise)
    with pytest.raises(AssertionError, match="not its teacher"):
        gate.check(arch, quantised, plain, noisy, data)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        pytest.param(kind, base, marks=() if (kind, base) in (("dora", "nf4"), ("lokr", "fp8")) else pytest.mark.slow)
        for kind in ("rslora", "dora", "lokr", "loha")
        for base in QUANTISED
        if base != "nf4" or kind not in ("lokr", "loha")  # which are refused
    ],
)
def test_every_kind_of_adapter_learns_on_every_base_that_takes_it(kind, base, built):
    arch = architecture(WAN, built(WAN))
    noisy, data = drawn(arch, WAN, len(kind + base))
    gate.check(arch, load_base(arch, base), load_base(arch), noisy, data, kind=kind)
