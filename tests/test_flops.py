"""What the teacher costs, to the integer."""

import math

import pytest
import torch

from benchmarks.counting import flops
from mpp.core.loss import MaskedPriorLoss
from mpp.memory.settings import Memory
from tests.helpers import batch, four_masks, loss_of, module

PLAIN = MaskedPriorLoss()
PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")


def step(architecture, loss, data, checkpointing):
    built = module(architecture, loss, memory=Memory(activations="checkpoint" if checkpointing else "keep"))
    return flops(lambda: loss_of(built, data).backward())


def teacher(architecture, data):
    transformer = architecture.load_transformer()

    def forward():
        with torch.no_grad():
            architecture.velocity(transformer, data.latents, torch.full((len(data),), 0.5), data.conditioning)

    return flops(forward)


def attention_flops(batch, heads, queries, keys, dim):
    """Two matrix products."""
    return 2 * 2 * math.prod((batch, heads, queries, keys, dim))


def test_the_counter_sees_cpu_attention():
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    forward = flops(lambda: torch.nn.functional.scaled_dot_product_attention(query.detach(), query, query))
    assert forward == attention_flops(2, 4, 16, 16, 8)
    both = flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward())
    assert both == forward * 7 // 2  # five products in the backward pass against two


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prior_step_is_a_plain_step_plus_one_teacher_forward(architecture, checkpointing):
    masks = four_masks()
    masks[[1, 3]] = masks[[0, 2]]
    data = batch(masks)
    plain = step(architecture, PLAIN, data, checkpointing)
    assert step(architecture, PRIOR, data, checkpointing) == plain + teacher(architecture, data)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_ones_masks_cost_nothing(architecture, checkpointing):
    data = batch(torch.ones(4, 1, 1, 8, 8))
    assert step(architecture, PRIOR, data, checkpointing) == step(architecture, PLAIN, data, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_of_four_full_masks_cost_the_teacher_of_two(architecture, checkpointing):
    data = batch(four_masks())
    plain = step(architecture, PLAIN, data, checkpointing)
    part = teacher(architecture, batch(four_masks()[:2]))
    assert step(architecture, PRIOR, data, checkpointing) == plain + part
    assert part * 2 == teacher(architecture, data)


def test_prior_weight_zero_costs_nothing(architecture):
    data = batch(four_masks())
    off = MaskedPriorLoss(0.0, 0.1, normalization="per_sample")
    assert step(architecture, off, data, checkpointing=False) == step(architecture, PLAIN, data, checkpointing=False)
