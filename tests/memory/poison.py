"""A device whose memory is not the CPU's: what is not there yet, or not any more, is not a number."""

import torch

from mpp.memory.link import Link, layout_bytes, views


def poisoned(like):
    """Tensors like others in which no arithmetic finds a number, integers' scales among them."""
    return [torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 77) for t in like]


class Poison(Link):
    """A link to memory of its own, laid out as a GPU's is; all its bytes are 255 until a slot is waited for.

    That is not a number in every floating point format.
    """

    def keep(self, tensors):
        kept = views(torch.empty(layout_bytes(tensors), dtype=torch.uint8), tensors)
        for copy, tensor in zip(kept, tensors, strict=True):
            copy.copy_(tensor.detach())
        return kept

    def waiting(self, kept):
        return poisoned(kept)

    def fetch(self, kept, slot):
        if slot.memory is None:
            slot.memory = torch.empty(slot.size, dtype=torch.uint8)
        slot.memory.fill_(255)
        slot.arrived = kept
        return views(slot.memory, kept)

    def wait(self, slot):
        for there, tensor in zip(views(slot.memory, slot.arrived or ()), slot.arrived or (), strict=True):
            there.copy_(tensor)
        slot.arrived = None

    def leave(self, slot):
        slot.memory.fill_(255)

    def free(self, slot):
        slot.memory = slot.arrived = None


class Visible(Poison):
    """One that shows the CPU's memory as it is, so that what is counted is what is on the device."""

    def waiting(self, kept):
        return list(kept)
