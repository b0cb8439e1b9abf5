"""Both passes through the transformer, the teacher's and the student's, in each way that a run may have them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from mpp.core.flow import Noisy
from mpp.memory.activations import Host, on_the_cpu
from mpp.memory.settings import Memory
from mpp.models.contract import Architecture, Conditioning
from mpp.training.lockstep import Lockstep
from mpp.training.teacher import Teacher

Latents = Float[Tensor, "b c f h w"]


class Predictions(NamedTuple):
    """What teacher and student predict for the same noisy latents; no `prior` where the teacher was not asked."""

    prior: Latents | None
    pred: Latents


@runtime_checkable
class Passes(Protocol):
    """Both passes through the transformer: the base model's without gradients, and the adapted model's."""

    def __call__(self, noisy: Noisy, conditioning: Conditioning, samples: Sequence[int]) -> Predictions:
        """Predictions of a batch; the teacher's for the numbers in `samples` alone, its other rows are 0."""
        ...


@dataclass(frozen=True)
class WholePasses:
    """The teacher through the whole model, then the student."""

    architecture: Architecture
    transformer: nn.Module
    teacher: Teacher

    def __call__(self, noisy: Noisy, conditioning: Conditioning, samples: Sequence[int]) -> Predictions:
        """As `Passes` says."""
        prior = self.teacher.predict(self.architecture, self.transformer, noisy, conditioning, samples)
        pred = self.architecture.velocity(self.transformer, noisy.latents, noisy.sigma, conditioning)
        return Predictions(prior, pred)


@dataclass(frozen=True)
class LockstepPasses:
    """Both at once: just before the student runs a block, the teacher does.

    Each is the whole call of the transformer, with all that lies before, between and behind its blocks, so that it
    gives bitwise what it gives by itself, for some rows of a batch too.
    """

    architecture: Architecture
    transformer: nn.Module
    teacher: Teacher

    def __call__(self, noisy: Noisy, conditioning: Conditioning, samples: Sequence[int]) -> Predictions:
        """As `Passes` says."""
        student = partial(self.architecture.velocity, self.transformer, noisy.latents, noisy.sigma, conditioning)
        if not samples:
            return Predictions(None, student())
        ask = partial(self.teacher.answer, self.architecture, self.transformer, noisy, conditioning, samples)
        blocks = [block for _, block in self.architecture.blocks(self.transformer)]
        with Lockstep(ask, self.transformer, blocks, noisy.latents.device) as lockstep:
            pred = student()
            return Predictions(lockstep.answer(), pred)


@dataclass(frozen=True)
class OffloadedPasses:
    """Passes of which what is saved for the backward pass waits in the CPU's memory."""

    passes: Passes
    transformer: nn.Module
    host: Host

    def __call__(self, noisy: Noisy, conditioning: Conditioning, samples: Sequence[int]) -> Predictions:
        """As `Passes` says."""
        with on_the_cpu(self.transformer, self.host):
            return self.passes(noisy, conditioning, samples)


def passes_of(
    architecture: Architecture,
    transformer: nn.Module,
    teacher: Teacher,
    memory: Memory,
    host: Host | None = None,
) -> Passes:
    """The passes of a run.

    Args:
        architecture: The DiT family.
        transformer: With its adapter.
        teacher: Who answers for the prior.
        memory: How it fits.
        host: Where activations wait that are offloaded; None: the CPU's memory.
    """
    made = LockstepPasses if memory.teacher == "lockstep" else WholePasses
    passes = made(architecture, transformer, teacher)
    return OffloadedPasses(passes, transformer, host or Host()) if memory.activations == "offload" else passes
