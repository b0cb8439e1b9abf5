"""HunyuanVideo 1.5, text or image to video, on diffusers' `HunyuanVideo15Transformer3DModel`; one frame is an image."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, ByT5Tokenizer, Qwen2_5_VLTextModel, SiglipVisionModel, T5EncoderModel

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Generation, ImageInputs, LatentSpec, ModelId, Names, NativeRule, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of, exact_dtype
from mpp.models.padding import pad_with_mask
from mpp.models.text_limit import CAPTION, TextLimit, before_message

_BLOCK = r"transformer_blocks\.(\d+)\."
_QKV = tuple(rf"transformer_blocks.\1.attn.to_{part}" for part in "qkv")
_ADDED = tuple(rf"transformer_blocks.\1.attn.add_{part}_proj" for part in "qkv")
# Private to diffusers: tests/models/test_private.py says when it changes.
# (`encode_prompt` and `encode_image` need a pipeline, and that a VAE.)
_text_states = HunyuanVideo15Pipeline._get_mllm_prompt_embeds  # noqa: SLF001
_glyph_states = HunyuanVideo15Pipeline._get_byt5_prompt_embeds  # noqa: SLF001
_image_states = HunyuanVideo15ImageToVideoPipeline._get_image_embeds  # noqa: SLF001

_LONGEST, _IMAGE_TOKENS = 1000, 729  # tokens of a text (tokenizer_max_length), and of SigLIP


@dataclass(frozen=True)
class HunyuanVideo15Conditioning(Conditioning):
    """What HunyuanVideo 1.5 sees besides noisy latents.

    Attributes:
        text: Qwen2.5-VL's states of the caption, `(tokens, dim)`.
        glyphs: ByT5's states of the caption's quoted texts, `(tokens, dim)`; 0 tokens where it quotes nothing.
        text_mask: Which tokens are real, `(b, tokens)`; only after `collate`.
        glyph_mask: The same for glyphs.
        image_latents: Image to video: latents of the first frame, `(channels, 1, h, w)`.
        image_embeds: Image to video: SigLIP's states of the first frame, `(tokens, dim)`.
    """

    text: Tensor
    glyphs: Tensor
    text_mask: Tensor | None = None
    glyph_mask: Tensor | None = None
    image_latents: Tensor | None = None
    image_embeds: Tensor | None = None


class _TextToVideo(HunyuanVideo15Pipeline):
    """Diffusers' pipeline with guidance as an argument; there it is a component."""

    def __call__(self, *, guidance_scale: float, **arguments: Any) -> Any:  # noqa: ANN401
        self.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        return super().__call__(**arguments)


