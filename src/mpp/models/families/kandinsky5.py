"""Kandinsky 5 Lite and Pro, text to video, on diffusers' `Kandinsky5Transformer3DModel`; one frame is an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Generation, LatentSpec, ModelId, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of
from mpp.models.padding import pad_with_mask
from mpp.models.text_limit import TextLimit, before_caption

_LONGEST_TEXT = 1024  # positions of the transformer's Kandinsky5RoPE1D

# Private to diffusers: tests/models/test_private.py says when it changes.
_rotary_scale = Kandinsky5T2VPipeline._get_scale_factor  # noqa: SLF001


@dataclass(frozen=True)
class Kandinsky5Conditioning(Conditioning):
    """What Kandinsky 5 sees besides noisy latents.

    Attributes:
        text: Qwen2.5-VL's states, `(tokens, dim)`; batched zero-padded to the longest.
        pooled: CLIP's pooled state, `(dim,)`.
        mask: Real tokens of a batch, `(b, tokens)`; None for one sample.
    """

    text: Tensor
    pooled: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> "Kandinsky5Conditioning":
        """The same on another device, but for the mask: it only says where the host groups texts, without waiting."""
        return replace(super().to(device), mask=self.mask)


@dataclass(kw_only=True, eq=False)
class Kandinsky5(Family):
    """Kandinsky 5 text to video, those models with regular attention (5 seconds).

    Args:
        text_encoder: Folder or hub id of Qwen2.5-VL and CLIP with their tokenizers; None: `pretrained`.
        text_length: Qwen tokens that a caption has at most; longer ones are cut as the pipeline cuts them.

    Raises:
        ValueError: An unknown dtype, or a text length out of range.
    """

    # all attention and feed-forward layers of both kinds of blocks, as musubi-tuner's networks/lora_kandinsky.py
    lora_targets: str | Sequence[str] = (
        r"(text|visual)_transformer_blocks\.\d+\.((self|cross)_attention\.(to_(query|key|value)|out_layer)"
        r"|feed_forward\.(in|out)_layer)"
    )
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, patch=(1, 2, 2))
    # scheduler_scale of the original's kandinsky/t2v_pipeline.py, and musubi-tuner's shift
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=5.0)
    text_length: int = 512

    family = "kandinsky5"
    model_id = ModelId("Kandinsky-5", "https://github.com/kandinskylab/kandinsky-5", "kandinsky5")
    conditioning = Kandinsky5Conditioning
    transformer_class = Kandinsky5Transformer3DModel
    unquantised = (r"_modulation\.",)
    text_components = ("text_encoder", "text_encoder_2")
    guidance_scale = 5.0  # Kandinsky5T2VPipeline.__call__
    steps = 50
    fps = 24.0  # its published samples are at 24

    def __post_init__(self) -> None:
        """Refuse texts longer than the model knows."""
        super().__post_init__()
        if not 1 <= self.text_length < _LONGEST_TEXT:
            raise ValueError(
                f"model.text_length must be 1 to {_LONGEST_TEXT - 1} for Kandinsky 5, got {self.text_length}"
            )

    def expected_config(self) -> dict[str, object]:
        """Channels, and no sparse attention: the 10-second models' masks go with one clip size."""
        return {
            "in_visual_dim": self.latents.channels,
            "patch_size": list(self.latents.patch),
            "attention_type": "regular",
        }

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "Kandinsky5Encoders":
        """VAE and text encoders on `device`, each loaded when first used."""
        return Kandinsky5Encoders(self, device, memory)

    def collate(self, items: Sequence[Kandinsky5Conditioning]) -> Kandinsky5Conditioning:
        """Stack, with a mask that tells real tokens from padding."""
        text, mask = pad_with_mask([item.text for item in items])
        return Kandinsky5Conditioning(text, torch.stack([item.pooled for item in items]), mask)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> Kandinsky5Conditioning:
        """Zeros for a text of `text_length` tokens."""
        del shape
        text = torch.zeros(self.text_length, config["in_text_dim"], dtype=DTYPES[self.text_dtype])
        return Kandinsky5Conditioning(text, torch.zeros(config["in_text_dim2"], dtype=DTYPES[self.text_dtype]))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Kandinsky5Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`.

        The transformer knows no text mask and attends to padding, so samples whose texts are equally long go through
        it together, others apart.
        """
        groups: dict[int, list[int]] = {}
        for sample, length in enumerate(conditioning.mask.sum(1).tolist()):
            groups.setdefault(length, []).append(sample)
        if len(groups) == 1:
            (length,) = groups
            return self._predict(transformer, noisy, sigma, conditioning.text[:, :length], conditioning.pooled)
        parts = [
            self._predict(
                transformer, noisy[rows], sigma[rows], conditioning.text[rows, :length], conditioning.pooled[rows]
            )
            for length, rows in groups.items()
        ]
        order = torch.tensor([sample for rows in groups.values() for sample in rows], device=noisy.device)
        return torch.cat(parts)[order.argsort()]

    def _predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "n c f h w"],
        sigma: Float[Tensor, " n"],
        text: Float[Tensor, "n tokens dim"],
        pooled: Float[Tensor, "n pooled"],
    ) -> Float[Tensor, "n c f h w"]:
        """Samples with texts of one length. Time is 1000 * sigma, in float32 whatever the weights are."""
        dtype, device = transformer.visual_embeddings.in_layer.weight.dtype, noisy.device
        count, channels, frames, height, width = noisy.shape
        visual = noisy.permute(0, 2, 3, 4, 1).to(dtype)
        if transformer.visual_cond:  # no condition and its mask, as Kandinsky5T2VPipeline.prepare_latents
            visual = torch.cat([visual, visual.new_zeros(count, frames, height, width, channels + 1)], -1)
        grid = [size // step for size, step in zip((frames, height, width), self.latents.patch, strict=True)]
        stride = self.latents.spatial_stride
        prediction = transformer(
            hidden_states=visual,
            encoder_hidden_states=text.to(dtype),
            timestep=sigma.float() * 1000,
            pooled_projections=pooled.to(dtype),
            visual_rope_pos=[torch.arange(size, device=device) for size in grid],
            text_rope_pos=torch.arange(text.shape[1], device=device),
            scale_factor=_rotary_scale(None, height * stride, width * stride),
            return_dict=False,
        )
        return prediction.permute(0, 4, 1, 2, 3)

    def pipeline(self, transformer: nn.Module, encoders: "Kandinsky5Encoders") -> Kandinsky5T2VPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        return Kandinsky5T2VPipeline(
            transformer=transformer,
            vae=encoders.vae(),
            scheduler=self.scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0)),
            **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        )

    def arguments(
        self, positive: Kandinsky5Conditioning, negative: Kandinsky5Conditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings with their lengths, guidance and frames."""
        arguments = {"guidance_scale": generation.guidance_scale, "num_frames": generation.frames}
        for prefix, record in (("", positive), ("negative_", negative)):
            if record is not None:
                arguments[f"{prefix}prompt_embeds_qwen"] = record.text
                arguments[f"{prefix}prompt_embeds_clip"] = record.pooled
                arguments[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, record.text.shape[1]])
        return arguments


class Kandinsky5Encoders(FamilyEncoders):
    """AutoencoderKLHunyuanVideo, Qwen2.5-VL and CLIP, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLHunyuanVideo
    model: Kandinsky5

    def _text_pipeline(self) -> Kandinsky5T2VPipeline:
        return Kandinsky5T2VPipeline(
            transformer=None,
            vae=None,
            scheduler=None,
            text_encoder=self.encoder(Qwen2_5_VLForConditionalGeneration),
            tokenizer=self.tokenizer(),  # all that the processor is for texts; its part for videos needs torchvision
            text_encoder_2=self.encoder(CLIPTextModel, "text_encoder_2"),
            tokenizer_2=self.tokenizer("tokenizer_2"),
        )

    def text_limit(self) -> TextLimit:
        """Qwen's, behind the pipeline's template; CLIP's 77 tokens make but one pooled vector."""
        pipe = self._text_pipeline()
        tokens = pipe.prompt_template_encode_start_idx + self.model.text_length
        return TextLimit(self.tokenizer(), tokens, before_caption(pipe.prompt_template))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[Kandinsky5Conditioning]:
        """Qwen's states after the pipeline's template, and CLIP's pooled state, by diffusers' pipeline.

        One caption at a time: the pipeline gives Qwen no mask.
        """
        pipe = self._text_pipeline()
        records = []
        for caption in captions_of(prompts):
            text, pooled, _ = pipe.encode_prompt(
                caption, max_sequence_length=self.model.text_length, device=self.text_device
            )
            records.append(Kandinsky5Conditioning(text[0].cpu(), pooled[0].cpu()))
        return records

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `z * scaling_factor` in float32."""
        vae = self.vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        return latents * vae.config.scaling_factor

    def check_vae(self, vae: AutoencoderKLHunyuanVideo) -> None:
        """Refuse a VAE of another latent shape."""
        spec, made = self.model.latents, vae.config
        if (made.latent_channels, made.spatial_compression_ratio) != (spec.channels, spec.spatial_stride):
            raise ValueError(
                f"model.vae={self.model.vae} makes {made.latent_channels} channels at stride "
                f"{made.spatial_compression_ratio}, the model needs {spec.channels} at {spec.spatial_stride}"
            )
