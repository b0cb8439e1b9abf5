"""A device whose memory is not the CPU's: what is not there, or left, is not a number."""

import torch

from mpp.memory.link import Link


def poisoned(like):
    """Tensors like others in which no arithmetic finds a number, integers' scales among them."""
    return [torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 77) for t in like]


class Poison(Link):
    """A link that copies what it fetches, and poisons the copies when they are left."""

    def keep(self, tensors):
        return [tensor.detach().clone() for tensor in tensors]

    def waiting(self, kept):
        return poisoned(kept)

    def fetch(self, kept, slot):
        slot.there = [tensor.clone() for tensor in kept]
        return slot.there

    def leave(self, slot):
        for tensor, bad in zip(slot.there, poisoned(slot.there), strict=True):
            tensor.copy_(bad)
