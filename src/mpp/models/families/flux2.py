"""FLUX.2 dev and klein, text to image with any number of reference images, on `Flux2Transformer2DModel`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from mpp.core.flow import LinearShift, SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Generation, ImageInputs, LatentSpec, ModelId, Names, NativeRule, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of, exact_dtype
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.text_limit import CAPTION, TextLimit, before_message

_HEAD_DIM = 128  # of every published FLUX.2: its four rotary axes of 32 are no tensors in a single file
_TEXT = {
    "mistral": (Flux2Pipeline, Mistral3ForConditionalGeneration),
    "qwen3": (Flux2KleinPipeline, Qwen3ForCausalLM),
}

# Private to diffusers: tests/models/test_private.py says when it changes.
_pack, _positions = Flux2Pipeline._pack_latents, Flux2Pipeline._prepare_latent_ids  # noqa: SLF001 (klein's are copies)
_image_positions, _text_positions = Flux2Pipeline._prepare_image_ids, Flux2Pipeline._prepare_text_ids  # noqa: SLF001
_patchify, _unpatchify = Flux2Pipeline._patchify_latents, Flux2Pipeline._unpatchify_latents  # noqa: SLF001
_at_most_a_megapixel = Flux2ImageProcessor._resize_if_exceeds_area  # noqa: SLF001


@dataclass(frozen=True)
class Flux2Conditioning(Conditioning):
    """Text embeddings and reference images.

    Attributes:
        text: `(text_length, dim)` for one caption with the encoder's own states at padding, batched `(b, ...)`.
        controls: Latents `(channels, h, w)` of every reference image, each of its own size; batched on axis 0.
    """

    text: Tensor
    controls: tuple[Tensor, ...] | None = None


def _config(shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of a FLUX.2 transformer, read off its tensors' shapes."""
    if native:
        image, text, time, guidance = "img_in", "txt_in", "time_in.in_layer", "guidance_in.in_layer"
        double, single = "double_blocks.", "single_blocks."
        norm, feed_forward, out = "img_attn.norm.query_norm.scale", "img_mlp.2.weight", "final_layer.linear"
    else:
        image, text = "x_embedder", "context_embedder"
        time, guidance = (f"time_guidance_embed.{name}_embedder.linear_1" for name in ("timestep", "guidance"))
        double, single = "transformer_blocks.", "single_transformer_blocks."
        norm, feed_forward, out = "attn.norm_q.weight", "ff.linear_out.weight", "proj_out"
    dim, in_channels = shapes[f"{image}.weight"]
    (head_dim,) = shapes[f"{double}0.{norm}"]
    if head_dim != _HEAD_DIM:
        raise ValueError(f"head size {head_dim} is not FLUX.2's {_HEAD_DIM}")
    return {
        "in_channels": in_channels,
        "out_channels": shapes[f"{out}.weight"][0],
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shapes[f"{text}.weight"][1],
        "timestep_guidance_channels": shapes[f"{time}.weight"][1],
        "mlp_ratio": shapes[f"{double}0.{feed_forward}"][1] / dim,
        "guidance_embeds": f"{guidance}.weight" in shapes,
    }


