"""A model's blocks streamed from the CPU's memory."""

import re

import torch
from torch import nn

from mpp.memory.settings import Resident
from mpp.memory.streaming import Streaming
from mpp.models.contract import Architecture
from mpp.models.experts import parts_of


def streamable(architecture: Architecture, transformer: nn.Module) -> list[list[nn.Module]]:
    """The blocks that need not stay on the device, by transformer, in the order in which they run.

    Those that are not computed again in the backward pass have to stay.
    """
    return [
        [block for name, block in architecture.blocks(part) if not any(re.search(p, name) for p in architecture.kept)]
        for _, part in parts_of(transformer)
    ]


def check_resident(architecture: Architecture, resident: Resident) -> None:
    """Refuse more blocks than there are, without weights.

    Args:
        architecture: The family.
        resident: As `memory.resident`.

    Raises:
        ValueError: As above.
    """
    if isinstance(resident, int):
        count = max(map(len, streamable(architecture, architecture.skeleton())))
        check_count(resident, count, architecture.pretrained)


def check_count(resident: Resident, count: int, model: str) -> None:
    """The same where it is known how many there are.

    Args:
        resident: As `memory.resident`.
        count: Of the blocks.
        model: Its name, for the error.

    Raises:
        ValueError: As above.
    """
    if isinstance(resident, int) and resident > count:
        raise ValueError(
            f"memory.resident={resident}: {model} has {count} blocks that could wait in the CPU's "
            f"memory; set a number from 2 to {count}, or all"
        )


def check_turns(architecture: Architecture, activations: str) -> None:
    """Refuse experts of which each needs its weights until the backward pass is done, in the same memory.

    Args:
        architecture: The family.
        activations: As `memory.activations`.

    Raises:
        ValueError: As above.
    """
    if architecture.offload and architecture.boundaries and activations == "keep":
        raise ValueError(
            "memory.activations=keep needs the weights of both experts until the backward pass is done; set "
            "memory.activations=checkpoint, or model.offload=false"
        )


def stream(architecture: Architecture, transformer: nn.Module, resident: Resident) -> Streaming | None:
    """Let blocks wait in the CPU's memory, of several experts those of the idle ones too; None where all stay.

    To be called once all that is trained is there.

    Args:
        architecture: The family.
        transformer: With its adapters.
        resident: As `memory.resident`, and not `auto`.
    """
    groups = streamable(architecture, transformer)
    if isinstance(resident, int):
        return Streaming(groups, resident)
    return Streaming(groups, None) if len(groups) > 1 and architecture.offload else None


def compile_blocks(transformer: nn.Module) -> None:
    """`torch.compile` the blocks that diffusers compiles, each by itself; what is hooked to a block stays outside."""
    for _, part in parts_of(transformer):
        repeated = set(part._repeated_blocks or ())  # noqa: SLF001 (tests/models/test_private.py says when it changes)
        for block in part.modules():
            if type(block).__name__ in repeated:
                block.forward = torch.compile(block.forward, fullgraph=True)
