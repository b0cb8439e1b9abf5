"""One step of training or validation in plain torch: corrupt, ask teacher and student, sum up their errors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mpp.batching.batch import Batch
from mpp.core import draws, flow
from mpp.core.flow import Noisy
from mpp.core.loss import LossSums, MaskedPriorLoss
from mpp.core.masks import Mask, MaskWeights
from mpp.models.contract import Architecture, draw_sigma
from mpp.training.passes import Latents, Passes


class Position(NamedTuple):
    """Where in a run its draws are made: with a sample's key it decides the sample's noise and sigma."""

    seed: int
    epoch: int | str


@dataclass(frozen=True)
class StepOutput:
    """What one step came to.

    Attributes:
        sums: Statistics of the loss.
        weights: Weights of the batch's cells in the loss.
        kept: Where the base model's prediction is to be kept, for the drift: the prior weights, which `measure` gives
            also where the run has no prior.
        pred: Student prediction.
        target: What it is to be where it learns.
        sigma: Noise levels of the samples, in [0, 1].
        prior: The base model's prediction, or None where no sample has anything to keep.
        taught: Number of samples that the teacher ran for.
    """

    sums: LossSums
    weights: MaskWeights
    kept: Mask
    pred: Latents
    target: Latents
    sigma: Float[Tensor, " b"]
    prior: Latents | None
    taught: int

    def by_sample(self, loss: MaskedPriorLoss) -> list[LossSums]:
        """The statistics of each sample by itself."""
        if len(self.pred) == 1:
            return [self.sums]
        return [
            loss.sums(
                self.pred[row],
                self.target[row],
                MaskWeights(*(field[row] for field in (self.weights.raw, self.weights.target, self.weights.prior))),
                None if self.prior is None else self.prior[row],
            )
            for row in (slice(number, number + 1) for number in range(len(self.pred)))
        ]


@dataclass(frozen=True)
class MaskedPriorStep:
    """Teacher and student on one draw of noise; plain torch, no Trainer.

    Args:
        architecture: The DiT family: the law of its sigmas.
        loss: Masked prior loss.
        passes: Gives both predictions.
    """

    architecture: Architecture
    loss: MaskedPriorLoss
    passes: Passes

    def __call__(self, batch: Batch, position: Position) -> StepOutput:
        """One batch at drawn noise levels."""
        weights = self.loss.weights(_host_mask(batch))  # these cells learn, these are kept: computed once, carried on
        return self._run(self.corrupt(batch, position), batch, weights, weights)

    @torch.no_grad()
    def measure(self, batch: Batch, seed: int, sigmas: Sequence[float] | None = None) -> Iterator[StepOutput]:
        """One batch at each of some fixed noise levels, with noise that is the same every time.

        The teacher runs also where training has no prior, so that the drift is known.

        Args:
            batch: Samples.
            seed: Of the noise.
            sigmas: Noise levels in [0, 1]; None: four quantiles of the architecture's law.
        """
        weights = self.loss.weights(_host_mask(batch))
        for number, sigma in enumerate(self._quantiles(batch) if sigmas is None else sigmas):
            noisy = self.corrupt(batch, Position(seed, f"validation {number}"), sigma)
            yield self._run(noisy, batch, weights, self.loss.split(weights))

    def corrupt(self, batch: Batch, position: Position, sigma: float | None = None) -> Noisy:
        """Noise and sigma of each sample, applied to the latents: one draw for both passes.

        Args:
            batch: Samples.
            position: Of the draw.
            sigma: A fixed noise level; None: drawn from the architecture's law.
        """
        shape, latents = tuple(batch.latents.shape[1:]), batch.latents
        noise = torch.empty(batch.latents.shape, pin_memory=latents.is_cuda)  # so that the copy holds nothing up
        torch.stack([draws.noise(shape, *position, key) for key in batch.keys], out=noise)
        if sigma is None:
            levels = draw_sigma(self.architecture, batch.keys, shape, *position)
        else:
            levels = torch.full((len(batch),), sigma)
        noise, levels = noise.to(latents, non_blocking=True), levels.to(latents.device, non_blocking=True)
        return Noisy(flow.interpolate(latents, noise, levels), levels, flow.velocity(latents, noise))

    def _run(self, noisy: Noisy, batch: Batch, weights: MaskWeights, kept: MaskWeights) -> StepOutput:
        samples = tuple(kept.needs_prior().nonzero().flatten().tolist())
        device = noisy.latents.device
        sent = weights.to(device)  # before the passes: a copy waits for what is queued
        kept = sent if kept is weights else kept.to(device)
        prior, pred = self.passes(noisy, batch.conditioning, samples)
        sums = self.loss.sums(pred, noisy.target, sent, prior)
        return StepOutput(sums, sent, kept.prior, pred, noisy.target, noisy.sigma, prior, len(samples))

    def _quantiles(self, batch: Batch) -> list[float]:
        middles = torch.tensor([0.125, 0.375, 0.625, 0.875])
        return self.architecture.sigma.quantile(middles, self.architecture.latents.tokens(batch.latents.shape)).tolist()


def _host_mask(batch: Batch) -> Tensor:
    """The mask on the CPU: who needs a teacher is decided there, so that the device is never asked."""
    return batch.mask if batch.host_mask is None else batch.host_mask