@dataclass(kw_only=True, eq=False)
class Flux2(Family):
    """FLUX.2: dev (embedded guidance, Mistral 3) and klein (real guidance, Qwen 3).

    Args:
        text: Text encoder: `mistral` (dev) or `qwen3` (klein).
        guidance: What the embedded guidance is in training, as musubi-tuner trains dev (flux_2_train_network.py); None:
            the model embeds none, and samples are generated with a negative prompt (klein).
        text_length: Tokens of every caption. FLUX.2 attends to padding, so it is part of the model.

    Raises:
        ValueError: An unknown dtype or text encoder.
    """

    # all linear layers of both kinds of blocks, as musubi-tuner (networks/lora_flux_2.py). diffusers' script
    # (train_dreambooth_lora_flux2.py) has fewer: to_q, to_k, to_v, to_out.0 and the single blocks' two
    lora_targets: str | Sequence[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    # the VAE's 32 channels as 2x2 patches
    latents: LatentSpec = LatentSpec(channels=128, spatial_stride=16, temporal_stride=1, patch=(1, 1, 1))
    # by resolution: musubi-tuner's flux2_shift, which its docs/flux_2.md recommends
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=LinearShift(256, 0.5, 4096, 1.15))
    text_length: int = 512
    text: Literal["mistral", "qwen3"] = "mistral"
    guidance: float | None = 1.0

    conditioning = Flux2Conditioning
    images = ImageInputs(most=10)
    transformer_class = Flux2Transformer2DModel
    single_file = SingleFile(
        "single_stream_modulation.lin.weight", _config, convert_flux2_transformer_checkpoint_to_diffusers
    )
    guidance_scale = 4.0
    steps = 50
    native = (
        NativeRule(
            r"transformer_blocks\.(\d+)\.attn\.to_[qkv]",
            r"double_blocks.\1.img_attn.qkv",
            tuple(rf"transformer_blocks.\1.attn.to_{part}" for part in "qkv"),
        ),
        NativeRule(
            r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj",
            r"double_blocks.\1.txt_attn.qkv",
            tuple(rf"transformer_blocks.\1.attn.add_{part}_proj" for part in "qkv"),
        ),
        NativeRule(r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        NativeRule(r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        NativeRule(r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
        NativeRule(r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
        NativeRule(r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
        NativeRule(r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
        NativeRule(r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        NativeRule(r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    )
    # ComfyUI takes diffusers' names for rows of its own layers (comfy/utils.py, flux_to_diffusers)
    named_by = MappingProxyType({"comfyui": Names(prefix="transformer.")})

    def __post_init__(self) -> None:
        """Dev and klein have texts of their own."""
        super().__post_init__()
        if self.text not in _TEXT:
            raise ValueError(f"model.text must be one of {', '.join(_TEXT)}, got {self.text!r}")
        self.family = "flux2" if self.text == "mistral" else "flux2_klein"

    @property
    def model_id(self) -> ModelId:
        """Klein's sizes differ in the transformer alone: the width of its text, three layers of Qwen3 4B or 8B."""
        klein = "9b" if self.transformer_config()["joint_attention_dim"] > 3 * 2560 else "4b"
        name, version = ("dev", "dev") if self.text == "mistral" else (f"klein-{klein}", f"klein_{klein}")
        return ModelId(f"Flux.2-{name}", "https://github.com/black-forest-labs/flux2", f"flux_2_{version}")

    def expected_config(self) -> dict[str, object]:
        """The transformer's channels, and whether it embeds guidance (dev does, klein does not)."""
        return {"in_channels": self.latents.channels, "guidance_embeds": self.guidance is not None}

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "Flux2Encoders":
        """VAE and text encoder on `device`, each loaded when first used."""
        return Flux2Encoders(self, device, memory)

    def collate(self, items: Sequence[Flux2Conditioning]) -> Flux2Conditioning:
        """Stack; FLUX.2 is trained to attend to the encoder's states at padding, so no text is padded here.

        Raises:
            ValueError: A text has another length, or the samples' reference images differ in number or size.
        """
        for item in items:
            if item.text.shape[0] != self.text_length:
                raise ValueError(
                    f"a cached caption has {item.text.shape[0]} tokens, model.text_length is {self.text_length}; "
                    "run `python -m mpp.prepare` again with this setting"
                )
        sizes = [[tuple(control.shape) for control in item.controls or ()] for item in items]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(
                f"the samples of a batch have reference images of different number or size (latents {sizes}); "
                "batch samples with equal ones"
            )
        controls = tuple(torch.stack(same) for same in zip(*(item.controls or () for item in items), strict=True))
        return Flux2Conditioning(torch.stack([item.text for item in items]), controls or None)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> Flux2Conditioning:
        """Zeros for a text of `text_length` tokens without reference images."""
        del shape
        dim = config["joint_attention_dim"]
        return Flux2Conditioning(torch.zeros(self.text_length, dim, dtype=DTYPES[self.text_dtype]))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Flux2Conditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; reference images are further tokens whose output is dropped."""
        weights = transformer.x_embedder.weight.dtype
        # the model rounds timesteps to its input's dtype before it multiplies them by 1000
        dtype = exact_dtype(weights, noisy.device)
        images = [noisy[:, :, 0], *(conditioning.controls or ())]
        tokens = [_pack(image).to(dtype) for image in images]
        firsts = [image[:1] for image in images]  # the model takes one sample's positions for all
        ids = [_positions(firsts[0])]
        if firsts[1:]:
            ids.append(_image_positions(firsts[1:]))
        text_ids = _text_positions(conditioning.text[:1])
        (prediction,) = transformer(
            hidden_states=torch.cat(tokens, 1),
            encoder_hidden_states=conditioning.text.to(weights),
            timestep=sigma.float(),
            img_ids=torch.cat(ids, 1).to(noisy.device),
            txt_ids=text_ids.to(noisy.device),
            guidance=None if self.guidance is None else torch.full_like(sigma, self.guidance, dtype=torch.float32),
            return_dict=False,
        )
        prediction = prediction[:, : tokens[0].shape[1]]
        return prediction.mT.unflatten(2, noisy.shape[-2:])[:, :, None]

    def pipeline(self, transformer: nn.Module, encoders: "Flux2Encoders") -> Flux2Pipeline | Flux2KleinPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        kind, _ = _TEXT[self.text]
        scheduler = self.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
        parts = {"scheduler": scheduler, "vae": encoders.vae(), "transformer": transformer}
        pipe = kind(**parts, text_encoder=None, tokenizer=None)
        # else the VAE gets latents in the text's dtype, whatever its own is
        pipe._unpatchify_latents = lambda latents: _unpatchify(latents).to(pipe.vae.dtype)  # noqa: SLF001
        return pipe

    def arguments(
        self, positive: Flux2Conditioning, negative: Flux2Conditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings, reference images, and guidance: dev's is embedded, klein's needs a negative prompt."""
        arguments = {
            "image": list(generation.controls) or None,
            "prompt_embeds": positive.text.to(DTYPES[self.dtype]),  # the pipeline casts latents, but not the text
            "guidance_scale": generation.guidance_scale,
        }
        if self.text == "qwen3":
            if negative is None:
                arguments["guidance_scale"] = 1.0
            else:
                arguments["negative_prompt_embeds"] = negative.text.to(DTYPES[self.dtype])
        return arguments


class Flux2Encoders(FamilyEncoders):
    """AutoencoderKLFlux2 and Mistral 3 or Qwen 3, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLFlux2
    model: Flux2

    def text_limit(self) -> TextLimit:
        """That of the whole conversation."""
        conversation = [{"role": "user", "content": CAPTION}]
        settings = {"add_generation_prompt": True, "enable_thinking": False}
        if self.model.text == "mistral":
            conversation, settings = format_input([CAPTION])[0], {"add_generation_prompt": False}
        before = before_message(self.tokenizer(), conversation, **settings)
        return TextLimit(self.tokenizer(), self.model.text_length, before)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[Flux2Conditioning]:
        """States of three layers side by side as diffusers' pipeline makes them, at padding too: it is attended to."""
        kind, encoder = _TEXT[self.model.text]
        # dev's folder says PixtralProcessor, which needs torchvision for images; on text it is its tokenizer.
        parts = {"text_encoder": self.encoder(encoder), "tokenizer": self.tokenizer()}
        pipe = kind(**parts, scheduler=None, vae=None, transformer=None)
        length = self.model.text_length
        states, _ = pipe.encode_prompt(captions_of(prompts), device=self.text_device, max_sequence_length=length)
        return [Flux2Conditioning(text.clone()) for text in states.cpu()]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 1 height width"]) -> Float[Tensor, "b c 1 h w"]:
        """Mode of the VAE's posterior as 2x2 patches, `(z - mean) / std` by the VAE's batch norm in float32."""
        vae = self.vae()
        latents = vae.encode(pixels[:, :, 0].to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        latents = _patchify(latents)
        mean, variance = (v.float().cpu().view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
        return ((latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps))[:, :, None]

    def encode_images(
        self, pixels: Float[Tensor, "1 3 1 height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Latents of the reference images, sized as diffusers' pipeline does: at most 1 MP, cropped to the stride.

        Raises:
            ValueError: An image is under 64 pixels high or wide, or longer than 8:1.
        """
        del pixels
        stride = self.model.latents.spatial_stride
        processor = Flux2ImageProcessor(vae_scale_factor=stride)
        latents = []
        for control in controls:
            image = _at_most_a_megapixel(processor.check_image_input(control))
            width, height = (side // stride * stride for side in image.size)
            cropped = processor.preprocess(image, height=height, width=width, resize_mode="crop")
            latents.append(self.encode_pixels(cropped[:, :, None])[0, :, 0])
        return {"controls": tuple(latents)} if latents else {}

    def vae_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of 2x2 patches their cells."""
        channels, _, height, width = shape
        return 1, channels // 4, 2 * height, 2 * width

    def check_vae(self, vae: AutoencoderKLFlux2) -> None:
        """Refuse a VAE of another latent shape."""
        spec = self.model.latents
        channels, stride = 4 * vae.config.latent_channels, 2 ** len(vae.config.block_out_channels)
        if channels != spec.channels or stride != spec.spatial_stride:
            raise ValueError(
                f"model.vae={self.model.vae} makes {channels} channels at stride {stride} as 2x2 patches, the model "
                f"needs {spec.channels} at {spec.spatial_stride}"
            )
