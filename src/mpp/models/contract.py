"""The contract of a DiT family: all that the rest of mpp knows about a model."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.experts import parts_of
from mpp.models.frame_axis import FrameAxis, Layers, Moments


@dataclass(frozen=True)
class LatentSpec:
    """Shape of a family's latents.

    Attributes:
        channels: Latent channels.
        spatial_stride: Pixels per latent cell, each way.
        temporal_stride: Pixel frames per latent frame after the first.
        patch: Latent cells (frames, height, width) per token of the transformer.
        layered: Frames are the RGBA layers of one image, the whole image first, instead of moments of a clip.

    Raises:
        ValueError: Layers with a temporal stride.
    """

    channels: int
    spatial_stride: int
    temporal_stride: int
    patch: Sequence[int]
    layered: bool = False

    def __post_init__(self) -> None:
        """A patch read from YAML is a list; each layer is a latent frame of its own."""
        object.__setattr__(self, "patch", tuple(self.patch))
        if self.layered and self.temporal_stride != 1:
            raise ValueError(
                f"model.latents.layered=true needs model.latents.temporal_stride=1, got {self.temporal_stride}"
            )

    @property
    def frames(self) -> FrameAxis:
        """What the frame axis is."""
        return Layers() if self.layered else Moments()

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
class ImageInputs:
    """Which images a family sees besides noisy latents.

    Attributes:
        least: Control images that every sample has at least (edited image, references).
        most: Control images that a sample has at most.
        first_frame: The clip's own first frame is the (only) conditioning image: image to video.
        in_text: The text encoder sees the images, so that text is cached per caption and images.
        in_negative: It sees them with a negative prompt too.
    """

    least: int = 0
    most: int = 0
    first_frame: bool = False
    in_text: bool = False
    in_negative: bool = True


@dataclass(frozen=True)
class Prompt:
    """What a text encoder reads: a caption, and the conditioning images where it sees them (RGB, any size)."""

    text: str
    images: tuple[Image.Image, ...] = ()


@runtime_checkable
class Encoders(Protocol):
    """VAE, text and image encoders of a family; only preparing and sampling load them, each on first use.

    Attributes:
        seconds_loading: How long that took so far.
    """

    seconds_loading: float

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Conditioning]:
        """One unbatched record per prompt, on the CPU, its image fields None.

        Text is trimmed to its true length wherever padding carries nothing of its own.
        """
        ...

    def unread(self, captions: Sequence[str]) -> list[str]:
        """Of each caption the words beyond the length that the text encoder reads; "" where it reads all of them."""
        ...

    def encode_pixels(self, pixels: Float[Tensor, "b channels frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Normalised float32 latents on the CPU of pixels in [-1, 1]: RGB, or RGBA for layered families."""
        ...

    def encode_images(
        self, pixels: Float[Tensor, "1 channels frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """The image fields of one sample's record, unbatched, on the CPU; {} for families that see none.

        Args:
            pixels: The sample itself, as `encode_pixels` takes it; image to video looks at its first frame.
            controls: Its control images, RGB at their own size.
        """
        ...

    def decode_bytes(self, shape: Sequence[int]) -> int:
        """Bytes at the peak of decoding one sample's latents `(c, f, h, w)` by the VAE, its weights among them.

        Counted on the meta device: no weights are read. What kernels take for themselves while they run is not in it.

        Raises:
            ValueError: The VAE's configuration is not there.
        """
        ...

    def release(self) -> None:
        """Free whatever is loaded."""
        ...


@dataclass(frozen=True)
class Generation:
    """One image or clip to generate.

    Attributes:
        width: In pixels, a multiple of the family's pixel step.
        height: The same.
        frames: Frames of the clip; layers of a layered image without the base; 1 for an image.
        steps: Sampling steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        seed: Of the initial noise, drawn on the CPU.
        controls: Conditioning images, RGB.
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


@dataclass(frozen=True)
class Names:
    """How a program names a model's modules in LoRA files.

    Attributes:
        rules: From diffusers' names; () where they are diffusers' own.
        prefix: What stands before them; None: what the format has.
    """

    rules: tuple[NativeRule, ...] = ()
    prefix: str | None = None


@dataclass(frozen=True)
class ModelId:
    """What other programs call a model in the metadata of LoRA files.

    The names are musubi-tuner's where it has the model, so that LoRAs of both are listed together: variants that share
    one there share it here.

    Attributes:
        architecture: For ModelSpec, which adds `/lora` (musubi-tuner's utils/sai_model_spec.py).
        implementation: Address of the original's code (the same file).
        version: For `ss_base_model_version` (musubi-tuner's dataset/architectures.py, the names in full).
    """

    architecture: str
    implementation: str
    version: str


Ready = Callable[[str, nn.Module], None]


@dataclass(kw_only=True, eq=False)
class Architecture(ABC):
    """What mpp needs to know about a DiT family: its settings, what follows from them, and what it does.

    This is the contract, and the only place that states it. Constructing one loads nothing.

    Args:
        pretrained: Diffusers folder or hub id.
        lora_targets: Modules that adapters attach to by default: names, or one regex over full names.
        latents: Shape of the latents.
        sigma: Training law of sigma.
        loras: LoRAs that belong to the base, such as those that make it fast or undo that: frozen, below what is
            trained, on for teacher and student; files of any program with a strength, `FILE:1.0`.

    Attributes:
        family: Name of what its caches hold, e.g. `wan`, `wan_i2v`: variants that cache other things differ in it.
        model_id: What other programs call it.
        conditioning: The record type its caches hold.
        images: Which images it sees besides noisy latents.
        cached_settings: Names of the settings that shape what is cached; a cache belongs to them.
        given_frames: Leading latent frames of a sample that the model is given clean, by its conditioning, and that
            are therefore neither noised nor part of the loss: the DataModule leaves them out of latents and mask.
        least_frames: Latent frames that a sample has at least; 2 where the first is no task, because the model sees it.
        boundaries: Sigmas, ascending, at or above which the next expert takes over; () with a single transformer.
        folders: Folder of each transformer in its diffusers pipeline, by expert; a lone transformer is called `""`.
        native: How the original implementation names the modules; () where they have diffusers' names.
        named_by: How programs name them in LoRA files that name them otherwise than the original, by the format.
        unquantised: Regexes on the names of linear layers in its blocks that are never quantised: modulation, and
            layers of embedders.
        kept: Regexes on the names of blocks that are not computed again in the backward pass, by diffusers' own way.
        offload: Whether the blocks of an expert that is not in use wait in the CPU's memory.
        guidance_scale: Guidance that samples are generated with unless told otherwise.
        steps: Sampling steps unless told otherwise.
        fps: Frames per second of the clips that it was trained on; None for models of images.
    """

    pretrained: str
    lora_targets: str | Sequence[str]
    latents: LatentSpec
    sigma: SigmaLaw
    loras: str | Sequence[str] = ()

    family: ClassVar[str]
    model_id: ClassVar[ModelId]
    conditioning: ClassVar[type[Conditioning]]
    images = ImageInputs()
    cached_settings = ()
    given_frames = 0
    least_frames = 1
    boundaries = ()
    folders = MappingProxyType({"": "transformer"})
    native = ()
    named_by: ClassVar[Mapping[str, Names]] = MappingProxyType({})
    unquantised: ClassVar[Sequence[str]] = ()
    kept: ClassVar[Sequence[str]] = ()
    offload = False
    guidance_scale = 1.0
    steps = 30
    fps = None

    def __post_init__(self) -> None:
        """What is read from YAML is a list; one LoRA may stand alone."""
        self.loras = (self.loras,) if isinstance(self.loras, str) else tuple(self.loras)
        if not isinstance(self.lora_targets, str):
            self.lora_targets = tuple(self.lora_targets)

    @property
    def cache_settings(self) -> dict[str, object]:
        """The settings that shape what is cached, by name."""
        return {name: getattr(self, name) for name in self.cached_settings}

    def names_in(self, format: str) -> Names:
        """How modules are called in LoRA files of a format, `comfyui` or `kohya`."""
        return self.named_by.get(format, Names(self.native))

    @abstractmethod
    def check(self) -> None:
        """Refuse settings and sources that cannot work, without loading weights.

        Raises:
            ValueError: Says which.
        """

    @abstractmethod
    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints of the weights. `fetch` downloads VAE and text encoder where they are on a hub."""

    @abstractmethod
    def load_transformer(self, ready: Ready | None = None) -> nn.Module:
        """The frozen transformer, a diffusers model, or `Experts` that hold several.

        Args:
            ready: Called with the name of each block in the transformer, and the block, as soon as its weights are
                there, and before those of the next one are. Blocks that a file has in fp8 come so, to whoever waits for
                them; without `ready` they are dequantised.
        """

    def stored(self) -> Mapping[str, str]:
        """What the weights of transformers lie in where that is no full precision: `fp8` or `gguf` by the part."""
        return {}

    @abstractmethod
    def skeleton(self, *, published: bool = False) -> nn.Module:
        """The same without weights, on the meta device, in the precisions that they are loaded in.

        Args:
            published: Fetch nothing: of a hub id that is not on this machine take what is known of its shape.
        """

    def blocks(self, transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The transformer's repeated blocks, which hold all its attention, and their names in it.

        They come in the order in which they run, those of experts by ascending sigma; none lies in another.
        """
        for part, model in parts_of(transformer):
            yield from repeated(model, f"{part}." if part else "")

    def quantisable(self, transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
        """The linear layers that a quantised base has in fewer bits, and their names in the transformer."""
        for block_name, block in self.blocks(transformer):
            for name, module in block.named_modules(prefix=block_name):
                if isinstance(module, nn.Linear) and not any(re.search(p, name) for p in self.unquantised):
                    yield name, module

    @abstractmethod
    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> Encoders:
        """VAE, text and image encoders on `device`, each loaded when first used.

        Args:
            device: Where they run.
            memory: How they fit; None: as they are.

        Raises:
            ValueError: The family has nothing that `memory` could be about.
        """

    @abstractmethod
    def collate(self, items: Sequence[Conditioning]) -> Conditioning:
        """One batch of conditioning: pads, masks or fixes lengths as the family wants it."""

    @abstractmethod
    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> Conditioning:
        """One sample's unbatched record of the sizes that training sees, of zeros: to count with.

        Args:
            config: Configuration of the transformer.
            shape: Of the sample's latents, with the frames that the model is given: (channels, frames, height, width).
        """

    @abstractmethod
    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """The transformer's prediction of `noise - latents` at sigma in [0, 1]."""

    @abstractmethod
    def generate(
        self,
        transformer: nn.Module,
        encoders: Encoders,
        positive: Conditioning,
        negative: Conditioning | None,
        generation: Generation,
    ) -> Float[Tensor, "frames channels height width"]:
        """Generate with diffusers' own pipeline; pixels in [0, 1] on the CPU, RGB or RGBA.

        Args:
            transformer: With its adapters on or off, as the caller wants them.
            encoders: Whose VAE decodes; no text encoder is loaded.
            positive: Conditioning as `collate` gives it for one sample.
            negative: Of the negative prompt; None without guidance.
            generation: Sizes, steps, guidance, seed and images.
        """


def repeated(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The members of all lists of one class that lie in no other: so every family keeps what it repeats, in order."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            yield from ((f"{prefix}{name}.{number}", block) for number, block in enumerate(child))
        else:
            yield from repeated(child, f"{prefix}{name}.")


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
