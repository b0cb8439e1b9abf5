"""LTX-2, text to video, on diffusers' `LTX2VideoTransformer3DModel`; one frame is an image.

The model makes video and sound, and each attends to the other. Here it runs on video alone, as Lightricks' own trainer
does for data without sound: the attention between the two is skipped in every block, so that the prediction for video
does not depend on sound at all. The transformer still wants some sound; it gets a token of zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2HDRPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.video_processor import VideoProcessor
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration

from mpp.core.flow import LinearShift, SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Generation, LatentSpec, ModelId, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.weights import resolve_folder

_HEAD_DIM, _AUDIO_HEAD_DIM = 128, 64  # of the published LTX-2; single files do not state them
_OTHERS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")  # also in the published single file
# diffusers, scripts/convert_ltx2_to_diffusers.py; for single files, which hold no scheduler
_SHIFT = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
_SCHEDULE = {**_SHIFT, "use_dynamic_shifting": True, "shift_terminal": 0.1}

# Private to diffusers: tests/models/test_private.py says when it changes.
_pack, _unpack = LTX2Pipeline._pack_latents, LTX2Pipeline._unpack_latents  # noqa: SLF001
_normalize = LTX2Pipeline._normalize_latents  # noqa: SLF001


@dataclass(frozen=True)
class LTX2Conditioning(Conditioning):
    """The video connector's output: `(text_length, dim)` for one caption, `(b, text_length, dim)` batched."""

    text: Tensor


