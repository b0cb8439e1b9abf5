"""What streaming and lockstep must pass: what is learned is bitwise what it is with all weights there."""

import random
from dataclasses import replace

import torch

from mpp.core.loss import MaskedPriorLoss
from mpp.memory.settings import Memory
from mpp.memory.streaming import Streaming
from mpp.models.streamed import streamable
from mpp.training.passes import passes_of
from mpp.training.step import MaskedPriorStep, Position
from tests.families import base
from tests.helpers import module, randomise_adapter

PLAIN = MaskedPriorLoss()
PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
RESIDENT = Memory(activations="checkpoint", resident="all", teacher="apart")


def adapted(arch, memory=RESIDENT, **settings):
    """A module whose adapter does something."""
    built = module(arch, PRIOR, memory=memory, **settings)
    randomise_adapter(built.transformer)
    return built


def streaming_of(built):
    """What moves a module's blocks; None where all stay."""
    hooks = [hook for block in built.transformer.modules() for hook in block._forward_pre_hooks.values()]
    owners = {getattr(hook, "__self__", None) for hook in hooks}
    return next((owner for owner in owners if isinstance(owner, Streaming)), None)


def data_of(arch, variant, seed, texts=("a red box", "a box by the sea")):
    """A batch of clips of a drawn size, with half masks."""
    cells = random.Random(seed).choices((1, 2, 3), k=2)
    return base.batch(arch, variant, arch.load_encoders("cpu"), texts, cells=tuple(cells), seed=seed)


def partly(data, rows):
    """The same batch in which only these samples have something to preserve."""
    mask = data.mask.clone()
    for row in set(range(len(mask))) - set(rows):
        mask[row] = 1
    return replace(data, mask=mask)


def step_of(built, loss, memory):
    """A step of a module that is taken in another way than it was made for."""
    return MaskedPriorStep(
        built.architecture, loss, passes_of(built.architecture, built.transformer, built.teacher, memory)
    )


def learned(built, data, loss, memory, *, epochs=(0,), low=False):
    """Losses, and the gradients that backward passes of several draws of noise leave, by name."""
    step, found = step_of(built, loss, memory), {}
    built.zero_grad()
    for epoch in epochs:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total = loss.terms(step(data, Position(0, epoch)).sums).total
        total.backward()
        found[f"loss {epoch}"] = total.detach()
    found |= {n: p.grad.clone() for n, p in built.named_parameters() if p.requires_grad and p.grad is not None}
    return found


def same(found, wanted):
    """Assert that tensors are bitwise others, by name, and worth comparing."""
    assert found.keys() == wanted.keys()
    assert any(name.startswith("transformer") and tensor.any() for name, tensor in wanted.items())
    wrong = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    assert not wrong, f"{len(wrong)} of {len(wanted)} are others: {wrong[:3]}"


def check(arch, data, draw, *, low=False, base="bf16"):
    """The gate, for a model whose blocks are streamed, in all ways that a step may go.

    Args:
        arch: The family.
        data: A batch.
        draw: Chooses.
        low: Under autocast to bfloat16.
        base: As `memory.base`.
    """
    whole, built = pair(arch, draw, base=base)
    some = partly(data, draw.sample(range(len(data)), draw.randint(1, len(data) - 1)))
    apart, lockstep = (replace(RESIDENT, teacher=teacher) for teacher in ("apart", "lockstep"))
    away = replace(draw.choice((apart, lockstep)), activations="offload")
    for loss, batch, ways in (
        (PLAIN, data, [draw.choice((apart, lockstep, away))]),
        (PRIOR, data, [lockstep, away]),
        (PRIOR, some, [apart, lockstep]),
    ):
        wanted = learned(whole, batch, loss, apart, low=low)
        for way in ways:
            same(learned(built, batch, loss, way, low=low), wanted)
    same(learned(whole, some, PRIOR, lockstep, low=low), wanted)
    return built


def pair(arch, draw, resident=None, whole=None, **memory):
    """A module with all weights there, and one with a drawn number of blocks; some of its blocks have to wait."""
    offload, arch.offload = arch.offload, False
    whole = whole or adapted(arch, replace(RESIDENT, **memory))
    arch.offload = offload
    count = max(len(group) for group in streamable(arch, whole.transformer))
    resident = resident or draw.randint(2, count - 1)
    built = adapted(arch, replace(RESIDENT, resident=resident, **memory))
    assert streaming_of(whole) is None
    assert streaming_of(built) is not None
    return whole, built
