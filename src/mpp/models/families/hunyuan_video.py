"""HunyuanVideo, text to video and image to video, on diffusers' `HunyuanVideoTransformer3DModel`."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, CLIPTextModel, CLIPTokenizer, LlamaModel, LlavaForConditionalGeneration

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Generation, ImageInputs, LatentSpec, ModelId, Names, NativeRule, Prompt
from mpp.models.family import DTYPES, DType, Family, FamilyEncoders, output_pixels
from mpp.models.padding import pad_with_mask
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.text_limit import TextLimit, before_caption

_HEAD_DIM = 128  # of the published models; single files do not state it
_MARKER = "img_in.proj.weight"
_EVERY = {"latent_concat": 2, "token_replace": 4}  # of the image's text tokens: HunyuanVideoImageToVideoPipeline
_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_RENAMED = {
    "_attn_": "_attn.", "_mlp.fc1": "_mlp.0", "_mlp.fc2": "_mlp.2", "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
}  # fmt: skip
_QKV = tuple(rf"transformer_blocks.\1.attn.to_{part}" for part in "qkv")
_ADDED = tuple(rf"transformer_blocks.\1.attn.add_{part}_proj" for part in "qkv")
_LINEAR1 = tuple(
    rf"single_transformer_blocks.\1.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
)

_LONGEST, _IMAGE_TOKENS = (
    256,
    576,
)  # tokens of a text and of the image before it (max_sequence_length, image_embed_interleave)


@dataclass(frozen=True)
class HunyuanVideoConditioning(Conditioning):
    """What HunyuanVideo sees besides noisy latents.

    Attributes:
        text: Llama's states, `(tokens, dim)`, for image to video the image's before the caption's; batched
            `(b, tokens, dim)`, zero-padded.
        pooled: CLIP's pooled state, `(dim,)`.
        mask: Real tokens of a batch, `(b, tokens)`; None for one sample.
        first_frame: Normalised latent of the clip's first frame, `(c, 1, h, w)`; None for text to video.
    """

    text: Tensor
    pooled: Tensor
    mask: Tensor | None = None
    first_frame: Tensor | None = None


def _config(shapes: Shapes, native: bool, image_condition: str | None) -> dict[str, Any]:
    """Configuration of a HunyuanVideo transformer, read off its tensors' shapes.

    Token replacement adds no tensors, so whether a file is meant for it is the model config's word.
    """

    def name(original: str, diffusers: str) -> str:
        return original if native else diffusers

    dim, in_channels, patch_t, patch, _ = shapes[name(_MARKER, "x_embedder.proj.weight")]
    if dim % _HEAD_DIM:
        raise ValueError(f"width {dim} is no multiple of HunyuanVideo's head size {_HEAD_DIM}")
    out = shapes[name("final_layer.linear.weight", "proj_out.weight")][0] // (patch_t * patch * patch)
    mlp = shapes[name("double_blocks.0.img_mlp.fc1.weight", "transformer_blocks.0.ff.net.0.proj.weight")][0]
    pooled = shapes[name("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")][1]
    refiner = name("txt_in.individual_token_refiner.blocks.", "context_embedder.token_refiner.refiner_blocks.")
    guidance = name("guidance_in.mlp.0.weight", "time_text_embed.guidance_embedder.linear_1.weight")
    concat = in_channels == 2 * out + 1
    return {
        "in_channels": in_channels,
        "out_channels": out,
        "num_attention_heads": dim // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "num_layers": count_blocks(shapes, name("double_blocks.", "transformer_blocks.")),
        "num_single_layers": count_blocks(shapes, name("single_blocks.", "single_transformer_blocks.")),
        "num_refiner_layers": count_blocks(shapes, refiner),
        "mlp_ratio": mlp / dim,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "guidance_embeds": guidance in shapes,
        "text_embed_dim": shapes[name("txt_in.input_embedder.weight", "context_embedder.proj_in.weight")][1],
        "pooled_projection_dim": pooled,
        "image_condition_type": "latent_concat" if concat else image_condition,
    }


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original state to diffusers'; the single blocks are split at the file's width, diffusers knows only 3072."""
    width = state[_MARKER].shape[0]
    split = {}
    for name, tensor in state.items():
        fused = re.fullmatch(r"single_blocks\.(\d+)\.linear1\.(weight|bias)", name)
        if fused is None:
            split[name] = tensor
            continue
        parts = tensor.split([width, width, width, tensor.shape[0] - 3 * width])
        for module, part in zip(_LINEAR1, parts, strict=True):
            split[f"{module}.{fused[2]}".replace(r"\1", fused[1])] = part
    return convert_hunyuan_video_transformer_to_diffusers(split)


