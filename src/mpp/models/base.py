"""The contract of a DiT family: all that the rest of mpp knows about a model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mpp.core.flow import SigmaLaw
from mpp.files import weights_fingerprint


@dataclass(frozen=True)
class LatentSpec:
    """Shape of a family's latents.

    Attributes:
        channels: Latent channels.
        spatial_stride: Pixels per latent cell, each way.
        temporal_stride: Pixel frames per latent frame after the first.
        patch: Latent cells (frames, height, width) per token of the transformer.
    """

    channels: int
    spatial_stride: int
    temporal_stride: int
    patch: Sequence[int]

    def __post_init__(self) -> None:
        """A patch read from YAML is a list."""
        object.__setattr__(self, "patch", tuple(self.patch))

    @property
    def pixel_step(self) -> int:
        """Height and width in pixels are multiples of this."""
        return self.spatial_stride * max(self.patch[1:])

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape (channels, f, h, w) of a clip in pixels."""
        latent_frames = (frames - 1) // self.temporal_stride + 1
        return self.channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride

    def tokens(self, shape: Sequence[int]) -> int:
        """Tokens of latents whose last three sizes are frames, height and width."""
        frames, height, width = shape[-3:]
        return (frames // self.patch[0]) * (height // self.patch[1]) * (width // self.patch[2])


@dataclass(frozen=True)
class Conditioning:
    """What a DiT sees besides noisy latents: a record of tensors, batched on the first axis after `collate`."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, as the cache stores them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, samples: Sequence[int]) -> "Conditioning":
        """The given samples of a batch."""
        rows = list(samples)
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors().items()})


@runtime_checkable
class Encoders(Protocol):
    """VAE and text encoder of a family; only preparing and sampling load them, one at a time."""

    def encode_text(self, captions: Sequence[str]) -> list[Conditioning]:
        """One unbatched conditioning per caption, on the CPU. Loads the text encoder on first use."""
        ...

    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Normalised float32 latents on the CPU of RGB pixels in [-1, 1]. Loads the VAE on first use."""
        ...

    def release(self) -> None:
        """Free whatever is loaded."""
        ...


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a run's weights; None where they are not at hand on this machine."""

    transformer: str | None
    vae: str | None
    text_encoder: str | None


@runtime_checkable
class Architecture(Protocol):
    """What mpp needs to know about a DiT family. Constructing one loads nothing.

    Attributes:
        family: Name of the family, e.g. `wan`.
        latents: Shape of its latents.
        lora_targets: Names or one regex over the transformer's modules that adapters attach to by default.
        sigma: Its training law of sigma.
        conditioning: The record type its caches hold.
    """

    family: str
    latents: LatentSpec
    lora_targets: str | tuple[str, ...]
    sigma: SigmaLaw
    conditioning: type[Conditioning]

    def check(self) -> None:
        """Refuse settings and sources that cannot work, without loading weights."""
        ...

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints of the weights. `fetch` downloads VAE and text encoder where they are on a hub."""
        ...

    def load_transformer(self) -> nn.Module:
        """The frozen transformer, a diffusers model."""
        ...

    def load_encoders(self, device: torch.device | str) -> Encoders:
        """VAE and text encoder, each loaded when first used."""
        ...

    def collate(self, items: Sequence[Conditioning]) -> Conditioning:
        """One batch of conditioning: pads, masks or fixes lengths as the family wants it."""
        ...

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """The transformer's prediction of `noise - latents` at sigma in [0, 1]."""
        ...


def pad_text(texts: Sequence[Tensor], length: int) -> Float[Tensor, "b tokens dim"]:
    """Cached texts `(tokens, dim)` as one batch, zero-padded to `length` tokens.

    Raises:
        ValueError: A text is longer.
    """
    longest = max(text.shape[0] for text in texts)
    if longest > length:
        raise ValueError(
            f"a cached caption has {longest} tokens, model.text_length is {length}; "
            "run `python -m mpp.prepare` again with this setting"
        )
    return torch.stack([functional.pad(text, (0, 0, 0, length - text.shape[0])) for text in texts])


def resolve_folder(source: str, subfolder: str, option: str, *, fetch: bool = True) -> Path:
    """Where a component of a diffusers folder or hub id lies on this machine.

    Args:
        source: A folder (a pipeline's, with `subfolder` in it, or the component's own) or a hub id `owner/name`.
        subfolder: The component, e.g. `transformer`.
        option: Name of the setting, for errors.
        fetch: Whether a hub id may be downloaded; else only an earlier download is found.

    Raises:
        ValueError: Nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path / subfolder, path):
            if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
                return folder
        raise ValueError(f"{option}={source}: the folder has neither {subfolder}/config.json nor config.json")
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{option}={source} is not there; give a diffusers folder, a hub id (owner/name), or for the transformer a "
            "single .safetensors file"
        )
    try:
        snapshot = snapshot_download(source, allow_patterns=[f"{subfolder}/*"], local_files_only=not fetch)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option}={source} is neither a folder here nor a hub repository that could be fetched "
            f"({type(error).__name__}); check the name and the network, or download it and give the folder"
        ) from error
    folder = Path(snapshot) / subfolder
    if not folder.is_dir():
        raise ValueError(f"{option}={source}: the hub repository has no folder {subfolder}")
    return folder


def fingerprint_if_present(source: str, subfolder: str, option: str, *, fetch: bool) -> str | None:
    """Fingerprint of a component's weights, or None where they are not on this machine."""
    try:
        return weights_fingerprint(resolve_folder(source, subfolder, option, fetch=fetch))
    except ValueError:
        if fetch:
            raise
        return None
