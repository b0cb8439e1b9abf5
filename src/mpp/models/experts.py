"""Several transformers that share the range of sigma, of which one is in use at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Experts(nn.ModuleDict):
    """Transformers by name, from those for the lowest sigma to those for the highest.

    Args:
        parts: Experts by name, in ascending order of sigma.
    """

    def enable_gradient_checkpointing(self) -> None:
        """As diffusers' models."""
        for expert in self.values():
            expert.enable_gradient_checkpointing()

    def route(self, sigma: Tensor, boundaries: Sequence[float]) -> dict[str, list[int]]:
        """Samples of a batch by the expert that serves their sigma, in ascending order; idle experts are left out.

        Args:
            sigma: One per sample.
            boundaries: As `expert_numbers` takes them.
        """
        numbers = expert_numbers(sigma, boundaries).tolist()
        served = {name: [row for row, n in enumerate(numbers) if n == number] for number, name in enumerate(self)}
        return {name: rows for name, rows in served.items() if rows}

    def predict(
        self, sigma: Tensor, boundaries: Sequence[float], call: Callable[[nn.Module, list[int]], Tensor]
    ) -> Tensor:
        """A batch's prediction, each sample's by its own expert.

        Args:
            sigma: One per sample.
            boundaries: As `route` takes them.
            call: Prediction of one expert for the given rows of the batch.
        """
        routed = self.route(sigma, boundaries)
        parts = [call(self[name], rows) for name, rows in routed.items()]
        if len(parts) == 1:
            return parts[0]
        order = sorted(range(len(sigma)), key=[row for rows in routed.values() for row in rows].__getitem__)
        return torch.cat(parts)[order]


def expert_numbers(sigma: Tensor, boundaries: Sequence[float]) -> Tensor:
    """Number of the expert that serves each sigma, from 0 for the lowest.

    Args:
        sigma: One per sample.
        boundaries: Sigmas at or above which the next expert takes over, one fewer than there are experts. Compared in
            sigma's own precision: float32's 0.9 is at the boundary 0.9, as in diffusers' pipelines.
    """
    return sum(((sigma >= boundary).long() for boundary in boundaries), torch.zeros_like(sigma, dtype=torch.long))


def parts_of(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each single transformer with its name; a lone one is named `""`."""
    if isinstance(transformer, Experts):
        yield from transformer.items()
    else:
        yield "", transformer


def below(part: str, ready: Callable[[str, nn.Module], None] | None) -> Callable[[str, nn.Module], None] | None:
    """What waits for the blocks of all experts, as what waits for those of one; names begin with the expert's."""
    return None if ready is None else lambda name, block: ready(f"{part}.{name}", block)
