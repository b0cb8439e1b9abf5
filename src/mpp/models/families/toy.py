"""A toy diffusion transformer for experiments on a CPU: diffusers' WAN class over pixels, conditioned on words.

The codec is `pixel_unshuffle`, exactly invertible; a word's embedding is a fixed function of its spelling, so that
any word works as a trigger; two channels of coordinates join the latents, so that a small transformer can generate
whole objects. The weights are a diffusers folder like any other family's.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Architecture, Generation, Identity, LatentSpec, ModelId, Prompt, Ready
from mpp.models.filling import fill, folder_state
from mpp.models.padding import pad_text
from mpp.models.weights import fingerprint_if_present, resolve_folder


@dataclass(frozen=True)
class ToyConditioning(Conditioning):
    """Word vectors: `(words, dim)` for one caption, `(b, text_length, dim)` batched and zero-padded."""

    text: Tensor


@dataclass(kw_only=True, eq=False)
class Toy(Architecture):
    """The toy family: images of one frame in RGB.

    Args:
        latents: Shape of the latents: `3 * stride ** 2` channels, which are colours of pixels.
        text_dim: Length of a word's vector, a multiple of 8.
        text_length: Words that every caption is padded to; longer captions are refused.

    Raises:
        ValueError: Channels that do not fit the stride, a temporal stride, or a text dimension that is
            no multiple of 8.
    """

    lora_targets: str | Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    latents: LatentSpec = LatentSpec(channels=12, spatial_stride=2, temporal_stride=1, patch=(1, 2, 2))
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=3.0)
    text_dim: int = 48
    text_length: int = 8

    family = "toy"
    model_id = ModelId("mpp-toy", "mpp", "mpp_toy")  # a name that nobody else has
    conditioning = ToyConditioning
    steps = 20

    def __post_init__(self) -> None:
        """Refuse settings that make no toy."""
        super().__post_init__()
        latents = self.latents
        if latents.channels != 3 * latents.spatial_stride**2:
            raise ValueError(
                f"model.latents: stride {latents.spatial_stride} makes {3 * latents.spatial_stride**2} channels of RGB "
                f"pixels, got channels={latents.channels}"
            )
        if latents.temporal_stride != 1:
            raise ValueError(f"model.latents.temporal_stride must be 1 for model=toy, got {latents.temporal_stride}")
        if self.text_dim % 8:
            raise ValueError(f"model.text_dim must be a multiple of 8, got {self.text_dim}")

    def check(self) -> None:
        """Refuse a transformer that is not there or not of the toy's shape; loads no weights."""
        folder = resolve_folder(self.pretrained, "transformer", "model.pretrained")
        config = json.loads((folder / "config.json").read_bytes())
        wanted = {
            "_class_name": "WanTransformer3DModel",
            "in_channels": self.latents.channels + 2,
            "out_channels": self.latents.channels,
            "text_dim": self.text_dim,
            "patch_size": list(self.latents.patch),
        }
        for name, value in wanted.items():
            if config.get(name) != value:
                raise ValueError(
                    f"model.pretrained={self.pretrained} has {name}={config.get(name)}, model=toy needs {value}"
                )

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprint of the transformer; codec and words have no weights, their version stands for them."""
        transformer = fingerprint_if_present(self.pretrained, "transformer", "model.pretrained", fetch=fetch)
        stride = self.latents.spatial_stride
        return Identity(transformer, f"pixel_unshuffle-{stride}", f"words-shake256-{self.text_dim}")

    def load_transformer(self, ready: Ready | None = None) -> WanTransformer3DModel:
        """The frozen transformer in float32."""
        option, transformer = f"model.pretrained={self.pretrained}", self.skeleton()
        state = folder_state(resolve_folder(self.pretrained, "transformer", "model.pretrained"), option)
        fill(transformer, state, torch.float32, option, blocks=self.blocks(transformer), ready=ready)
        return transformer.requires_grad_(False)

    def skeleton(self, *, published: bool = False) -> WanTransformer3DModel:
        """The transformer without weights, on the meta device."""
        del published
        folder = resolve_folder(self.pretrained, "transformer", "model.pretrained")
        with init_empty_weights():
            return WanTransformer3DModel.from_config(json.loads((folder / "config.json").read_bytes()))

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "ToyEncoders":
        """Codec and words; nothing to load, and nothing to save memory with."""
        del device
        for name, default in vars(EncoderMemory()).items():
            if memory is not None and (said := getattr(memory, name)) != default:
                raise ValueError(f"memory.{name}={said}: model=toy has no weights to encode with; leave it out")
        return ToyEncoders(self)

    def collate(self, items: Sequence[ToyConditioning]) -> ToyConditioning:
        """Zero-pad every caption to `text_length` words."""
        return ToyConditioning(pad_text([item.text for item in items], self.text_length))

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> ToyConditioning:
        """Zeros for a text of `text_length` tokens."""
        del config, shape
        return ToyConditioning(torch.zeros(self.text_length, self.text_dim))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: ToyConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; timesteps are 1000 * sigma."""
        (prediction,) = transformer(
            hidden_states=with_coordinates(noisy),
            timestep=sigma * 1000,
            encoder_hidden_states=conditioning.text,
            return_dict=False,
        )
        return prediction

    @torch.no_grad()
    def generate(
        self,
        transformer: nn.Module,
        encoders: "ToyEncoders",
        positive: ToyConditioning,
        negative: ToyConditioning | None,
        generation: Generation,
    ) -> Float[Tensor, "frames channels height width"]:
        """Generate with diffusers' Euler scheduler; pixels in [0, 1]. No guidance: `negative` is not used."""
        del negative
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(generation.steps)
        shape = self.latents.shape(generation.frames, generation.height, generation.width)
        device = next(transformer.parameters()).device
        latents = torch.randn((1, *shape), generator=torch.Generator().manual_seed(generation.seed)).to(device)
        for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            velocity = self.velocity(transformer, latents, sigma.to(device).expand(1), positive)
            (latents,) = scheduler.step(velocity, timestep, latents, return_dict=False)
        return (encoders.decode_pixels(latents.cpu())[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1)


class ToyEncoders:
    """`pixel_unshuffle` as VAE, fixed word vectors as text encoder."""

    seconds_loading = 0.0

    def __init__(self, architecture: Toy) -> None:
        self.architecture = architecture

    def encode_text(self, prompts: Sequence[Prompt]) -> list[ToyConditioning]:
        """One vector per word, split at white space.

        Raises:
            ValueError: A caption of more than `text_length` words.
        """
        limit, dim = self.architecture.text_length, self.architecture.text_dim
        captions = [prompt.text for prompt in prompts]
        for caption in captions:
            if len(caption.split()) > limit:
                raise ValueError(f"caption {caption!r} has {len(caption.split())} words, model=toy takes {limit}")
        return [
            ToyConditioning(torch.stack([word_vector(word, dim) for word in caption.split()] or [torch.zeros(dim)]))
            for caption in captions
        ]

    def unread(self, captions: Sequence[str]) -> list[str]:
        """Nothing is cut: longer captions are refused."""
        return [""] * len(captions)

    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Blocks of pixels as channels, exactly invertible by `decode_pixels`."""
        frames = pixels.shape[2]
        flat = pixels.float().transpose(1, 2).flatten(0, 1)
        latents = functional.pixel_unshuffle(flat, self.architecture.latents.spatial_stride)
        return latents.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()

    def encode_images(
        self, pixels: Float[Tensor, "1 channels frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Nothing: the toy sees no images."""
        del pixels, controls
        return {}

    def decode_pixels(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 frames height width"]:
        """Inverse of `encode_pixels`."""
        frames = latents.shape[2]
        flat = latents.transpose(1, 2).flatten(0, 1)
        pixels = functional.pixel_shuffle(flat, self.architecture.latents.spatial_stride)
        return pixels.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()

    def decode_bytes(self, shape: Sequence[int]) -> int:
        """None: the CPU shuffles pixels."""
        del shape
        return 0

    def release(self) -> None:
        """Nothing to free."""


def word_vector(word: str, dim: int) -> Float[Tensor, " dim"]:
    """A word's vector of `dim` signs, -1 or 1: the bits of SHAKE-256 of its UTF-8 bytes."""
    digest = np.frombuffer(hashlib.shake_256(word.encode()).digest(dim // 8), np.uint8)
    return torch.from_numpy(np.unpackbits(digest)).float() * 2 - 1


def with_coordinates(noisy: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c_plus_2 f h w"]:
    """Append x and y of every cell, each from -1 to 1, as two channels."""
    b, _, f, h, w = noisy.shape
    y = torch.linspace(-1, 1, h, device=noisy.device, dtype=noisy.dtype).view(1, 1, 1, h, 1)
    x = torch.linspace(-1, 1, w, device=noisy.device, dtype=noisy.dtype).view(1, 1, 1, 1, w)
    return torch.cat([noisy, x.expand(b, 1, f, h, w), y.expand(b, 1, f, h, w)], dim=1)
