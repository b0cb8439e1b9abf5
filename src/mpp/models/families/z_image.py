"""Z-Image, text to image, on diffusers' `ZImageTransformer2DModel`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Qwen3Model

from mpp.core.flow import SigmaLaw
from mpp.memory.settings import EncoderMemory
from mpp.models.conditioning import Conditioning
from mpp.models.contract import Generation, LatentSpec, ModelId, Names, NativeRule, Prompt
from mpp.models.family import DTYPES, Family, FamilyEncoders, captions_of
from mpp.models.padding import pad_with_mask
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.text_limit import CAPTION, TextLimit, before_message

# Of the published transformer/config.json; single files do not state them. The axes add up to the head size.
_AXES_DIMS, _AXES_LENS = [32, 48, 48], [1536, 512, 512]
_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)\."


@dataclass(frozen=True)
class ZImageConditioning(Conditioning):
    """Text embeddings: `(tokens, dim)` for one caption, `(b, longest, dim)` batched, with True for real tokens."""

    text: Tensor
    text_mask: Tensor | None = None

    def to(self, device: torch.device | str) -> "ZImageConditioning":
        """The same on another device, but for the mask: it only says where the host cuts texts, without waiting."""
        return replace(super().to(device), text_mask=self.text_mask)

    def texts(self) -> list[Float[Tensor, "tokens dim"]]:
        """Each caption of a batch at its own length."""
        lengths = self.text_mask.sum(1).tolist()
        return [text[:length] for text, length in zip(self.text, lengths, strict=True)]


def _config(shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of a Z-Image transformer, read off its tensors' shapes."""
    dim, patch = shapes["x_embedder.weight" if native else "all_x_embedder.2-1.weight"]
    if dim % sum(_AXES_DIMS):
        raise ValueError(f"width {dim} is no multiple of Z-Image's head size {sum(_AXES_DIMS)}")
    images = shapes.get("siglip_embedder.1.weight")
    return {
        "in_channels": patch // 4,
        "dim": dim,
        "n_layers": count_blocks(shapes, "layers."),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner."),
        "n_heads": dim // sum(_AXES_DIMS),
        "n_kv_heads": dim // sum(_AXES_DIMS),
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "siglip_feat_dim": None if images is None else images[1],
        "axes_dims": _AXES_DIMS,
        "axes_lens": _AXES_LENS,
    }


