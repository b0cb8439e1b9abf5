"""The contract of a DiT family: all that the rest of mpp knows about a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mpp.core.flow import SigmaLaw
from mpp.files import weights_fingerprint

if TYPE_CHECKING:
    from mpp.models.musubi_parts import MusubiFormat


@dataclass(frozen=True)
class LatentSpec:
    """Shape of a family's latents.

    Attributes:
        channels: Latent channels.
        spatial_stride: Pixels per latent cell, each way.
        temporal_stride: Pixel frames per latent frame after the first.
        patch: Latent cells (frames, height, width) per token of the transformer.
        layered: Frames are the RGBA layers of one picture, the whole picture first, instead of moments of a clip.
    """

    channels: int
    spatial_stride: int
    temporal_stride: int
    patch: Sequence[int]
    layered: bool = False

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
class PictureInputs:
    """Which pictures a family sees besides noisy latents.

    Attributes:
        least: Control pictures that every sample has at least (edited picture, references).
        most: Control pictures that a sample has at most.
        first_frame: The clip's own first frame is the (only) conditioning picture: image to video.
        in_text: The text encoder sees the pictures, so that text is cached per caption and pictures.
        in_negative: It sees them with a negative prompt too.
    """

    least: int = 0
    most: int = 0
    first_frame: bool = False
    in_text: bool = False
    in_negative: bool = True


@dataclass(frozen=True)
class Prompt:
    """What a text encoder reads: a caption, and the conditioning pictures where it sees them (RGB, any size)."""

    text: str
    pictures: tuple[Image.Image, ...] = ()


_CONFIGS = ("", "tokenizer_", "preprocessor_", "scheduler_")  # what a component's folder holds: `..config.json`

Tensors = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Conditioning:
    """What a DiT sees besides noisy latents: a record of tensors, batched on the first axis after `collate`.

    A field is a tensor, a tuple of tensors (a sample's control pictures), or None where it does not apply. Fields
    that come from pictures default to None, so that text alone makes a record. All samples of one batch have the same
    picture fields with the same shapes; the DataModule sees to it.
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

    def select(self, samples: Sequence[int]) -> "Conditioning":
        """The given samples of a batch."""
        rows = list(samples)
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        def of(value: Tensors) -> Tensors:
            if isinstance(value, tuple):
                return tuple(change(tensor) for tensor in value)
            return None if value is None else change(value)

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})