def _config(shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of an LTX-2 transformer, read off its tensors' shapes."""
    dim, channels = shapes["patchify_proj.weight" if native else "proj_in.weight"]
    audio_dim, audio_channels = shapes["audio_patchify_proj.weight" if native else "audio_proj_in.weight"]
    if dim % _HEAD_DIM or audio_dim % _AUDIO_HEAD_DIM:
        raise ValueError(
            f"widths {dim} and {audio_dim} are no multiples of LTX-2's head sizes {_HEAD_DIM} and {_AUDIO_HEAD_DIM}"
        )
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": dim // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "audio_in_channels": audio_channels,
        "audio_out_channels": shapes["audio_proj_out.weight"][0],
        "audio_num_attention_heads": audio_dim // _AUDIO_HEAD_DIM,
        "audio_attention_head_dim": _AUDIO_HEAD_DIM,
        "audio_cross_attention_dim": shapes["transformer_blocks.0.audio_attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "rope_type": "split",
    }


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' state of the transformer alone."""
    return convert_ltx2_transformer_to_diffusers({k: v for k, v in state.items() if not k.startswith(_OTHERS)})


@dataclass(kw_only=True, eq=False)
class LTX2(Family):
    """LTX-2 text to video without sound (and text to image: one frame).

    Args:
        text_encoder: Folder or hub id of Gemma 3, its tokenizer and the text connectors; None: `pretrained`.
        text_length: Tokens of every caption, a multiple of the connectors' registers. They fill up with registers,
            which the model attends to, so it is part of the model.
        fps: Frames per second of the clips: the model places frames in seconds.

    Raises:
        ValueError: An unknown dtype, or no frames per second.
    """

    # attention and feed-forward layers of the video: Lightricks/LTX-2, packages/ltx-trainer/docs/training-modes.md,
    # video-only; those of the sound would learn nothing
    lora_targets: str | Sequence[str] = (
        r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
    )
    latents: LatentSpec = LatentSpec(channels=128, spatial_stride=32, temporal_stride=8, patch=(1, 1, 1))
    # towards noise, more so for larger clips: packages/ltx-trainer/src/ltx_trainer/timestep_samplers.py. Later versions
    # hold the shift beyond 4096 tokens, because their float32 divides by 0 for huge clips.
    sigma: SigmaLaw = SigmaLaw("stretched_logit_normal", shift=LinearShift(1024, 0.95, 4096, 2.05))
    text_length: int = 1024
    fps: float = 24.0

    family = "ltx2"
    # musubi-tuner has none: as its fork for LTX-2 has it (github.com/AkaneTendo25/musubi-tuner)
    model_id = ModelId("LTX2", "https://github.com/Lightricks/LTX-2", "ltx2_v1")
    conditioning = LTX2Conditioning
    transformer_class = LTX2VideoTransformer3DModel
    single_file = SingleFile("patchify_proj.weight", _config, _convert)
    text_components = ("text_encoder", "connectors")
    guidance_scale = 3.0
    steps = 30

    def __post_init__(self) -> None:
        """Refuse clips that stand still."""
        super().__post_init__()
        if not self.fps > 0:
            raise ValueError(f"model.fps must be greater than 0, got {self.fps}")

    def expected_config(self) -> dict[str, object]:
        """The transformer's channels, and that it is LTX-2: later versions modulate text and project it elsewhere."""
        return {"in_channels": self.latents.channels, "cross_attn_mod": False, "use_prompt_embeddings": True}

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "LTX2Encoders":
        """VAE, text encoder and connectors on `device`, each loaded when first used."""
        return LTX2Encoders(self, device, memory)

    def collate(self, items: Sequence[LTX2Conditioning]) -> LTX2Conditioning:
        """Stack: the connectors brought every caption to one length, with content that nothing can stand for later.

        Raises:
            ValueError: A caption of another length.
        """
        for length in {item.text.shape[0] for item in items}:
            if length != self.text_length:
                raise ValueError(
                    f"a cached caption has {length} tokens, model.text_length is {self.text_length}; "
                    "run `python -m mpp.prepare` again with this setting"
                )
        return LTX2Conditioning(torch.stack([item.text for item in items]))

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> LTX2Conditioning:
        """Zeros for a text of `text_length` tokens."""
        del shape
        dim = config["caption_channels"]
        return LTX2Conditioning(torch.zeros(self.text_length, dim, dtype=DTYPES[self.text_dtype]))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: LTX2Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents` at timesteps 1000 * sigma in float32, with sound out of sight."""
        dtype = transformer.scale_shift_table.dtype
        batch, _, frames, height, width = noisy.shape
        text, time = conditioning.text.to(dtype), sigma.float() * 1000
        prediction, _ = transformer(
            hidden_states=_pack(noisy.to(dtype)),
            audio_hidden_states=text.new_zeros(batch, 1, transformer.config.audio_in_channels),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=text.new_zeros(batch, 1, text.shape[2]),
            timestep=time,
            sigma=time,
            num_frames=frames,
            height=height,
            width=width,
            fps=self.fps,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )
        return _unpack(prediction, frames, height, width)

    def pipeline(self, transformer: nn.Module, encoders: "LTX2Encoders") -> LTX2HDRPipeline:
        """Diffusers' pipeline for video without sound, showing the image as it is instead of as HDR."""
        scheduler = self.scheduler(FlowMatchEulerDiscreteScheduler(**_SCHEDULE))
        pipe = LTX2HDRPipeline(
            scheduler=scheduler,
            audio_scheduler=_Mute.from_config(scheduler.config),
            vae=encoders.vae(),
            transformer=transformer,
            text_encoder=None,
            tokenizer=None,
            connectors=None,
            audio_vae=None,
            vocoder=None,
        )
        pipe.hdr_video_processor = _Plain(vae_scale_factor=self.latents.spatial_stride)
        return pipe

    def arguments(
        self, positive: LTX2Conditioning, negative: LTX2Conditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings, guidance and frames."""
        texts = positive.text if negative is None else torch.cat([negative.text, positive.text])
        return {
            "prompt_embeds": positive.text,  # only counted, as the connectors' output is given
            "prompt_attention_mask": positive.text.new_ones(positive.text.shape[:2]),
            "connector_video_embeds": texts,
            "connector_audio_embeds": torch.zeros_like(texts[:, :1]),
            "guidance_scale": 1.0 if negative is None else generation.guidance_scale,
            "num_frames": generation.frames,
            "frame_rate": self.fps,
        }

    def generate(
        self,
        transformer: nn.Module,
        encoders: "LTX2Encoders",
        positive: LTX2Conditioning,
        negative: LTX2Conditioning | None,
        generation: Generation,
    ) -> Float[Tensor, "frames channels height width"]:
        """Generate with diffusers' own pipeline, the video kept apart from the sound as in training."""
        apart = transformer.register_forward_pre_hook(_apart, with_kwargs=True)
        try:
            return super().generate(transformer, encoders, positive, negative, generation)
        finally:
            apart.remove()


def _apart(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del transformer
    return args, {**kwargs, "isolate_modalities": True}


class _Mute(FlowMatchEulerDiscreteScheduler):
    """Leaves the sound, which nobody hears, as noise."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: object) -> tuple[Tensor]:
        return (sample,)


class _Plain(VideoProcessor):
    """Ordinary pixels where LTX2HDRPipeline asks for HDR."""

    def postprocess_hdr_video(self, video: Tensor, output_type: str) -> Tensor:
        return self.postprocess_video(video, output_type)


class LTX2Encoders(FamilyEncoders):
    """The video VAE, Gemma 3 and the text connectors, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLLTX2Video
    model: LTX2

    def connectors(self) -> LTX2TextConnectors:
        """What makes the transformer's text of Gemma's, in `text_dtype`."""
        if "connectors" not in self._loaded:
            dtype = DTYPES[self.model.text_dtype]
            with self.loading("connectors", dtype):
                folder = resolve_folder(self.model.text_encoder, "connectors", "model.text_encoder")
                model = LTX2TextConnectors.from_pretrained(folder, torch_dtype=dtype)
                self._loaded["connectors"] = model.to(self.text_device).eval().requires_grad_(False)
        return self._loaded["connectors"]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[LTX2Conditioning]:
        """The video connector's output, from all of Gemma's hidden states: one caption at a time, they are large."""
        pipe = LTX2Pipeline(
            text_encoder=self.encoder(Gemma3ForConditionalGeneration),
            tokenizer=self.tokenizer(),
            connectors=self.connectors(),
            scheduler=None,
            vae=None,
            audio_vae=None,
            transformer=None,
            vocoder=None,
        )
        records = []
        for caption in captions_of(prompts):
            states, mask, *_ = pipe.encode_prompt(
                caption,
                do_classifier_free_guidance=False,
                max_sequence_length=self.model.text_length,
                device=self.text_device,
            )
            video, _, _ = pipe.connectors(states, mask, padding_side=pipe.tokenizer.padding_side)
            records.append(LTX2Conditioning(video[0].cpu()))
        return records

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, normalised per channel in float32."""
        vae = self.vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        mean, std = vae.latents_mean.float(), vae.latents_std.float()
        return _normalize(latents, mean, std, vae.config.scaling_factor)

    def check_vae(self, vae: AutoencoderKLLTX2Video) -> None:
        """Refuse a VAE of another latent shape."""
        spec = self.model.latents
        made = vae.config.latent_channels, vae.spatial_compression_ratio, vae.temporal_compression_ratio
        wanted = spec.channels, spec.spatial_stride, spec.temporal_stride
        if made != wanted:
            raise ValueError(
                f"model.vae={self.model.vae} makes {made[0]} channels at stride {made[1]} and {made[2]} in time, the "
                f"model needs {wanted[0]} at {wanted[1]} and {wanted[2]}"
            )
