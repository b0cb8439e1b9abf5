"""Exact counts of a piece of work: floating point operations, CPU attention included, and bytes kept for backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# torch 2.13 has no formula for CPU flash attention and counts it as zero.


def _forward(query, key, value, *_, **__):  # noqa: ANN001, ANN002, ANN003, ANN202 (shapes, and what torch adds)
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *_, **__):  # noqa: ANN001, ANN002, ANN003, ANN202
    return sdpa_backward_flop_count(grad, query, key, value)


MAPPING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,  # noqa: SLF001 (torch's own name)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,  # noqa: SLF001
}


def flops(action: Callable[[], object]) -> int:
    """FLOPs of calling `action`."""
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        action()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], object], *models: nn.Module) -> int:
    """Bytes that autograd keeps from `forward` for the backward pass: each storage once, those of the models left out.

    Args:
        forward: Returns what the backward pass would begin with.
        models: Whose parameters and buffers are there anyway.
    """
    own = {t.untyped_storage().data_ptr() for model in models for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # so that no storage is freed and used again

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    return sum(size for pointer, size in storages.items() if pointer not in own)
