"""Who answers for the prior, and for which samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpp.core.flow import Noisy
from mpp.lora.adapters import adapters_off
from mpp.models.conditioning import rows_of
from mpp.models.contract import Architecture, Conditioning


@dataclass(frozen=True)
class Teacher:
    """The base model itself: the same transformer with its adapters off, without gradients.

    Args:
        eval_mode: Run the teacher in eval mode, for architectures with dropout; each module's mode comes back after.
    """

    eval_mode: bool = False

    def predict(
        self,
        architecture: Architecture,
        transformer: nn.Module,
        noisy: Noisy,
        conditioning: Conditioning,
        samples: Sequence[int],
    ) -> Float[Tensor, "b c f h w"] | None:
        """The base model's prediction for the given samples of a batch; the other rows are 0.

        A part of a batch goes through the transformer as a smaller batch, which agrees with the whole up to
        rounding; the whole batch is bitwise what the student would predict without adapters.

        Returns:
            The prediction, or None where no sample is given.
        """
        if not samples:
            return None
        with adapters_off(transformer), _eval_mode(transformer, wanted=self.eval_mode):
            return self.answer(architecture, transformer, noisy, conditioning, samples)

    @torch.no_grad()
    def answer(
        self,
        architecture: Architecture,
        transformer: nn.Module,
        noisy: Noisy,
        conditioning: Conditioning,
        samples: Sequence[int],
    ) -> Float[Tensor, "b c f h w"]:
        """The same for whoever has switched the adapters off, of at least one sample."""
        if len(samples) == noisy.sigma.shape[0]:
            return architecture.velocity(transformer, noisy.latents, noisy.sigma, conditioning)
        latents, sigma = rows_of(noisy.latents, samples), rows_of(noisy.sigma, samples)
        part = architecture.velocity(transformer, latents, sigma, conditioning.select(samples))
        answers = dict(zip(samples, part, strict=True))
        nothing = torch.zeros_like(part[0])
        return torch.stack([answers.get(row, nothing) for row in range(len(noisy.sigma))])


@contextmanager
def _eval_mode(transformer: nn.Module, *, wanted: bool) -> Iterator[None]:
    training = [module for module in transformer.modules() if module.training] if wanted else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