def _in_comfyui(name: str) -> str:
    """What ComfyUI calls a layer of the original (comfy/supported_models.py, process_unet_state_dict)."""
    for theirs, comfy in _RENAMED.items():
        name = name.replace(theirs, comfy)
    return name


@dataclass(kw_only=True, eq=False)
class HunyuanVideo(Family):
    """HunyuanVideo, text to video and both forms of image to video.

    Args:
        text_encoder: Folder or hub id of Llama (Llava and its image processor for image to video), CLIP and their
            tokenizers; None: `pretrained`.
        image_condition: How the transformer is given the first frame: `latent_concat` (33 channels: noisy latents,
            the frame's latents, a mask), `token_replace` (the first latent frame is the clean one), or None: it is
            not, text to video.
        guidance: Guidance that a distilled transformer is told in training, 1 as in finetrainers;
            None: a transformer without guidance embedding, sampled with classifier-free guidance.

    Raises:
        ValueError: An unknown dtype or image condition.
    """

    # all linear layers of the double and single blocks but modulation, as musubi-tuner's networks/lora.py
    lora_targets: str | Sequence[str] = (
        r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out))"
    )
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, patch=(1, 2, 2))
    # shift of musubi-tuner's guide and of the sampler; 3.0 where details are poor
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=7.0)
    text_dtype: DType = "float16"  # as diffusers has both text encoders
    image_condition: Literal["latent_concat", "token_replace"] | None = None
    guidance: float | None = 1.0

    family = "hunyuan_video"
    # image to video too, of which musubi-tuner has none: the adapted layers are the same
    model_id = ModelId("hunyuan-video", "https://github.com/Tencent/HunyuanVideo", "hunyuan_video")
    conditioning = HunyuanVideoConditioning
    transformer_class = HunyuanVideoTransformer3DModel
    unquantised = (r"\.norm(1|1_context)?\.linear$", r"^context_embedder\.")
    kept = (r"^context_embedder\.",)
    text_components = ("text_encoder", "text_encoder_2")
    cached_settings = ()
    steps = 50
    fps = 24.0  # its sample_video.py saves clips at 24
    native = (
        NativeRule(_DOUBLE + r"attn\.to_[qkv]", r"double_blocks.\1.img_attn_qkv", _QKV),
        NativeRule(_DOUBLE + r"attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn_qkv", _ADDED),
        NativeRule(_DOUBLE + r"attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
        NativeRule(_DOUBLE + r"attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
        NativeRule(_DOUBLE + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
        NativeRule(_DOUBLE + r"ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
        NativeRule(_DOUBLE + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
        NativeRule(_DOUBLE + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
        NativeRule(_DOUBLE + r"norm1\.linear", r"double_blocks.\1.img_mod.linear"),
        NativeRule(_DOUBLE + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
        NativeRule(_SINGLE + r"(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1", _LINEAR1),
        NativeRule(_SINGLE + r"proj_out", r"single_blocks.\1.linear2"),
        NativeRule(_SINGLE + r"norm\.linear", r"single_blocks.\1.modulation.linear"),
    )
    named_by = MappingProxyType(
        {"comfyui": Names(tuple(NativeRule(rule.pattern, _in_comfyui(rule.name), rule.parts) for rule in native))}
    )

    def __post_init__(self) -> None:
        """What follows from the way of the first frame and from guidance."""
        super().__post_init__()
        if self.image_condition not in (None, *_EVERY):
            raise ValueError(
                f"model.image_condition must be latent_concat, token_replace or null, got {self.image_condition!r}"
            )
        self.guidance_scale = 1.0 if self.guidance is None else 6.0  # what diffusers' examples generate with
        self.single_file = SingleFile(_MARKER, partial(_config, image_condition=self.image_condition), _convert)
        if self.image_condition is not None:  # the two keep another share of the image's text tokens
            self.family = "hunyuan_video_i2v" + ("_token_replace" if self.image_condition == "token_replace" else "")
            self.images = ImageInputs(first_frame=True, in_text=True, in_negative=False)
            self.least_frames = 2
            self.given_frames = int(self.image_condition == "token_replace")

    def expected_config(self) -> dict[str, object]:
        """Channels, the way of the first frame, and whether guidance is told."""
        channels = self.latents.channels
        return {
            "in_channels": 2 * channels + 1 if self.image_condition == "latent_concat" else channels,
            "image_condition_type": self.image_condition,
            "guidance_embeds": self.guidance is not None,
        }

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "HunyuanVideoEncoders":
        """VAE and text encoders on `device`, each loaded when first used."""
        return HunyuanVideoEncoders(self, device, memory)

    def collate(self, items: Sequence[HunyuanVideoConditioning]) -> HunyuanVideoConditioning:
        """Pad the texts to the longest, with a mask that makes padding neutral.

        Raises:
            ValueError: First frames of different shapes, or of some samples only.
        """
        text, mask = pad_with_mask([item.text for item in items])
        pooled = torch.stack([item.pooled for item in items])
        shapes = {None if item.first_frame is None else tuple(item.first_frame.shape) for item in items}
        if len(shapes) > 1:
            raise ValueError(f"first frames of one batch must have one shape, got {sorted(map(str, shapes))}")
        first = None if None in shapes else torch.stack([item.first_frame for item in items])
        return HunyuanVideoConditioning(text, pooled, mask, first)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> HunyuanVideoConditioning:
        """Zeros for the longest text, and for the first frame where it is seen."""
        channels, _, *sides = shape
        tokens = _LONGEST + (0 if self.image_condition is None else _IMAGE_TOKENS)
        text = torch.zeros(tokens, config["text_embed_dim"], dtype=DTYPES[self.text_dtype])
        pooled = torch.zeros(config["pooled_projection_dim"], dtype=DTYPES[self.text_dtype])
        first = None if self.image_condition is None else torch.zeros(channels, 1, *sides)
        return HunyuanVideoConditioning(text, pooled, first_frame=first)

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: HunyuanVideoConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; timesteps and guidance are 1000 times theirs, in float32 over any weights.

        Raises:
            ValueError: Image to video without a first frame.
        """
        dtype = transformer.x_embedder.proj.weight.dtype
        seen = noisy.to(dtype)
        if self.image_condition is not None:
            if conditioning.first_frame is None:
                raise ValueError(f"{self.family} needs the first frame's latents in its conditioning, got none")
            seen = self._with_first_frame(seen, conditioning.first_frame.to(dtype))
        guidance = None if self.guidance is None else torch.full_like(sigma, 1000 * self.guidance, dtype=torch.float32)
        (prediction,) = transformer(
            hidden_states=seen,
            timestep=sigma.float() * 1000,
            encoder_hidden_states=conditioning.text.to(dtype),
            encoder_attention_mask=conditioning.mask,
            pooled_projections=conditioning.pooled.to(dtype),
            guidance=guidance,
            return_dict=False,
        )
        return prediction[:, :, self.given_frames :]

    def _with_first_frame(self, noisy: Tensor, first: Tensor) -> Tensor:
        if self.image_condition == "token_replace":
            return torch.cat([first, noisy], dim=2)
        known = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        return torch.cat([noisy, functional.pad(known, (0, 0, 0, 0, 0, noisy.shape[2] - 1))], dim=1)

    def pipeline(self, transformer: nn.Module, encoders: "HunyuanVideoEncoders") -> DiffusionPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        parts = {
            "text_encoder": None,
            "tokenizer": None,
            "text_encoder_2": None,
            "tokenizer_2": None,
            "transformer": transformer,
            "vae": encoders.vae(),
            "scheduler": self.scheduler(FlowMatchEulerDiscreteScheduler(shift=7.0)),
        }
        if self.image_condition is None:
            return HunyuanVideoPipeline(**parts)
        return HunyuanVideoImageToVideoPipeline(**parts, image_processor=None)

    def arguments(
        self, positive: HunyuanVideoConditioning, negative: HunyuanVideoConditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings, guidance (told, or classifier-free where the transformer takes none), frames, first frame.

        Raises:
            ValueError: Image to video without an image.
        """
        found = {
            "prompt_embeds": positive.text,
            "pooled_prompt_embeds": positive.pooled,
            "prompt_attention_mask": positive.mask,
            "num_frames": generation.frames,
            "guidance_scale": 1.0 if self.guidance is None else generation.guidance_scale,
        }
        if self.guidance is None and negative is not None:
            found["true_cfg_scale"] = generation.guidance_scale
            found["negative_prompt_embeds"] = negative.text
            found["negative_pooled_prompt_embeds"] = negative.pooled
            found["negative_prompt_attention_mask"] = negative.mask
        if self.image_condition is not None:
            if len(generation.controls) != 1:
                raise ValueError(
                    f"{self.family} generates from one image, the first frame; got {len(generation.controls)}"
                )
            found["image"] = generation.controls[0]
        return found

    @torch.no_grad()
    def generate(
        self,
        transformer: nn.Module,
        encoders: "HunyuanVideoEncoders",
        positive: HunyuanVideoConditioning,
        negative: HunyuanVideoConditioning | None,
        generation: Generation,
    ) -> Float[Tensor, "frames channels height width"]:
        """Generate with diffusers' own pipeline; pixels in [0, 1] on the CPU.

        With `latent_concat` that pipeline throws the first four frames away, so a clip of the generation's length would
        come out shorter and without its first frame; here its latents are decoded whole.
        """
        if self.image_condition != "latent_concat":
            return super().generate(transformer, encoders, positive, negative, generation)
        generated: list[Tensor] = []

        def keep(_pipe: object, _step: int, _timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            generated[:] = [values["latents"]]
            return {}

        pipe = self.pipeline(transformer, encoders)
        pipe.set_progress_bar_config(disable=True)
        pipe(
            height=generation.height,
            width=generation.width,
            num_inference_steps=generation.steps,
            generator=torch.Generator().manual_seed(generation.seed),
            output_type="latent",
            callback_on_step_end=keep,
            **self.arguments(positive, negative, generation),
        )
        vae = encoders.vae()
        video = vae.decode(generated[0].to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return output_pixels(pipe.video_processor.postprocess_video(video, output_type="pt"))


class HunyuanVideoEncoders(FamilyEncoders):
    """AutoencoderKLHunyuanVideo, Llama or Llava, and CLIP, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLHunyuanVideo
    model: HunyuanVideo

    def text_limit(self) -> TextLimit:
        """Llama's, behind the pipeline's template; CLIP's 77 tokens make but one pooled vector.

        Of a caption that is as long, the pipeline for image to video drops up to five tokens more.
        """
        kind = HunyuanVideoPipeline if self.model.image_condition is None else HunyuanVideoImageToVideoPipeline
        settings = {name: p.default for name, p in inspect.signature(kind.encode_prompt).parameters.items()}
        template = settings["prompt_template"]
        tokens = settings["max_sequence_length"] + template["crop_start"]
        return TextLimit(self.tokenizer(), tokens, before_caption(template["template"]))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[HunyuanVideoConditioning]:
        """What the pipeline's own `encode_prompt` gives, trimmed to the real tokens.

        A prompt for image to video that brings no image sees a black one, as the pipeline's negative prompts do.
        """
        tokenizer = self.tokenizer()
        tokenizer.padding_side = "right"  # the transformer takes real tokens to come first; Llama's default is left
        parts = {
            "tokenizer": tokenizer,
            "text_encoder_2": self.encoder(CLIPTextModel, "text_encoder_2"),
            "tokenizer_2": self.tokenizer("tokenizer_2", CLIPTokenizer),
            "transformer": None,
            "vae": None,
            "scheduler": None,
        }
        condition = self.model.image_condition
        if condition is None:
            pipe = HunyuanVideoPipeline(text_encoder=self.encoder(LlamaModel), **parts)
            encoded = [pipe.encode_prompt(prompt.text, device=self.text_device) for prompt in prompts]
        else:
            pipe = HunyuanVideoImageToVideoPipeline(
                text_encoder=self.encoder(LlavaForConditionalGeneration),
                image_processor=self.tokenizer("image_processor", AutoImageProcessor),
                **parts,
            )
            black = Image.new("RGB", (64, 64))
            every = _EVERY[condition]
            encoded = [
                pipe.encode_prompt(
                    prompt.images[0] if prompt.images else black,
                    prompt.text,
                    device=self.text_device,
                    image_embed_interleave=every,
                )
                for prompt in prompts
            ]
        return [
            HunyuanVideoConditioning(text[0, mask[0].bool()].cpu(), pooled[0].cpu()) for text, pooled, mask in encoded
        ]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior times its scaling factor, in float32."""
        vae = self.vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return latents.float().cpu() * vae.config.scaling_factor

    def encode_images(
        self, pixels: Float[Tensor, "1 3 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Latents of the clip's first frame alone."""
        del controls
        if self.model.image_condition is None:
            return {}
        return {"first_frame": self.encode_pixels(pixels[:, :, :1])[0]}

    def check_vae(self, vae: AutoencoderKLHunyuanVideo) -> None:
        """Refuse a VAE of another latent shape."""
        spec, made = self.model.latents, vae.config
        found = (made.latent_channels, made.spatial_compression_ratio, made.temporal_compression_ratio)
        if found != (spec.channels, spec.spatial_stride, spec.temporal_stride):
            raise ValueError(
                f"model.vae={self.model.vae} makes {found[0]} channels at strides {found[1]} and {found[2]}, the model "
                f"needs {spec.channels} at {spec.spatial_stride} and {spec.temporal_stride}"
            )
