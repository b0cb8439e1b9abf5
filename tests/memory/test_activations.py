"""What the backward pass needs: kept, recomputed or on the CPU, with the same numbers."""

import random
import weakref

import pytest
import torch

from mpp.core.loss import MaskedPriorLoss
from mpp.memory.activations import ACTIVATIONS, Host, on_the_cpu
from mpp.memory.settings import Memory
from tests.families import base, wan_first
from tests.helpers import batch, four_masks, loss_of, module, randomise_adapter, unchecked_error

PLAIN = MaskedPriorLoss()
PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")


def numbers(arch, data, loss, activations, **settings):
    """Loss and gradients of one step, by name."""
    built = module(arch, loss, memory=Memory(activations=activations), **settings)
    randomise_adapter(built.transformer)
    total = loss_of(built, data)
    total.backward()
    found = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
    return {"loss": total.detach(), **found}


@pytest.mark.parametrize("variant", wan_first())
def test_loss_and_gradients_are_bitwise_those_of_kept_activations(variant, built):
    arch = base.architecture(variant, built(variant))
    arch.offload = False  # kept activations need both experts
    data = base.batch(arch, variant, arch.load_encoders("cpu"), ["a red box", "a box by the sea"])
    with torch.autocast("cpu", torch.bfloat16, enabled=random.Random(variant.name).random() < 0.5):
        for loss in (PLAIN, PRIOR):
            kept, *others = [numbers(arch, data, loss, activations) for activations in ACTIVATIONS]
            assert any(grad is not None and grad.any() for grad in kept.values())
            for found in others:
                assert found.keys() == kept.keys()
                assert all((a is b) or torch.equal(a, b) for a, b in zip(found.values(), kept.values(), strict=True))


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")  # the compiler raises warnings of its own while tracing
def test_compiled_blocks_have_the_same_gradients_with_their_inputs_on_the_cpu(architecture):
    data, found = batch(four_masks()), []
    for activations in ("checkpoint", "offload"):
        torch.compiler.reset()
        found.append(numbers(architecture, data, PRIOR, activations, compile_blocks=True))
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_blocks_inputs_are_let_go_of_before_the_backward_pass_where_they_wait_on_the_cpu(architecture, activations):
    built, alive = module(architecture, PRIOR, memory=Memory(activations=activations)), []
    for block in built.transformer.blocks:
        block.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0].untyped_storage())))
    loss = loss_of(built, batch(four_masks()))
    student = alive[len(alive) // 2 :]
    assert all((storage() is None) == (activations == "offload") for storage in student[1:])
    loss.backward()


def test_weights_stay_where_they_are_and_what_several_save_is_copied_once():
    layer, given = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with on_the_cpu(layer, Host()):
        made = given * 2
        product, square = layer(made).grad_fn, (made * made).grad_fn
    assert product._saved_mat2.data_ptr() == layer.weight.data_ptr()
    assert product._saved_mat1.data_ptr() == square._saved_self.data_ptr() != made.data_ptr()


def test_what_is_changed_in_place_after_it_was_saved_has_its_old_value():
    given = torch.ones(3, requires_grad=True)
    with on_the_cpu(torch.nn.Linear(1, 1), Host()):
        made = given * 2
        first = made * made
        made.mul_(3)
        second = made * made
    (first + second).sum().backward()
    assert torch.equal(given.grad, torch.full((3,), 2 * 2.0 * 2 + 2 * 6.0 * 6))


def test_an_unknown_choice_is_refused():
    assert unchecked_error(Memory, activations="host") == (
        "ValueError: memory.activations must be one of keep, checkpoint, offload, got 'host'"
    )
