"""Several LoRAs over a base, each with a strength: as adapters for samples, or merged into a base to train on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.loaders import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mpp.files import content_hash
from mpp.lora.adapters import ADAPTER, check_kind
from mpp.lora.files import LoraFile, attach, merge
from mpp.lora.reading import asked, find_loras
from mpp.memory.bases import quantise, restore
from mpp.memory.settings import Resident
from mpp.models.contract import Architecture
from mpp.models.experts import parts_of
from mpp.models.streamed import check_resident
from mpp.models.weights import say


@dataclass(frozen=True)
class Stack:
    """LoRAs in the order in which they were asked for.

    Attributes:
        loras: What each entry has for the model's transformers, and its strength.
    """

    loras: tuple[tuple[Mapping[str, LoraFile], float], ...]

    @classmethod
    def read(
        cls, entries: str | Sequence[str] | None, architecture: Architecture, parts: Mapping[str, nn.Module]
    ) -> "Stack":
        """Read them.

        Args:
            entries: Files or folders as `find_loras` takes them, with or without strength: `FILE:0.8`.
            architecture: The family.
            parts: Its transformers, perhaps without weights, and without adapters.

        Raises:
            ValueError: As `asked` and `find_loras`.
        """
        entries = [] if entries is None else [entries] if isinstance(entries, str) else entries
        wanted = [asked(entry) for entry in entries]
        return cls(tuple((find_loras(path, architecture, parts), strength) for path, strength in wanted))

    def check_kinds(self, base: str) -> None:
        """Refuse LoRAs that cannot be put on a base: ValueError as `check_kind`.

        Args:
            base: As `memory.base`.
        """
        for found, _ in self.loras:
            for lora in found.values():
                check_kind(lora.kind, base, f"lora={lora.path}, a {lora.kind}")

    def attach(self, parts: Mapping[str, nn.Module]) -> None:
        """Put them on as adapters that are all on, or off together.

        Raises:
            ValueError: One does not fit, or they are of several kinds, which PEFT cannot hold at once.
        """
        for part, transformer in parts.items():
            own = [(found[part], strength) for found, strength in self.loras if part in found]
            kinds = {str(lora.described.get("peft_type", "LORA")) for lora, _ in own}
            if len(kinds) > 1:
                raise ValueError(
                    f"lora={', '.join(str(lora.path) for lora, _ in own)} are of several kinds "
                    f"({', '.join(sorted(kinds))}), which cannot be switched together; make all but one a part of the "
                    "base: model.loras=[FILE:1.0]"
                )
            names = [ADAPTER if number == 0 else f"lora_{number}" for number in range(len(own))]
            for name, (lora, strength) in zip(names, own, strict=True):
                attach(transformer, lora, name=name, strength=strength)
            for layer in transformer.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.set_adapter([name for name in names if name in layer.scaling], inference_mode=True)

    def merge(self, parts: Mapping[str, nn.Module]) -> None:
        """Add them to the weights, one after the other; computed in float32, and rounded once for each.

        Raises:
            ValueError: One does not fit.
        """
        for found, strength in self.loras:
            for part, lora in found.items():
                if part not in parts:
                    continue
                _add_differences(parts[part], lora, strength)
                if lora.tensors:
                    attach(parts[part], lora.adapter_alone(), strength=strength)
                    merge(parts[part])

    def within(self, owned: Callable[[str], bool]) -> "Stack":
        """What they have for some of the tensors: those whose names, beginning with the part's, are owned."""
        return Stack(
            tuple(
                (
                    {
                        part: lora.within(lambda name, part=part: owned(_in_part(part, name)))
                        for part, lora in f.items()
                    },
                    s,
                )
                for f, s in self.loras
            )
        )

    @property
    def layers(self) -> set[str]:
        """Names of the layers that they change, beginning with the part's."""
        return {_in_part(part, name) for found, _ in self.loras for part, lora in found.items() for name in lora.layers}

    def fingerprint(self) -> str:
        """What tells one stack from another, whatever the files are called."""
        return "".join(
            f"+{content_hash(lora.path)[:16]}@{strength:g}" for found, strength in self.loras for lora in found.values()
        )


@torch.no_grad()
def _add_differences(transformer: nn.Module, lora: LoraFile, strength: float) -> None:
    for name, difference in lora.differences.items():
        module, _, last = name.rpartition(".")
        weight = getattr(transformer.get_submodule(module), last, None)
        if weight is None or weight.shape != difference.shape:
            there = "none" if weight is None else tuple(weight.shape)
            raise ValueError(
                f"lora={lora.path} has a difference of {name} in the shape {tuple(difference.shape)}, the model has "
                f"{there}; choose the model config that it was trained with"
            )
        if not weight.is_meta:
            weight.copy_(weight.float() + strength * difference.to(weight.device))