def flat_tensors(values: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Named tensors and tuples of tensors by flat names: those of a tuple as `name.0`, ...; None is left out."""
    found = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            found |= {f"{name}.{number}": tensor for number, tensor in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found


@runtime_checkable
class Encoders(Protocol):
    """VAE, text and picture encoders of a family; only preparing and sampling load them, each on first use."""

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Conditioning]:
        """One unbatched record per prompt, on the CPU, its picture fields None.

        Text is trimmed to its true length wherever padding carries nothing of its own.
        """
        ...

    def encode_pixels(self, pixels: Float[Tensor, "b channels frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Normalised float32 latents on the CPU of pixels in [-1, 1]: RGB, or RGBA for layered families."""
        ...

    def encode_pictures(
        self, pixels: Float[Tensor, "1 channels frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """The picture fields of one sample's record, unbatched, on the CPU; {} for families that see none.

        Args:
            pixels: The sample itself, as `encode_pixels` takes it; image to video looks at its first frame.
            controls: Its control pictures, RGB at their own size.
        """
        ...

    def release(self) -> None:
        """Free whatever is loaded."""
        ...


@dataclass(frozen=True)
class Shot:
    """One picture or clip to paint.

    Attributes:
        width: In pixels, a multiple of the family's pixel step.
        height: The same.
        frames: Frames of the clip; layers of a layered picture without the base; 1 for a picture.
        steps: Sampling steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        seed: Of the initial noise, drawn on the CPU.
        controls: Conditioning pictures, RGB.
    """

    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    seed: int
    controls: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a run's weights; None where they are not at hand on this machine."""

    transformer: str | None
    vae: str | None
    text_encoder: str | None


@dataclass(frozen=True)
class NativeRule:
    r"""How the original implementation names a module that adapters attach to.

    Attributes:
        pattern: Regex that matches diffusers' whole module name.
        name: The original's module name, with the pattern's groups as `\1`.
        parts: Where the original keeps several of diffusers' linear layers as one: diffusers' names of all of them
            (with groups), in the order in which the original stacks their outputs.
    """

    pattern: str
    name: str
    parts: tuple[str, ...] = ()


@runtime_checkable
class Architecture(Protocol):
    """What mpp needs to know about a DiT family. Constructing one loads nothing.

    Attributes:
        family: Name of what its caches hold, e.g. `wan`, `wan_i2v`: variants that cache other things differ in it.
        latents: Shape of its latents.
        lora_targets: Names or one regex over the transformer's modules that adapters attach to by default.
        sigma: Its training law of sigma.
        conditioning: The record type its caches hold.
        pictures: Which pictures it sees besides noisy latents.
        cache_settings: Settings that shape what is cached, by name; a cache belongs to them.
        given_frames: Leading latent frames of a sample that the model is given clean, by its conditioning, and that
            are therefore neither noised nor part of the loss: the DataModule leaves them out of latents and mask.
        least_frames: Latent frames that a sample has at least; 2 where the first is no task, because the model sees it.
        boundaries: Sigmas, ascending, at or above which the next expert takes over; () with a single transformer.
        native: How the original implementation names the modules; () where they have diffusers' names.
        musubi: How musubi-tuner stores this model's samples; None where it has no such architecture.
        guidance_scale: Guidance that samples are painted with unless told otherwise.
        steps: Sampling steps unless told otherwise.
        fps: Frames per second of the clips that it was trained on; None for models of pictures.
    """

    family: str
    latents: LatentSpec
    lora_targets: str | tuple[str, ...]
    sigma: SigmaLaw
    conditioning: type[Conditioning]
    pictures: PictureInputs
    cache_settings: Mapping[str, object]
    given_frames: int
    least_frames: int
    boundaries: tuple[float, ...]
    native: tuple[NativeRule, ...]
    musubi: "MusubiFormat | None"
    guidance_scale: float
    steps: int
    fps: float | None

    def check(self) -> None:
        """Refuse settings and sources that cannot work, without loading weights."""
        ...

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints of the weights. `fetch` downloads VAE and text encoder where they are on a hub."""
        ...

    def load_transformer(self) -> nn.Module:
        """The frozen transformer, a diffusers model, or `Experts` that hold several."""
        ...

    def skeleton(self) -> nn.Module:
        """The same without weights, on the meta device."""
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

    def sample(
        self,
        transformer: nn.Module,
        encoders: Encoders,
        positive: Conditioning,
        negative: Conditioning | None,
        shot: Shot,
    ) -> Float[Tensor, "frames channels height width"]:
        """Paint with diffusers' own pipeline; pixels in [0, 1] on the CPU, RGB or RGBA.

        Args:
            transformer: With its adapters on or off, as the caller wants them.
            encoders: Whose VAE decodes; no text encoder is loaded.
            positive: Conditioning as `collate` gives it for one sample.
            negative: Of the negative prompt; None without guidance.
            shot: Sizes, steps, guidance, seed and pictures.
        """
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


def pad_with_mask(
    texts: Sequence[Tensor],
) -> tuple[Float[Tensor, "b tokens dim"], Bool[Tensor, "b tokens"]]:
    """Cached texts `(tokens, dim)` as one batch, zero-padded to the longest, with True where a token is real."""
    lengths = torch.tensor([text.shape[0] for text in texts])
    longest = int(lengths.max())
    return pad_text(texts, longest), torch.arange(longest)[None] < lengths[:, None]


def resolve_folder(source: str, subfolder: str, option: str, *, fetch: bool = True, files: str = "*") -> Path:
    """Where a component of a diffusers folder or hub id lies on this machine.

    Args:
        source: A folder (a pipeline's, with `subfolder` in it, or the component's own) or a hub id `owner/name`.
        subfolder: The component, e.g. `transformer`.
        option: Name of the setting, for errors.
        fetch: Whether a hub id may be downloaded; else only an earlier download is found.
        files: Which of a hub id's files are wanted: without weights a model's description is small.

    Raises:
        ValueError: Nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path / subfolder, path):
            if any((folder / f"{kind}config.json").is_file() for kind in _CONFIGS):
                return folder
        raise ValueError(f"{option}={source}: the folder has neither {subfolder}/config.json nor config.json")
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{option}={source} is not there; give a diffusers folder, a hub id (owner/name), or for the transformer a "
            "single .safetensors file"
        )
    try:
        snapshot = snapshot_download(source, allow_patterns=[f"{subfolder}/{files}"], local_files_only=not fetch)
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


def draw_sigma(
    model: Architecture, keys: Sequence[str], shape: Sequence[int], seed: int, epoch: int | str
) -> Float[Tensor, " n"]:
    """Sigma of each sample for one visit, float32 in [0, 1]: what the step corrupts by and the loader sorts experts by.

    Args:
        model: Its law, and its tokens.
        keys: Names of the samples.
        shape: Of each sample's latents, without the frames that the model is given; frames, height, width last.
        seed: Of the run.
        epoch: Position of the visit.
    """
    return model.sigma.draw(keys, seed, epoch, model.latents.tokens(shape))
