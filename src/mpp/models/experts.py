"""Several transformers that share the range of sigma, of which one is in use at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOST = ("cpu", "meta")


class Experts(nn.ModuleDict):
    """Transformers by name, from those for the lowest sigma to those for the highest.

    With `offload`, the frozen weights of all but the expert in use stay on the CPU; adapters, which are small, go to
    the device with the rest of the run.

    Args:
        parts: Experts by name, in ascending order of sigma.
        offload: Keep only the expert in use on the device.
    """

    def __init__(self, parts: Mapping[str, nn.Module], *, offload: bool = True) -> None:
        super().__init__(parts)
        self.offload = offload
        self._device = next((p.device for p in self.parameters()), torch.device("cpu"))

    def enable_gradient_checkpointing(self) -> None:
        """As diffusers' models."""
        for expert in self.values():
            expert.enable_gradient_checkpointing()

    def compile_repeated_blocks(self, **settings: Any) -> None:  # noqa: ANN401
        """As diffusers' models."""
        for expert in self.values():
            expert.compile_repeated_blocks(**settings)

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
        together = torch.is_grad_enabled()  # the backward pass needs all that ran until it is done
        if together:
            self.use(*routed)
        parts = []
        for name, rows in routed.items():
            if not together:
                self.use(name)
            parts.append(call(self[name], rows))
        if len(parts) == 1:
            return parts[0]
        order = sorted(range(len(sigma)), key=[row for rows in routed.values() for row in rows].__getitem__)
        return torch.cat(parts)[order]

    def use(self, *names: str) -> None:
        """Bring the named experts' frozen weights to the device of the run, and send the others' to the CPU.

        Weights that a backward pass still needs must stay in use until it is done.
        """
        if not self.offload or self._device.type in _HOST:
            return
        for name, expert in self.items():
            if name not in names:
                _move(expert, torch.device("cpu"))
        for name in names:
            _move(self[name], self._device)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Inside, an expert that is called comes into use by itself: for samplers that go from one to the next."""
        handles = [
            expert.register_forward_pre_hook(lambda *_, name=name: self.use(name)) for name, expert in self.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _apply(self, fn: Any, recurse: bool = True) -> "Experts":  # noqa: ANN401
        """Moving the run to a device takes the adapters only; `use` brings what is needed."""
        target = fn(torch.zeros(0)).device
        if not self.offload or target.type in _HOST:  # to the CPU, or of dtype alone: nothing to hold back
            self._device = fn(torch.zeros(0, device=self._device)).device
            return super()._apply(fn, recurse)
        self._device = target
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = fn(parameter.data)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad.data)
        return self


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


def _move(expert: nn.Module, device: torch.device) -> None:
    # Waits for the copy: a copy to the CPU that does not would be pinned, rounded up to powers of two, and unfinished.
    for parameter in expert.parameters():
        if not parameter.requires_grad and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in expert.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))