def _check_stored(architecture: Architecture, base: str) -> None:
    stored = architecture.stored()
    if base != "gguf" and "gguf" in stored.values():
        raise ValueError(
            f"model.pretrained={architecture.pretrained} is a GGUF file, whose weights are quantised already: say so "
            f"by memory.base=gguf (got memory.base={base}), or give the bf16 weights"
        )
    if base == "gguf" and any(stored.get(part) != "gguf" for part, _ in parts_of(architecture.skeleton())):
        raise ValueError(
            "memory.base=gguf keeps GGUF files as they are: set model.pretrained to a .gguf, of several experts each "
            f"one's; got {architecture.pretrained}"
        )
    if base == "gguf" and architecture.loras:
        raise ValueError(
            f"model.loras cannot be merged into a GGUF file, got {', '.join(architecture.loras)}; give the bf16 weights"
        )
    if base in ("int8", "nf4") and "fp8" in stored.values():
        raise ValueError(
            f"memory.base={base} would round the fp8 weights of model.pretrained={architecture.pretrained} a second "
            "time; set memory.base=fp8, which keeps them, or give the bf16 weights"
        )


def load_base(architecture: Architecture, base: str = "bf16") -> nn.Module:
    """The frozen transformer with the LoRAs that belong to it (`model.loras`) in its weights.

    A quantised one is made block by block: read, LoRAs merged in `model.dtype`, quantised. Of files in fp8 all is kept
    as it is, but for the layers that LoRAs are merged into.

    Args:
        architecture: The family.
        base: As `memory.base`.

    Raises:
        ValueError: As `check_weights`.
    """
    _check_stored(architecture, base)
    if base in ("bf16", "gguf"):
        transformer = architecture.load_transformer()
        parts = dict(parts_of(transformer))
        Stack.read(architecture.loras, architecture, parts).merge(parts)
        return transformer.requires_grad_(False)
    skeleton = architecture.skeleton()
    whole = tuple(f"{part}." if part else "" for part in architecture.stored())
    names = [name for name, _ in architecture.quantisable(skeleton) if not name.startswith(whole)]
    blocks = [f"{name}." for name, _ in architecture.blocks(skeleton)]
    stack = Stack.read(architecture.loras, architecture, dict(parts_of(skeleton)))

    again = 0

    def ready(block_name: str, block: nn.Module) -> None:
        nonlocal again
        inside = f"{block_name}."
        part = next((part for part, _ in parts_of(skeleton) if part and inside.startswith(f"{part}.")), "")
        own = stack.within(lambda name: name.startswith(inside))
        restored = restore(block, [name.removeprefix(inside) for name in own.layers if name.startswith(inside)])
        own.merge({part: _holding(block_name, part, block)})
        quantise(block, [name.removeprefix(inside) for name in names if name.startswith(inside)] + restored, base)
        again += len(restored)

    transformer = architecture.load_transformer(ready)
    if again:
        say(f"model.loras: {again} layers in fp8 were dequantised, changed, and quantised again with a scale per row")
    stack.within(lambda name: not name.startswith(tuple(blocks))).merge(dict(parts_of(transformer)))
    return transformer.requires_grad_(False)


class _Holder(nn.Module, PeftAdapterMixin):
    """What PEFT and diffusers take for a transformer."""


def _holding(name: str, part: str, block: nn.Module) -> nn.Module:
    """A block by itself under the name that it has in its transformer."""
    holder = inner = _Holder()
    *path, last = name.removeprefix(f"{part}.").split(".")
    for step in path:
        inner.add_module(step, nn.Module())
        inner = inner.get_submodule(step)
    inner.add_module(last, block)
    return holder


def _in_part(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def base_fingerprint(architecture: Architecture) -> str | None:
    """The fingerprint of what `load_base` gives; None where the weights are not at hand on this machine."""
    weights = architecture.identity().transformer
    if weights is None or not architecture.loras:
        return weights
    return weights + Stack.read(architecture.loras, architecture, dict(parts_of(architecture.skeleton()))).fingerprint()


def check_weights(architecture: Architecture, base: str) -> None:
    """Refuse what `load_base` could not give, off the headers of files, before any weights are loaded.

    Args:
        architecture: The family.
        base: As `memory.base`.

    Raises:
        ValueError: GGUF files under another base, or the other way round; fp8 files that would be quantised once more;
            as `check_loras`.
    """
    _check_stored(architecture, base)
    check_loras(architecture)


def check_loras(architecture: Architecture) -> None:
    """Refuse LoRAs of the base that do not fit, before any weights are loaded.

    Raises:
        ValueError: One is not there, or does not fit.
    """
    parts = dict(parts_of(architecture.skeleton()))
    stack = Stack.read(architecture.loras, architecture, parts)
    for number, (found, strength) in enumerate(stack.loras):
        for part, lora in found.items():
            _add_differences(parts[part], lora, strength)
            if lora.tensors:
                attach(parts[part], lora.adapter_alone(), name=f"lora_{number}", strength=strength)
                parts = dict(parts_of(architecture.skeleton()))


def check_model(architecture: Architecture, base: str, resident: Resident) -> None:
    """Refuse a model that is not there, or does not go with how it is to fit, before any weights are loaded.

    Args:
        architecture: The family.
        base: As `memory.base`.
        resident: As `memory.resident`.

    Raises:
        ValueError: As `Architecture.check`, `check_weights` and `check_resident`.
    """
    architecture.check()
    check_weights(architecture, base)
    check_resident(architecture, resident)
