"""What every base must pass: what its adapter learns is what it would learn on the dequantised weights."""

from copy import deepcopy

import torch

from mpp.lora.adapters import Adapter, adapters_off, inject
from mpp.memory.bases import dequantise
from mpp.models.contract import Architecture
from tests.helpers import randomise_adapter


def dequantised(arch: Architecture, transformer, plain):
    """The unquantised transformer with the quantised one's weights in place of its own."""
    reference = deepcopy(plain)
    for name, linear in arch.quantisable(plain):
        reference.get_submodule(name).weight.data = dequantise(transformer.get_submodule(name)).to(linear.weight.dtype)
    return reference


def gradients(arch, transformer, noisy, data, low=False):
    """Prediction and gradients of the noisy latents and of each adapter tensor, of a fixed sum over the prediction."""
    latents = noisy.latents.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        prediction = arch.velocity(transformer, latents, noisy.sigma, data.conditioning)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1))
    (prediction.float() * weights).sum().backward()
    named = {name: parameter.grad for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    return {"prediction": prediction.detach(), "latents": latents.grad, **named}


def check(arch, transformer, plain, noisy, data, *, kind="lora", low=False, exact=True):
    """The gate, for a transformer without adapter and the unquantised one.

    Args:
        arch: The family.
        transformer: Quantised.
        plain: Not quantised.
        noisy: Noisy latents and sigmas of a batch.
        data: The batch.
        kind: Of the adapter.
        exact: The prediction is bitwise that of the dequantised weights; else as near as gradients.
        low: Under autocast to bfloat16, whose cache of casts sums gradients in another order.
    """
    reference = dequantised(arch, transformer, plain)
    for model in (transformer, reference):
        inject(model, Adapter(kind=kind, rank=2, alpha=2), arch.lora_targets, seed=0)
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad(), adapters_off(transformer), torch.autocast("cpu", torch.bfloat16, enabled=low):
        prior = arch.velocity(transformer, noisy.latents, noisy.sigma, data.conditioning)
    start = gradients(arch, transformer, noisy, data, low)
    assert torch.equal(start["prediction"], prior), "the student is not its teacher at the start"
    for model in (transformer, reference):
        model.zero_grad()
        randomise_adapter(model)
    ours, theirs = (gradients(arch, model, noisy, data, low) for model in (transformer, reference))
    assert ours.keys() == theirs.keys()
    assert not exact or torch.equal(ours["prediction"], theirs["prediction"]), "the prediction is another"
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), f"{name} has a gradient on one base alone"
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                ours[name], gradient, rtol=0, atol=(0.02 if low else 2e-5) * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
