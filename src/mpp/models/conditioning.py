"""What a DiT sees besides noisy latents, as a record of tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace

import torch
from torch import Tensor

Tensors = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Conditioning:
    """What a DiT sees besides noisy latents: a record of tensors, batched on the first axis after `collate`.

    A field is a tensor, a tuple of tensors (a sample's control images), or None where it does not apply. Fields
    that come from images default to None, so that text alone makes a record. All samples of one batch have the same
    image fields with the same shapes; the DataModule sees to it.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as the cache stores them: by field name, those of a tuple as `name.0`, `name.1`, ..."""
        return flat_tensors({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Conditioning":
        """Inverse of `tensors`.

        Raises:
            ValueError: Names that are no fields, or a field without default is missing.
        """
        values: dict[str, Tensors] = {}
        lists: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            field, _, number = name.partition(".")
            if number:
                lists.setdefault(field, {})[int(number)] = tensor
            else:
                values[field] = tensor
        values |= {field: tuple(tensor for _, tensor in sorted(found.items())) for field, found in lists.items()}
        known = {f.name: f.default is MISSING for f in fields(cls)}
        unknown = sorted(values.keys() - known.keys())
        missing = [name for name, needed in known.items() if needed and name not in values]
        if unknown or missing:
            raise ValueError(f"holds {sorted(tensors)}, wanted are {sorted(known)}")
        return cls(**values)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Conditioning":
        """The same in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, samples: Sequence[int]) -> "Conditioning":
        """The given samples of a batch."""
        return self._map(lambda tensor: rows_of(tensor, samples))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        def of(value: Tensors) -> Tensors:
            if isinstance(value, tuple):
                return tuple(change(tensor) for tensor in value)
            return None if value is None else change(value)

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The given rows of a tensor; indexed by a list, one on a GPU would have the host wait until it is idle."""
    return torch.stack([tensor[row] for row in rows])


def flat_tensors(values: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Named tensors and tuples of tensors by flat names: those of a tuple as `name.0`, ...; None is left out."""
    found = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            found |= {f"{name}.{number}": tensor for number, tensor in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found