class _ImageToVideo(HunyuanVideo15ImageToVideoPipeline):
    """Diffusers' pipeline with guidance, size and the image's embeddings as arguments.

    There, guidance is a component, the size the nearest of a list, and the embeddings need SigLIP.
    """

    def __call__(
        self,
        *,
        guidance_scale: float,
        height: int,
        width: int,
        image: Image.Image | None,
        image_embeds: Tensor | None,
        **arguments: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if image_embeds is None:  # a still: the model takes it as text to video
            needless = ("image_encoder", "feature_extractor")
            pipe = _TextToVideo(**{name: part for name, part in self.components.items() if name not in needless})
            pipe.set_progress_bar_config(disable=True)
            return pipe(guidance_scale=guidance_scale, height=height, width=width, **arguments)
        self.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        self.video_processor.calculate_default_height_width = lambda **_: (height, width)
        self._image_embeds = image_embeds
        return super().__call__(image=image, **arguments)

    def encode_image(self, image: Image.Image, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embeddings that the call was given."""
        del image, batch_size
        return self._image_embeds.to(device, dtype)


@dataclass(kw_only=True, eq=False)
class HunyuanVideo15(Family):
    """HunyuanVideo 1.5.

    Args:
        text_encoder: Folder or hub id of Qwen2.5-VL, ByT5 and, for image to video, SigLIP, with their tokenizers and
            processor; None: `pretrained`.
        task: `t2v` or `i2v`: what the transformer was trained for. An `i2v` model sees a clip's first frame; stills,
            which have nothing to start from, it is shown as text to video, as in its own training.

    Raises:
        ValueError: An unknown dtype or task.
    """

    # Attention and feed-forward layers of the blocks, as musubi-tuner (networks/lora_hv_1_5.py: MMDoubleStreamBlock),
    # without modulation. Nothing comes after the text stream of the last of the 54 blocks, so its queries, output and
    # feed-forward would never learn.
    lora_targets: str | Sequence[str] = (
        r"transformer_blocks\.(\d+\.(attn\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ff\.net\.(0\.proj|2))"
        r"|(?!53\.)\d+\.(attn\.(add_q_proj|to_add_out)|ff_context\.net\.(0\.proj|2)))"
    )
    latents: LatentSpec = LatentSpec(channels=32, spatial_stride=16, temporal_stride=4, patch=(1, 1, 1))
    # Tencent's train.py: snr_type lognorm, train_timestep_shift 3.0. (Samples are generated with the scheduler's shift:
    # 5 at 480p, 9 at 720p.)
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=3.0)
    task: Literal["t2v", "i2v"] = "t2v"

    family = "hunyuan_video15"
    model_id = ModelId("hunyuan-video-1.5", "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5", "hunyuan_video_1_5")
    conditioning = HunyuanVideo15Conditioning
    transformer_class = HunyuanVideo15Transformer3DModel
    unquantised = (r"\.norm(1|1_context)\.linear$", r"^context_embedder\.")
    kept = (r"^context_embedder\.",)
    text_components = ("text_encoder", "text_encoder_2")
    cached_settings = ()
    guidance_scale = 6.0  # scripts/convert_hunyuan_video1_5_to_diffusers.py saves it as the pipeline's guider
    steps = 50
    fps = 24.0  # its generate.py saves clips at 24
    # hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py, which musubi-tuner's model follows
    native = (
        NativeRule(_BLOCK + r"attn\.to_([qkv])", r"double_blocks.\1.img_attn_\2"),
        NativeRule(_BLOCK + r"attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn_\2"),
        NativeRule(_BLOCK + r"attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
        NativeRule(_BLOCK + r"attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
        NativeRule(_BLOCK + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
        NativeRule(_BLOCK + r"ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
        NativeRule(_BLOCK + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
        NativeRule(_BLOCK + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    )
    named_by = MappingProxyType(  # ComfyUI holds it in the layers of HunyuanVideo
        {
            "comfyui": Names(
                (
                    NativeRule(_BLOCK + r"attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv", _QKV),
                    NativeRule(_BLOCK + r"attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv", _ADDED),
                    NativeRule(_BLOCK + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
                    NativeRule(_BLOCK + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
                    NativeRule(_BLOCK + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
                    NativeRule(_BLOCK + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
                    NativeRule(_BLOCK + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
                    NativeRule(_BLOCK + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
                )
            )
        }
    )

    def __post_init__(self) -> None:
        """Image to video sees an image."""
        super().__post_init__()
        if self.task not in ("t2v", "i2v"):
            raise ValueError(f"model.task must be t2v or i2v, got {self.task!r}")
        if self.task == "i2v":
            self.family = "hunyuan_video15_i2v"
            self.images = ImageInputs(first_frame=True)
            self.text_components = ("text_encoder", "text_encoder_2", "image_encoder")

    def expected_config(self) -> dict[str, object]:
        """Channels of noisy latents, image and mask; the task; no step distillation, which needs a second time."""
        channels = self.latents.channels
        return {
            "in_channels": 2 * channels + 1,
            "out_channels": channels,
            "task_type": self.task,
            "use_meanflow": False,
        }

    def load_encoders(
        self, device: torch.device | str, memory: EncoderMemory | None = None
    ) -> "HunyuanVideo15Encoders":
        """VAE, text and image encoders on `device`, each loaded when first used."""
        return HunyuanVideo15Encoders(self, device, memory)

    def collate(self, items: Sequence[HunyuanVideo15Conditioning]) -> HunyuanVideo15Conditioning:
        """Pad both texts with masks, and stack the image fields.

        Raises:
            ValueError: Samples with and without a first frame, or of several sizes.
        """
        text, text_mask = pad_with_mask([item.text for item in items])
        glyphs, glyph_mask = _at_least_one_token(*pad_with_mask([item.glyphs for item in items]))
        return HunyuanVideo15Conditioning(
            text, glyphs, text_mask, glyph_mask, _stack(items, "image_latents"), _stack(items, "image_embeds")
        )

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> HunyuanVideo15Conditioning:
        """Zeros for the longest text that quotes nothing, and for the first frame where it is seen."""
        channels, frames, *sides = shape
        fields: dict[str, Tensor] = {}
        if self.task != "t2v" and frames > 1:
            fields["image_latents"] = torch.zeros(channels, 1, *sides)
            fields["image_embeds"] = torch.zeros(_IMAGE_TOKENS, config["image_embed_dim"])
        text, glyphs = (
            torch.zeros(tokens, config[dim], dtype=DTYPES[self.text_dtype])
            for tokens, dim in ((_LONGEST, "text_embed_dim"), (0, "text_embed_2_dim"))
        )
        return HunyuanVideo15Conditioning(text, glyphs, **fields)

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: HunyuanVideo15Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`.

        The transformer takes noisy latents, the first frame's latents and a mask of the frames given as channels,
        zeros for text to video. Timesteps are 1000 * sigma, under autocast in float32, as musubi-tuner's are; else in
        the weights' dtype, as in the pipeline: the time embedding refuses any other.
        """
        dtype = transformer.x_embedder.proj.weight.dtype
        given, mask = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
        embeds = conditioning.image_embeds
        if conditioning.image_latents is None:
            # The transformer knows text to video by embeddings that are all zero, and masks them out however many.
            embeds = noisy.new_zeros(noisy.shape[0], 1, transformer.config.image_embed_dim)
        else:
            given[:, :, :1], mask[:, :, :1] = conditioning.image_latents, 1
        (prediction,) = transformer(
            hidden_states=torch.cat([noisy, given, mask], 1).to(dtype),
            timestep=(sigma.float() * 1000).to(exact_dtype(dtype, noisy.device)),
            encoder_hidden_states=conditioning.text.to(dtype),
            encoder_attention_mask=conditioning.text_mask,
            encoder_hidden_states_2=conditioning.glyphs.to(dtype),
            encoder_attention_mask_2=conditioning.glyph_mask,
            image_embeds=embeds.to(dtype),
            return_dict=False,
        )
        return prediction

    def pipeline(self, transformer: nn.Module, encoders: "HunyuanVideo15Encoders") -> _TextToVideo | _ImageToVideo:
        """Diffusers' pipeline around the transformer and the VAE."""
        parts = {
            "text_encoder": None,
            "tokenizer": None,
            "transformer": transformer,
            "vae": encoders.vae(),
            "scheduler": self.scheduler(FlowMatchEulerDiscreteScheduler(shift=5.0)),
            "text_encoder_2": None,
            "tokenizer_2": None,
            "guider": ClassifierFreeGuidance(guidance_scale=1.0),
        }
        if self.task == "t2v":
            return _TextToVideo(**parts)
        return _ImageToVideo(**parts, image_encoder=None, feature_extractor=None)

    def arguments(
        self, positive: HunyuanVideo15Conditioning, negative: HunyuanVideo15Conditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Both texts with masks, guidance, frames, and the image of image to video.

        Raises:
            ValueError: Image to video without an image.
        """
        arguments = {
            "num_frames": generation.frames,
            "guidance_scale": 1.0 if negative is None else generation.guidance_scale,
        }
        for prefix, record in (("", positive), ("negative_", negative)):
            if record is not None:
                arguments |= {
                    f"{prefix}prompt_embeds": record.text,
                    f"{prefix}prompt_embeds_mask": record.text_mask,
                    f"{prefix}prompt_embeds_2": record.glyphs,
                    f"{prefix}prompt_embeds_mask_2": record.glyph_mask,
                }
        if self.task == "i2v":
            if positive.image_embeds is not None and not generation.controls:
                raise ValueError("a sample of image to video has no image; give it the clip's first frame")
            image = generation.controls[0] if generation.controls else None
            arguments |= {"image": image, "image_embeds": positive.image_embeds}
        return arguments


class HunyuanVideo15Encoders(FamilyEncoders):
    """VAE, Qwen2.5-VL, ByT5 and SigLIP, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLHunyuanVideo15
    model: HunyuanVideo15

    def text_limit(self) -> TextLimit:
        """Qwen's, as the pipeline has it."""
        settings = {name: p.default for name, p in inspect.signature(_text_states).parameters.items()}
        conversation = format_text_input([CAPTION], settings["system_message"])[0]
        before = before_message(self.tokenizer(), conversation, add_generation_prompt=True)
        return TextLimit(self.tokenizer(), settings["tokenizer_max_length"] + settings["crop_start"], before)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[HunyuanVideo15Conditioning]:
        """States of both text encoders as the pipeline makes them, without those of padding."""
        captions = captions_of(prompts)
        text = _text_states(self.encoder(Qwen2_5_VLTextModel), self.tokenizer(), captions, self.text_device)
        glyphs = _glyph_states(
            self.tokenizer("tokenizer_2", ByT5Tokenizer),
            self.encoder(T5EncoderModel, "text_encoder_2"),
            captions,
            self.text_device,
        )
        return [HunyuanVideo15Conditioning(*both) for both in zip(_real(*text), _real(*glyphs), strict=True)]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior times its scale, in float32."""
        vae = self.vae()
        clips = pixels.to(self.device, vae.dtype).split(1)  # diffusers' causal mask fits a batch of one alone
        latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips])
        return latents.float().cpu() * vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(
        self, pixels: Float[Tensor, "1 3 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Image to video: latents and SigLIP's states of the first frame of a clip.

        Stills have neither: HunyuanVideo 1.5 is trained on them as text to video (`sample_task` in its train.py).
        """
        del controls
        if self.model.task == "t2v" or pixels.shape[2] == 1:
            return {}
        frame = ((pixels[0, :, 0].permute(1, 2, 0).float() + 1) * 127.5).round().clamp(0, 255).byte()
        embeds = _image_states(
            self.encoder(SiglipVisionModel, "image_encoder"),
            self.tokenizer("feature_extractor", AutoImageProcessor),
            Image.fromarray(frame.cpu().numpy()),
            self.device,
        )
        return {"image_latents": self.encode_pixels(pixels[:, :, :1])[0], "image_embeds": embeds[0].cpu()}

    def check_vae(self, vae: AutoencoderKLHunyuanVideo15) -> None:
        """Refuse a VAE of another latent shape."""
        spec, config = self.model.latents, vae.config
        if config.latent_channels != spec.channels or config.spatial_compression_ratio != spec.spatial_stride:
            raise ValueError(
                f"model.vae={self.model.vae} makes {config.latent_channels} channels at stride "
                f"{config.spatial_compression_ratio}, the model needs {spec.channels} at {spec.spatial_stride}"
            )


def _real(states: Float[Tensor, "b tokens dim"], mask: Tensor) -> list[Float[Tensor, "_ dim"]]:
    """Each text's states where its mask is set, on the CPU."""
    return [state[keep].cpu() for state, keep in zip(states, mask.bool(), strict=True)]


def _at_least_one_token(
    texts: Float[Tensor, "b tokens dim"], mask: Bool[Tensor, "b tokens"]
) -> tuple[Float[Tensor, "b padded dim"], Bool[Tensor, "b padded"]]:
    """A batch of empty texts gets one token of padding, as kernels need not take empty tensors."""
    missing = max(0, 1 - texts.shape[1])
    return functional.pad(texts, (0, 0, 0, missing)), functional.pad(mask, (0, missing))


def _stack(items: Sequence[HunyuanVideo15Conditioning], name: str) -> Tensor | None:
    """One image field of a batch.

    The transformer decides for the whole batch whether it is image to video; a sample without image in it would
    attend to the embedding of zeros.
    """
    values = [getattr(item, name) for item in items]
    shapes = {None if value is None else tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"one batch holds samples with {name} of shapes {sorted(map(str, shapes))}; all samples of a batch must "
            "have the same, or all None (text to video)"
        )
    return None if values[0] is None else torch.stack(values)