@dataclass(kw_only=True, eq=False)
class ZImage(Family):
    """Z-Image text to image.

    Args:
        text_encoder: Folder or hub id of Qwen3 and its tokenizer; None: `pretrained`.
        text_length: Tokens that captions are cut at. They have their own length up to there.
    """

    # all attention and feed-forward layers of the main blocks, without refiners and modulation:
    # musubi-tuner, networks/lora_zimage.py
    lora_targets: str | Sequence[str] = r"layers\.\d+\.(attention\.to_[qkv]|attention\.to_out\.0|feed_forward\.w[123])"
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=1, patch=(1, 2, 2))
    # towards noise: musubi-tuner, docs/zimage.md; the sampler's is 6.0
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=2.0)
    text_length: int = 512

    family = "z_image"
    model_id = ModelId("Z-Image", "https://github.com/Tongyi-MAI/Z-Image", "z_image")
    conditioning = ZImageConditioning
    transformer_class = ZImageTransformer2DModel
    single_file = SingleFile("x_embedder.weight", _config, convert_z_image_transformer_checkpoint_to_diffusers)
    unquantised = (r"\.adaLN_modulation\.",)
    guidance_scale = 5.0  # the model card's 4, counted as `arguments` says
    steps = 50
    native = (
        NativeRule(
            _BLOCK + r"attention\.to_[qkv]",
            r"\1.attention.qkv",
            parts=(r"\1.attention.to_q", r"\1.attention.to_k", r"\1.attention.to_v"),
        ),
        NativeRule(_BLOCK + r"attention\.to_out\.0", r"\1.attention.out"),
        NativeRule(_BLOCK + r"feed_forward\.(w[123])", r"\1.feed_forward.\2"),
        NativeRule(_BLOCK + r"adaLN_modulation\.0", r"\1.adaLN_modulation.0"),
    )
    # musubi-tuner's model has diffusers' names, and ComfyUI takes them for rows of its own layers
    # (comfy/utils.py, z_image_to_diffusers)
    named_by = MappingProxyType({"comfyui": Names(), "kohya": Names()})

    def expected_config(self) -> dict[str, object]:
        """The transformer's channels, and that it takes no images (Z-Image-Omni does)."""
        return {"in_channels": self.latents.channels, "siglip_feat_dim": None}

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "ZImageEncoders":
        """VAE and text encoder on `device`, each loaded when first used."""
        return ZImageEncoders(self, device, memory)

    def collate(self, items: Sequence[ZImageConditioning]) -> ZImageConditioning:
        """Pad every text to the longest, with the mask by which `velocity` takes the padding off again."""
        return ZImageConditioning(*pad_with_mask([item.text for item in items]))

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> ZImageConditioning:
        """Zeros for a text of `text_length` tokens."""
        del shape
        dim = config["cap_feat_dim"]
        return ZImageConditioning(torch.zeros(self.text_length, dim, dtype=DTYPES[self.text_dtype]))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: ZImageConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; Z-Image predicts `latents - noise` at time 1 - sigma, in lists of samples."""
        dtype = transformer.cap_embedder[1].weight.dtype
        (prediction,) = transformer(
            x=list(noisy.to(dtype).unbind()),
            t=1 - sigma.float(),
            cap_feats=[text.to(dtype) for text in conditioning.texts()],
            return_dict=False,
        )
        return -torch.stack(prediction)

    def pipeline(self, transformer: nn.Module, encoders: "ZImageEncoders") -> ZImagePipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        return ZImagePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=encoders.vae(),
            scheduler=self.scheduler(FlowMatchEulerDiscreteScheduler(shift=6.0)),
            transformer=transformer,
        )

    def arguments(
        self, positive: ZImageConditioning, negative: ZImageConditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings and guidance.

        Z-Image's pipeline adds `scale * (positive - negative)` to the positive prediction: its 0 is our 1, no guidance.
        """
        return {
            "prompt_embeds": positive.texts(),
            "negative_prompt_embeds": None if negative is None else negative.texts(),
            "guidance_scale": 0.0 if negative is None else generation.guidance_scale - 1,
        }


class ZImageEncoders(FamilyEncoders):
    """AutoencoderKL and Qwen3, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKL
    model: ZImage

    def text_limit(self) -> TextLimit:
        """That of the whole conversation."""
        conversation = [{"role": "user", "content": CAPTION}]
        before = before_message(self.tokenizer(), conversation, add_generation_prompt=True, enable_thinking=True)
        return TextLimit(self.tokenizer(), self.model.text_length, before)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt]) -> list[ZImageConditioning]:
        """Qwen3's hidden states before its last layer, as the pipeline takes them: at each caption's own length."""
        pipe = ZImagePipeline(
            tokenizer=self.tokenizer(),
            text_encoder=self.encoder(Qwen3Model),
            vae=None,
            scheduler=None,
            transformer=None,
        )
        texts, _ = pipe.encode_prompt(
            captions_of(prompts),
            device=self.text_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.text_length,
        )
        return [ZImageConditioning(text.cpu()) for text in texts]

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `(z - shift) * scale` in float32.

        Raises:
            ValueError: A clip instead of an image.
        """
        if pixels.shape[2] != 1:
            raise ValueError(f"Z-Image learns single images, got a clip of {pixels.shape[2]} frames; use images")
        vae = self.vae()
        latents = vae.encode(pixels[:, :, 0].to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
        return ((latents - vae.config.shift_factor) * vae.config.scaling_factor)[:, :, None]

    def vae_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Without a frame axis."""
        channels, _, height, width = shape
        return 1, channels, height, width

    def check_vae(self, vae: AutoencoderKL) -> None:
        """Refuse a VAE of another latent shape."""
        spec, stride = self.model.latents, 2 ** (len(vae.config.block_out_channels) - 1)
        if vae.config.latent_channels != spec.channels or stride != spec.spatial_stride:
            raise ValueError(
                f"model.vae={self.model.vae} makes {vae.config.latent_channels} channels at stride {stride}, "
                f"the model needs {spec.channels} at {spec.spatial_stride}"
            )
