"""FLUX.1 dev (text to image) and FLUX.1 Kontext (editing) on diffusers' `FluxTransformer2DModel`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from mpp.core.flow import LinearShift, SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Generation, ImageInputs, LatentSpec, ModelId, Names, NativeRule, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of
from mpp.models.padding import pad_text
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.text_limit import TextLimit

_WIDTH = 3072  # of every published FLUX.1, built into diffusers' converter
_HEAD_DIM, _ROPE_AXES = 128, (16, 56, 56)  # the same; the axes are in no tensor
_DOUBLE = {  # layers of black-forest-labs/flux: diffusers' layers, in the order in which the original stacks them
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_LONGEST_TEXT = 512  # tokens, FluxPipeline.check_inputs
_SCHEDULE = {  # scheduler/scheduler_config.json of FLUX.1-dev
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}

# Private to diffusers: tests/models/test_private.py says when it changes.
_pack, _unpack = FluxPipeline._pack_latents, FluxPipeline._unpack_latents  # noqa: SLF001 (both pipelines')
_positions = FluxPipeline._prepare_latent_image_ids  # noqa: SLF001


@dataclass(frozen=True)
class FluxConditioning(Conditioning):
    """What FLUX.1 sees besides noisy latents.

    Attributes:
        text: T5's states with those of the padding, `(text_length, dim)`.
        pooled: CLIP's pooled state, `(dim,)`.
        control: Kontext: latents of the control image, `(channels, h, w)`.
    """

    text: Tensor
    pooled: Tensor
    control: Tensor | None = None


def _config(shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of a FLUX.1 transformer, read off its tensors' shapes."""
    width, in_channels = shapes["img_in.weight" if native else "x_embedder.weight"]
    head = shapes[
        "double_blocks.0.img_attn.norm.query_norm.scale" if native else "transformer_blocks.0.attn.norm_q.weight"
    ][0]
    if head != _HEAD_DIM:
        raise ValueError(f"heads of size {head}, FLUX.1 has {_HEAD_DIM}")
    pooled = "vector_in.in_layer.weight" if native else "time_text_embed.text_embedder.linear_1.weight"
    guidance = "guidance_in.in_layer.weight" if native else "time_text_embed.guidance_embedder.linear_1.weight"
    return {
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight" if native else "proj_out.weight"][0],
        "num_layers": count_blocks(shapes, "double_blocks." if native else "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_blocks." if native else "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight" if native else "context_embedder.weight"][1],
        "pooled_projection_dim": shapes[pooled][1],
        "guidance_embeds": guidance in shapes,
        "axes_dims_rope": _ROPE_AXES,
    }


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' conversion; it splits linear1 at the published width, so here that is done at the file's own."""
    width = state["img_in.weight"].shape[0]
    fused = {name: state.pop(name) for name in list(state) if ".linear1." in name}
    state.update({name: tensor.new_empty(7 * _WIDTH, 0) for name, tensor in fused.items()})
    converted = convert_flux_transformer_checkpoint_to_diffusers(state)
    while fused:
        name, tensor = fused.popitem()
        _, block, _, kind = name.split(".")
        parts = tensor.split([width, width, width, tensor.shape[0] - 3 * width])
        for layer, part in zip(_SINGLE["linear1"], parts, strict=True):
            converted[f"single_transformer_blocks.{block}.{layer}.{kind}"] = part.clone()
    return converted


def _rules(ours: str, theirs: str, layers: Mapping[str, tuple[str, ...]]) -> tuple[NativeRule, ...]:
    """Naming rules of one kind of blocks."""
    return tuple(
        NativeRule(
            rf"{ours}\.(\d+)\.(?:{'|'.join(re.escape(part) for part in parts)})",
            rf"{theirs}.\1.{name}",
            tuple(rf"{ours}.\1.{part}" for part in parts) if len(parts) > 1 else (),
        )
        for name, parts in layers.items()
    )


@dataclass(kw_only=True, eq=False)
class Flux(Family):
    """FLUX.1 dev, and Kontext, which sees a control image.

    Both are distilled for guidance: it is an input of the transformer, there is no negative prompt.

    Args:
        text_encoder: Folder or hub id of CLIP and T5 with their tokenizers; None: `pretrained`.
        kontext: One control image per sample, seen as latents after the noisy ones.
        auto_resize: Kontext: control images are brought to the nearest of its preferred resolutions (about one
            megapixel), as its pipeline does; False: they keep their size, down to a multiple of 16. Preparing alone
            reads it.
        guidance: That training tells the transformer, as musubi-tuner's flux_kontext_train_network.py does; samples are
            told `guidance_scale`.
        text_length: T5 tokens of every caption, at most 512. FLUX.1 attends to their padding, so it is part of the
            model.

    Raises:
        ValueError: An unknown dtype, or a text length out of range.
    """

    # all linear layers of both kinds of blocks but modulation and norms, as musubi-tuner's networks/lora_flux.py
    lora_targets: str | Sequence[str] = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    )
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=1, patch=(1, 2, 2))
    # flux_shift of musubi-tuner's hv_train_network.py: sigmoid of a normal, shifted by resolution
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=LinearShift(256, 0.5, 4096, 1.15))
    text_length: int = 512
    kontext: bool = False
    auto_resize: bool = True
    guidance: float = 1.0

    family = "flux"
    # Kontext's LoRAs are FLUX.1's to musubi-tuner. Its only text to image is sd-scripts', which calls it `flux1`
    model_id = ModelId("Flux.1-dev", "https://github.com/black-forest-labs/flux", "flux1")
    conditioning = FluxConditioning
    transformer_class = FluxTransformer2DModel
    single_file = SingleFile("double_blocks.0.img_attn.qkv.weight", _config, _convert)
    unquantised = (r"\.norm(1|1_context)?\.linear$",)
    text_components = ("text_encoder", "text_encoder_2")
    guidance_scale = 3.5  # FluxPipeline.__call__
    steps = 28
    native = (
        *_rules("transformer_blocks", "double_blocks", _DOUBLE),
        *_rules("single_transformer_blocks", "single_blocks", _SINGLE),
    )
    # ComfyUI takes diffusers' names for rows of its own layers (comfy/utils.py, flux_to_diffusers)
    named_by = MappingProxyType({"comfyui": Names(prefix="transformer.")})

    def __post_init__(self) -> None:
        """What Kontext has of its own."""
        super().__post_init__()
        if not 1 <= self.text_length <= _LONGEST_TEXT:
            raise ValueError(f"model.text_length must be 1 to {_LONGEST_TEXT} for FLUX.1, got {self.text_length}")
        if self.kontext:
            self.family = "flux_kontext"
            self.model_id = replace(self.model_id, version="flux_kontext")
            self.images = ImageInputs(least=1, most=1)
            self.cached_settings = ("text_length", "auto_resize")
            self.guidance_scale = 2.5  # the example in FluxKontextPipeline

    def expected_config(self) -> dict[str, object]:
        """Channels of packed latents, and the guidance input, which tells dev and Kontext from schnell."""
        return {"in_channels": 4 * self.latents.channels, "guidance_embeds": True}

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "FluxEncoders":
        """VAE and text encoders on `device`, each loaded when first used."""
        return FluxEncoders(self, device, memory)

    def collate(self, items: Sequence[FluxConditioning]) -> FluxConditioning:
        """Stack; every text has exactly `text_length` tokens, as FLUX.1 attends to T5's states of the padding.

        Raises:
            ValueError: A text of another length, a missing control image, or control images of several sizes.
        """
        text = pad_text([item.text for item in items], self.text_length)
        shortest = min(item.text.shape[0] for item in items)
        if shortest < self.text_length:
            raise ValueError(
                f"a cached caption has {shortest} tokens, model.text_length is {self.text_length}, and FLUX.1 needs "
                "the padding's states too; run `python -m mpp.prepare` again with this setting"
            )
        controls = [item.control for item in items if item.control is not None]
        if len(controls) != (len(items) if self.kontext else 0):
            wanted = "Kontext needs one for each" if self.kontext else "FLUX.1 dev sees none; choose model=flux_kontext"
            raise ValueError(f"{len(controls)} of {len(items)} samples of a batch have a control image; {wanted}")
        sizes = sorted({tuple(control.shape) for control in controls})
        if len(sizes) > 1:
            raise ValueError(f"the control images of one batch have latents of several sizes: {sizes}")
        pooled = torch.stack([item.pooled for item in items])
        return FluxConditioning(text, pooled, torch.stack(controls) if controls else None)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> FluxConditioning:
        """Zeros for a text of `text_length` tokens, and for Kontext a control image of the sample's size."""
        channels, _, *sides = shape
        text = torch.zeros(self.text_length, config["joint_attention_dim"], dtype=DTYPES[self.text_dtype])
        pooled = torch.zeros(config["pooled_projection_dim"], dtype=DTYPES[self.text_dtype])
        return FluxConditioning(text, pooled, torch.zeros(channels, *sides) if self.kontext else None)

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: FluxConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`.

        FLUX.1 takes sigma itself, in [0, 1], and its forward casts it to the dtype of its activations.
        """
        dtype = transformer.x_embedder.weight.dtype
        count, _, _, height, width = noisy.shape
        tokens, ids = self._tokens(noisy[:, :, 0].to(dtype))
        seen = tokens.shape[1]
        if conditioning.control is not None:
            control, control_ids = self._tokens(conditioning.control.to(dtype))
            control_ids[:, 0] = 1  # FluxKontextPipeline.prepare_latents
            tokens, ids = torch.cat([tokens, control], 1), torch.cat([ids, control_ids])
        (prediction,) = transformer(
            hidden_states=tokens,
            timestep=sigma.float(),
            guidance=torch.full((count,), self.guidance, device=noisy.device),
            encoder_hidden_states=conditioning.text.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            txt_ids=ids.new_zeros(conditioning.text.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )
        stride = self.latents.spatial_stride
        return _unpack(prediction[:, :seen], height * stride, width * stride, stride)[:, :, None]

    @staticmethod
    def _tokens(latents: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n packed"], Float[Tensor, "n 3"]]:
        """Packed latents and the positions of their tokens."""
        count, channels, height, width = latents.shape
        packed = _pack(latents, count, channels, height, width)
        ids = _positions(count, height // 2, width // 2, latents.device, torch.float32)
        return packed, ids

    def pipeline(self, transformer: nn.Module, encoders: "FluxEncoders") -> FluxPipeline | FluxKontextPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        kind = FluxKontextPipeline if self.kontext else FluxPipeline
        pipe = kind(
            scheduler=self.scheduler(FlowMatchEulerDiscreteScheduler(**_SCHEDULE)),
            vae=encoders.vae(),
            transformer=transformer,
            **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        )
        # else the VAE gets latents in the text's dtype, whatever its own is
        pipe._unpack_latents = lambda *sizes: _unpack(*sizes).to(pipe.vae.dtype)  # noqa: SLF001
        return pipe

    def arguments(
        self, positive: FluxConditioning, negative: FluxConditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text, the embedded guidance, and Kontext's control latents as training sees them."""
        del negative
        arguments = {
            "prompt_embeds": positive.text.to(DTYPES[self.dtype]),  # whose dtype the pipeline gives its latents
            "pooled_prompt_embeds": positive.pooled.to(DTYPES[self.dtype]),
            "guidance_scale": generation.guidance_scale,
        }
        if self.kontext:
            arguments["image"] = positive.control
            arguments["max_area"] = (
                generation.height * generation.width
            )  # else the pipeline changes the size to a megapixel
        return arguments


class FluxEncoders(FamilyEncoders):
    """AutoencoderKL, CLIP and T5, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKL
    model: Flux

    def text_limit(self) -> TextLimit:
        """T5's; CLIP's 77 tokens make but one pooled vector."""
        return TextLimit(self.tokenizer("tokenizer_2"), self.model.text_length)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[FluxConditioning]:
        """T5's states of `text_length` tokens, padding included, and CLIP's pooled state, by diffusers' pipeline."""
        pipe = FluxPipeline(
            scheduler=None,
            vae=None,
            text_encoder=self.encoder(CLIPTextModel),
            tokenizer=self.tokenizer(),
            text_encoder_2=self.encoder(T5EncoderModel, "text_encoder_2"),
            tokenizer_2=self.tokenizer("tokenizer_2"),
            transformer=None,
        )
        text, pooled, _ = pipe.encode_prompt(
            prompt=captions_of(prompts),
            prompt_2=None,
            device=self.text_device,
            max_sequence_length=self.model.text_length,
        )
        pairs = zip(text.cpu(), pooled.cpu(), strict=True)
        return [FluxConditioning(states.clone(), state.clone()) for states, state in pairs]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `(z - shift_factor) * scaling_factor` in float32.

        Raises:
            ValueError: More than one frame.
        """
        if pixels.shape[2] != 1:
            raise ValueError(f"FLUX.1 generates images, got a clip of {pixels.shape[2]} frames; prepare single images")
        return self._latents(pixels[:, :, 0])[:, :, None]

    @torch.no_grad()
    def encode_images(
        self, pixels: Float[Tensor, "1 3 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Kontext: latents of the control image.

        Raises:
            ValueError: Not exactly one control image.
        """
        del pixels
        if not self.model.kontext:
            return {}
        if len(controls) != 1:
            raise ValueError(f"FLUX.1 Kontext needs exactly 1 control image per sample, got {len(controls)}")
        return {"control": self._latents(self._control_pixels(controls[0].convert("RGB")))[0]}

    def _control_pixels(self, image: Image.Image) -> Float[Tensor, "1 3 height width"]:
        """A control image at the size that FluxKontextPipeline.__call__ brings it to."""
        step = self.model.latents.pixel_step
        if min(image.size) < step:
            raise ValueError(f"a control image has {image.width}x{image.height} pixels, needed are {step}x{step}")
        processor = VaeImageProcessor(vae_scale_factor=step)  # as the pipeline makes it
        height, width = processor.get_default_height_width(image)  # down to multiples of the step
        if self.model.auto_resize:
            aspect = width / height
            _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
            height, width = height // step * step, width // step * step
        return processor.preprocess(processor.resize(image, height, width), height, width)

    def _latents(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b c h w"]:
        vae = self.vae()
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def vae_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Without a frame axis."""
        channels, _, height, width = shape
        return 1, channels, height, width

    def check_vae(self, vae: AutoencoderKL) -> None:
        """Refuse a VAE of another latent shape."""
        spec, stride = self.model.latents, 2 ** (len(vae.config.block_out_channels) - 1)
        if vae.config.latent_channels != spec.channels or stride != spec.spatial_stride:
            raise ValueError(
                f"model.vae={self.model.vae} makes {vae.config.latent_channels} channels at stride {stride}, the model "
                f"needs {spec.channels} at {spec.spatial_stride}"
            )
