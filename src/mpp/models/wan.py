"""WAN 2.1 and 2.2 on diffusers' `WanTransformer3DModel`: text to video (one frame is an image) and image to video."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPVisionModel, UMT5EncoderModel

from mpp.core.flow import SigmaLaw
from mpp.models.base import Identity, LatentSpec, PictureInputs, Prompt, Shot
from mpp.models.conditioning import Tensors
from mpp.models.experts import Experts
from mpp.models.family import Family, FamilyEncoders, captions_of
from mpp.models.padding import pad_text
from mpp.models.single_file import SingleFile
from mpp.models.wan_parts import NATIVE, PreparedImageToVideo, WanConditioning, read_config, stack

_CLIP_TEXT = 512  # diffusers' attention takes all tokens before the last 512 for the picture's
_BOUNDARY = {False: 0.875, True: 0.9}  # text and image to video: wan_t2v_A14B.py, wan_i2v_A14B.py of Wan2.2
_GUIDANCE = {"high": 4.0, "low": 3.0, "both": 3.5}  # wan_t2v_A14B.py; both get one number, so between the two


@dataclass(kw_only=True, eq=False)
class Wan(Family):
    """WAN 2.1 and 2.2.

    With `expert` high or low the range of `sigma` should be that expert's. CLIP is float32 whatever `text_dtype` is, as
    in diffusers' examples.

    Args:
        text_encoder: Folder or hub id of UMT5 and its tokenizer, and of CLIP and its processor; None: `pretrained`.
        image_to_video: The clip's first frame is given: as further input channels, or (`expand_timesteps`) in place of
            the first latent frame.
        clip_dim: Width of the CLIP features of the first frame that WAN 2.1 image to video sees, 1280 in the published
            ones; None: it sees none.
        expand_timesteps: TI2V-5B, whose tokens each have a timestep; as in diffusers' `model_index.json`.
        expert: WAN 2.2 A14B is two transformers; `high` serves sigmas from the boundary up (diffusers folder
            `transformer`), `low` those below (`transformer_2`), `both` trains an adapter on each. None: models with
            one transformer. Samples of `high` or `low` are painted by that expert alone, from start to end.
        boundary: Sigma from which on the high noise expert serves, for `both`; None: 0.875, for image to video 0.9.
        pretrained_low: Source of the low noise expert, for `both`; None: `pretrained` is a folder or hub id with both.
        offload: For `both`, keep the expert that is not in use on the CPU.
        text_length: Tokens that every caption is padded to. WAN attends to padding, so it is part of the model.

    Raises:
        ValueError: An unknown dtype or expert, or settings that exclude one another.
    """

    # all attention and feed-forward layers of the blocks, as musubi-tuner's networks/lora_wan.py
    lora_targets: str | Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, patch=(1, 2, 2))
    # musubi-tuner's docs/wan.md, and flow_shift of the pipeline's scheduler
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=3.0)
    text_length: int = 512
    image_to_video: bool = False
    clip_dim: int | None = None
    expand_timesteps: bool = False
    expert: Literal["high", "low", "both"] | None = None
    boundary: float | None = None
    pretrained_low: str | None = None
    offload: bool = True

    conditioning = WanConditioning
    transformer_class = WanTransformer3DModel
    single_file = SingleFile("head.head.weight", read_config, convert_wan_transformer_to_diffusers)
    native = NATIVE

    def __post_init__(self) -> None:
        """What follows from the settings, which must go together."""
        super().__post_init__()
        self._check_settings()
        if self.expert == "low":
            self.folders = {"": "transformer_2"}
        if self.expert == "both":
            self.folders = {"low": "transformer_2", "high": "transformer"}
            self.boundaries = (_BOUNDARY[self.image_to_video] if self.boundary is None else self.boundary,)
        if self.image_to_video:
            self.pictures = PictureInputs(first_frame=True)
            self.given_frames = int(self.expand_timesteps)
            self.least_frames = 2
        if self.clip_dim is not None:
            self.text_components = ("text_encoder", "image_encoder")
        kinds = ("wan_i2v_clip" if self.clip_dim else "wan_i2v") if self.image_to_video else "wan"
        self.family = kinds.replace("wan", "wan_ti2v") if self.expand_timesteps else kinds
        # Wan2.1 generate.py, Wan2.2 wan_{t2v,i2v}_A14B.py and wan_ti2v_5B.py
        self.guidance_scale = 5.0 if self.expert is None else 3.5 if self.image_to_video else _GUIDANCE[self.expert]
        self.fps = 24.0 if self.expand_timesteps else 16.0  # sample_fps in Wan2.2's wan/configs
        self.steps = 40 if self.expert or (self.image_to_video and not self.expand_timesteps) else 50

    def _check_settings(self) -> None:
        if self.expert not in (None, "high", "low", "both"):
            raise ValueError(f"model.expert must be high, low, both or null, got {self.expert!r}")
        if self.expert != "both" and (self.boundary is not None or self.pretrained_low):
            raise ValueError("model.boundary and model.pretrained_low are for model.expert=both; leave them null")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ValueError(f"model.boundary must lie between 0 and 1, got {self.boundary}")
        if self.expand_timesteps and (self.expert or self.clip_dim):
            raise ValueError("model.expand_timesteps is TI2V-5B, which has neither experts nor CLIP; leave those null")
        if self.clip_dim and (self.expert or not self.image_to_video):
            raise ValueError("model.clip_dim is for WAN 2.1 image to video; leave it null for all others")
        if self.clip_dim and self.text_length != _CLIP_TEXT:
            raise ValueError(
                f"model.text_length must be {_CLIP_TEXT} where the model sees CLIP features, got {self.text_length}: "
                "its attention tells text from picture by this number"
            )

    # ---------------------------------------------------------------- weights

    def _experts(self) -> dict[str, "Wan"]:
        """The two experts as families of their own, in ascending order of sigma."""
        if self.pretrained_low is None and self.pretrained.endswith(".safetensors"):
            raise ValueError(
                f"model.pretrained={self.pretrained}: diffusers cannot load a pair of experts from a single file; give "
                "a diffusers folder or a hub id, or set model.pretrained_low to the file of the low noise expert"
            )
        alone = {"boundary": None, "pretrained_low": None}
        low = replace(self, expert="low", pretrained=self.pretrained_low or self.pretrained, **alone)
        return {"low": low, "high": replace(self, expert="high", **alone)}

    def expected_config(self) -> dict[str, object]:
        """Channels, and what of the pictures it sees."""
        channels = self.latents.channels
        seen = channels + self.latents.temporal_stride  # a mask of the pixel frames, and latents
        concatenated = self.image_to_video and not self.expand_timesteps
        return {
            "in_channels": channels + (seen if concatenated else 0),
            "image_dim": self.clip_dim,
            "pos_embed_seq_len": None,  # else it sees the last frame too
        }

    def check(self) -> None:
        """Refuse transformers that are not there, not loadable here, or of another shape; loads no weights."""
        if self.expert != "both":
            super().check()
            return
        experts = self._experts().values()
        for expert in experts:
            expert.check()
        low, high = (expert.identity().transformer for expert in experts)
        if low is not None and low == high:
            raise ValueError(
                f"model.pretrained={self.pretrained} gives both experts the same weights; set model.pretrained_low to "
                "the low noise expert's"
            )

    def identity(self, *, fetch: bool = False) -> Identity:
        """Fingerprints; that of both experts is `low+high`."""
        if self.expert != "both":
            return super().identity(fetch=fetch)
        parts = {name: expert.identity(fetch=fetch) for name, expert in self._experts().items()}
        found = [part.transformer for part in parts.values()]
        return replace(parts["high"], transformer=None if None in found else "+".join(found))

    def load_transformer(self) -> nn.Module:
        """The frozen transformer, or both."""
        if self.expert != "both":
            return super().load_transformer()
        parts = {name: expert.load_transformer() for name, expert in self._experts().items()}
        return Experts(parts, offload=self.offload)

    def skeleton(self) -> nn.Module:
        """The same without weights, on the meta device."""
        if self.expert != "both":
            return super().skeleton()
        return Experts({name: part.skeleton() for name, part in self._experts().items()}, offload=self.offload)

    # ---------------------------------------------------------------- training

    def load_encoders(self, device: torch.device | str) -> "WanEncoders":
        """VAE, text and picture encoder on `device`, each loaded when first used."""
        return WanEncoders(self, device)

    def collate(self, items: Sequence[WanConditioning]) -> WanConditioning:
        """Zero-pad every text to `text_length`: WAN is trained to attend to exactly this padding."""
        text = pad_text([item.text for item in items], self.text_length)
        return WanConditioning(text, stack([i.image for i in items]), stack([i.condition for i in items]))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: WanConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`, of each sample by the expert that serves its sigma."""
        if not isinstance(transformer, Experts):
            return self._predict(transformer, noisy, sigma, conditioning)
        return transformer.predict(
            sigma,
            self.boundaries,
            lambda expert, rows: self._predict(expert, noisy[rows], sigma[rows], conditioning.select(rows)),
        )

    def _predict(
        self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditioning: WanConditioning
    ) -> Float[Tensor, "b c f h w"]:
        """WAN takes timesteps 1000 * sigma, in float32 whatever the weights are, and 0 where latents are given."""
        dtype = transformer.patch_embedding.weight.dtype
        inputs, timestep = noisy, sigma.float() * 1000
        if self.given_frames:
            inputs = torch.cat([conditioning.condition.to(noisy), noisy], dim=2)
            _, rows, columns = self.latents.patch
            cells = (inputs.shape[3] // rows) * (inputs.shape[4] // columns)
            timestep = timestep[:, None].repeat(1, inputs.shape[2] * cells)
            timestep[:, :cells] = 0
        elif self.image_to_video:
            inputs = torch.cat([noisy, conditioning.condition.to(noisy)], dim=1)
        image = conditioning.image
        (prediction,) = transformer(
            hidden_states=inputs.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.text.to(dtype),
            encoder_hidden_states_image=None if image is None else image.to(dtype),
            return_dict=False,
        )
        return prediction[:, :, self.given_frames :]

    # ---------------------------------------------------------------- samples

    def pipeline(self, transformer: nn.Module, encoders: "WanEncoders") -> DiffusionPipeline:
        """Diffusers' pipeline around the transformer, or both, and the VAE."""
        parts = {"transformer": transformer}
        if isinstance(transformer, Experts):
            parts = {"transformer": transformer["high"], "transformer_2": transformer["low"]}
            parts["boundary_ratio"] = self.boundaries[0]
        kind = PreparedImageToVideo if self.image_to_video else WanPipeline
        shift = self.sigma.shift if isinstance(self.sigma.shift, int | float) else 3.0
        return kind(
            tokenizer=None,
            text_encoder=None,
            vae=encoders.vae(),
            scheduler=self.scheduler(FlowMatchEulerDiscreteScheduler(shift=float(shift))),
            expand_timesteps=self.expand_timesteps,
            **parts,
        )

    def arguments(self, positive: WanConditioning, negative: WanConditioning | None, shot: Shot) -> dict[str, Any]:
        """Embeddings, guidance, frames, and the first frame for image to video."""
        arguments = {
            "prompt_embeds": positive.text,
            "negative_prompt_embeds": None if negative is None else negative.text,
            "guidance_scale": shot.guidance_scale,
            "num_frames": shot.frames,
        }
        if self.image_to_video:
            if len(shot.controls) != 1:
                raise ValueError(f"image to video starts from one picture, the sample has {len(shot.controls)}")
            arguments |= {"image": shot.controls[0], "prepared": positive.image}
        return arguments

    def sample(
        self,
        transformer: nn.Module,
        encoders: "WanEncoders",
        positive: WanConditioning,
        negative: WanConditioning | None,
        shot: Shot,
    ) -> Float[Tensor, "frames channels height width"]:
        """Paint with diffusers' own pipeline, each expert brought into use when the pipeline comes to it."""
        with transformer.on_demand() if isinstance(transformer, Experts) else nullcontext():
            return super().sample(transformer, encoders, positive, negative, shot)


class WanEncoders(FamilyEncoders):
    """AutoencoderKLWan, UMT5 and CLIP, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLWan
    model: Wan

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[WanConditioning]:
        """UMT5's last hidden states, trimmed to each caption's true length (what follows is zero)."""
        pipe = WanPipeline(self.tokenizer(), self.encoder(UMT5EncoderModel), vae=None, scheduler=None)
        states, _ = pipe.encode_prompt(
            captions_of(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.text_length,
            device=self.device,
        )
        lengths = states.any(-1).sum(1).tolist()
        return [WanConditioning(state[:n].cpu().clone()) for state, n in zip(states, lengths, strict=True)]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `(z - mean) / std` per channel in float32."""
        vae = self.vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (latents - mean) / std

    @torch.no_grad()
    def encode_pictures(
        self, pixels: Float[Tensor, "1 3 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """For image to video: the first frame as the transformer takes it, and CLIP's features of it."""
        del controls
        if not self.model.image_to_video:
            return {}
        frames, height, width = pixels.shape[2:]
        clip = self.model.clip_dim is not None
        pipe = WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=self.vae(),
            scheduler=None,
            image_processor=self.tokenizer("image_processor", AutoImageProcessor) if clip else None,
            image_encoder=self.encoder(CLIPVisionModel, "image_encoder", torch.float32) if clip else None,
            expand_timesteps=self.model.expand_timesteps,
        )
        first = pixels[:, :, 0].to(self.device, torch.float32)
        sizes = {"height": height, "width": width, "num_frames": frames, "dtype": torch.float32, "device": self.device}
        condition = pipe.prepare_latents(first, 1, latents=first.new_empty(0), **sizes)[1]  # latents: so none are drawn
        fields = {"condition": condition[0].cpu()}
        if clip:
            picture = ((first[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            fields["image"] = pipe.encode_image(Image.fromarray(picture), self.device)[0].cpu()
        return fields

    def check_vae(self, vae: AutoencoderKLWan) -> None:
        """Refuse a VAE of another latent shape."""
        spec = self.model.latents
        if vae.config.z_dim != spec.channels or vae.config.scale_factor_spatial != spec.spatial_stride:
            raise ValueError(
                f"model.vae={self.model.vae} makes {vae.config.z_dim} channels at stride "
                f"{vae.config.scale_factor_spatial}, the model needs {spec.channels} at {spec.spatial_stride}"
            )
