"""Exact FLOP counts, CPU attention included."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# torch 2.13 has no formula for CPU flash attention and counts it as zero.


def _forward(query, key, value, *_, **__):
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *_, **__):
    return sdpa_backward_flop_count(grad, query, key, value)


MAPPING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def count(action):
    """FLOPs of calling `action`."""
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        action()
    return counter.get_total_flops()


def attention_flops(batch, heads, queries, keys, dim):
    """Two matrix products."""
    return 2 * 2 * math.prod((batch, heads, queries, keys, dim))
