"""What Qwen-Image and its layered sister share: Qwen2.5-VL's texts, the VAE, packing, original files.

Not an architecture: the two are, and neither imports the other.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor

from mpp.core.flow import LinearShift, SigmaLaw
from mpp.models.contract import LatentSpec, Ready
from mpp.models.family import DTYPES, DType, Family, FamilyEncoders
from mpp.models.single_file import Shapes, SingleFile, count_blocks
from mpp.models.text_limit import TextLimit, before_caption

LONGEST = 1024  # tokens of a text; the pipelines refuse more
_AXES = {128: (16, 56, 56)}  # rotary axes by head size, of every published Qwen-Image; files do not state them
_ZERO_COND_T = "__index_timestep_zero__"  # an empty tensor that ComfyUI's files of Edit 2511 have

# Private to diffusers: tests/models/test_private.py says when it changes.
_pack, _unpack = QwenImageLayeredPipeline._pack_latents, QwenImageLayeredPipeline._unpack_latents  # noqa: SLF001


def original_file(*, zero_cond_t: bool = False) -> SingleFile:
    """Loader of a single file: the original names are diffusers', only ComfyUI's empty marker is dropped."""
    return SingleFile("img_in.weight", partial(_config, zero_cond_t), _without_marker)


def _config(zero_cond_t: bool, shapes: Shapes, native: bool) -> dict[str, Any]:
    """Configuration of a Qwen-Image transformer, read off its tensors' shapes."""
    del native  # names are the same
    width, in_channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if head not in _AXES:
        raise ValueError(f"head size {head} is not Qwen-Image's {', '.join(map(str, _AXES))}")
    if _ZERO_COND_T in shapes and not zero_cond_t:
        raise ValueError("it is marked as Qwen-Image-Edit 2511; choose model=qwen_image_edit_2511")
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": _AXES[head],
        "zero_cond_t": zero_cond_t,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _without_marker(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != _ZERO_COND_T}


@dataclass(kw_only=True, eq=False)
class QwenFamily(Family):
    """Base of the Qwen-Image families.

    Args:
        text_length: Tokens that captions are cut at, 1 to 1024; they have their own length up to there.

    Raises:
        ValueError: A text length out of range.
    """

    # The image's attention, as diffusers' train_dreambooth_lora_qwen_image.py. musubi-tuner trains all linear layers
    # of the blocks but modulation: also add_[qkv]_proj, to_add_out, net.0.proj and net.2. Of the last block add_q_proj,
    # to_add_out and txt_mlp reach no output, so adapters there would never learn.
    lora_targets: str | Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=1, patch=(1, 2, 2))
    # qwen_shift of musubi-tuner: sigmoid of a normal, shifted by resolution as the published scheduler does
    sigma: SigmaLaw = SigmaLaw("logit_normal", shift=LinearShift(256, 0.5, 8192, 0.9))
    text_length: int = 512

    transformer_class = QwenImageTransformer2DModel
    single_file = original_file()
    unquantised = (r"\.(img|txt)_mod\.",)
    guidance_scale = 4.0
    steps = 50

    def __post_init__(self) -> None:
        """Refuse texts longer than the pipelines take."""
        super().__post_init__()
        if not 1 <= self.text_length <= LONGEST:
            raise ValueError(f"model.text_length must be in 1 to {LONGEST}, got {self.text_length}")

    def load_part(self, subfolder: str, ready: Ready | None = None) -> nn.Module:
        """One frozen transformer in `dtype`, whose rotary tables are fit for training whoever asks for them first.

        diffusers caches them for good; tables made in inference mode, as while validating, can never be trained with.
        """
        transformer = super().load_part(subfolder, ready)
        transformer.pos_embed.forward = torch.inference_mode(mode=False)(transformer.pos_embed.forward)
        return transformer

    def default_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Qwen-Image's, as musubi-tuner's qwen_image_utils.py has it from the published pipeline."""
        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
        )


def qwen_velocity(
    transformer: nn.Module,
    noisy: Float[Tensor, "b c f h w"],
    sigma: Float[Tensor, " b"],
    text: tuple[Tensor, Tensor],
    clean: Sequence[Tensor],
    **more: Tensor,
) -> Float[Tensor, "b c f h w"]:
    """Predicted `noise - latents` of the noisy frames, with clean latents `(b, c, 1, h, w)` behind them.

    The transformer takes sigma in [0, 1] as its timestep and rounds it to its own dtype.

    Args:
        transformer: The transformer.
        noisy: Noisy latents.
        sigma: Their noise level.
        text: Embeddings and mask.
        clean: Latents of the images it sees.
        more: Further arguments of the transformer.
    """
    dtype = transformer.img_in.weight.dtype
    embeddings, mask = text
    images = [noisy, *clean]
    (prediction,) = transformer(
        hidden_states=torch.cat([pack(latents.to(dtype)) for latents in images], 1),
        timestep=sigma.float(),
        encoder_hidden_states=embeddings.to(dtype),
        encoder_hidden_states_mask=mask,
        # one list per sample: with zero_cond_t the transformer reads them all
        img_shapes=[[grid for latents in images for grid in _grids(latents)]] * len(noisy),
        return_dict=False,
        **more,
    )
    frames, height, width = noisy.shape[2:]
    own = frames * (height // 2) * (width // 2)
    return _unpack(prediction[:, :own], height, width, frames - 1, 1)


def pack(latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b tokens dim"]:
    """Patches of 2x2 cells as tokens, frame by frame; with one frame all Qwen-Image pipelines pack alike."""
    b, c, f, h, w = latents.shape
    return _pack(latents.transpose(1, 2).contiguous(), b, c, h, w, f)


def _grids(latents: Float[Tensor, "b c f h w"]) -> list[tuple[int, int, int]]:
    frames, height, width = latents.shape[2:]
    return [(1, height // 2, width // 2)] * frames


def stack_images(latents: Sequence[Tensor | None], what: str) -> Tensor | None:
    """One batch of what the samples see, or None where they see nothing.

    Raises:
        ValueError: They differ in shape.
    """
    shapes = sorted({"none" if one is None else "x".join(map(str, one.shape)) for one in latents})
    if len(shapes) > 1:
        raise ValueError(f"the samples of a batch differ in {what}: {', '.join(shapes)}; batch those that are alike")
    return None if latents[0] is None else torch.stack(list(latents))


def text_arguments(
    positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor] | None, guidance: float, dtype: DType
) -> dict[str, Any]:
    """A pipeline's arguments for texts `(embeddings, mask)` and guidance; its latents have the texts' dtype."""
    embeddings, mask = (None, None) if negative is None else negative
    kind = DTYPES[dtype]
    return {
        "prompt_embeds": positive[0].to(kind),
        "prompt_embeds_mask": positive[1],
        "negative_prompt_embeds": None if embeddings is None else embeddings.to(kind),
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": guidance,
        "max_sequence_length": LONGEST,
    }


class ImagePipeline:
    """Mixin of diffusers' pipelines that see images.

    Attributes:
        home: Their module, whose `calculate_dimensions` makes sizes of a fixed area.
        sizes: Takes its place while the pipeline runs: what it makes of an area and a ratio of width to height.
    """

    home: ClassVar[ModuleType]
    sizes: Callable[[int, float], tuple[int | None, ...]]

    def __call__(self, **arguments: Any) -> Any:  # noqa: ANN401
        """The pipeline's call."""
        theirs = self.home.calculate_dimensions
        self.home.calculate_dimensions = self.sizes
        try:
            return super().__call__(**arguments)
        finally:
            self.home.calculate_dimensions = theirs

    def _encode_vae_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """In the VAE's own dtype; the pipeline comes with the text's."""
        latents = super()._encode_vae_image(image=image.to(self.vae.dtype), generator=generator)
        return latents.to(image.dtype)


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which nothing here needs and only torchvision provides."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:  # noqa: ANN401
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenEncoders(FamilyEncoders):
    """AutoencoderKLQwenImage and Qwen2.5-VL, each loaded on first use and freed by `release`."""

    vae_class = AutoencoderKLQwenImage
    colours = 3

    def text_pipeline(self, kind: type[DiffusionPipeline], **more: Any) -> DiffusionPipeline:  # noqa: ANN401
        """A pipeline that can only encode texts."""
        return kind(
            scheduler=None,
            vae=None,
            transformer=None,
            text_encoder=self.encoder(Qwen2_5_VLForConditionalGeneration),
            tokenizer=self.tokenizer(),
            **more,
        )

    def template_limit(self, pipe: DiffusionPipeline) -> TextLimit:
        """`text_length` tokens behind the pipeline's template."""
        tokens = pipe.prompt_template_encode_start_idx + self.model.text_length
        return TextLimit(self.tokenizer(), tokens, before_caption(pipe.prompt_template_encode))

    @torch.no_grad()
    def texts(self, encode: Callable[..., tuple[Tensor, Tensor | None]], **arguments: Any) -> list[Tensor]:  # noqa: ANN401
        """What a pipeline's `encode_prompt` makes of texts, each trimmed to its true length, on the CPU."""
        with _image_positions(self.encoder(Qwen2_5_VLForConditionalGeneration)):
            embeddings, mask = encode(device=self.text_device, **arguments)
        if mask is None:  # no padding
            mask = torch.ones(embeddings.shape[:2])
        return [row[real.bool()].cpu() for row, real in zip(embeddings, mask, strict=True)]

    @torch.no_grad()
    def latents_of(self, pixels: Float[Tensor, "b channels frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior of every frame as an image of its own, `(z - mean) / std` in float32.

        Raises:
            ValueError: Pixels that are not of the VAE's channels.
        """
        vae = self.vae()
        frames = pixels.to(self.device, vae.dtype).split(1, 2)
        latents = torch.cat([vae.encode(frame).latent_dist.mode() for frame in frames], 2).float().cpu()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (latents - mean) / std

    def check_vae(self, vae: AutoencoderKLQwenImage) -> None:
        """Refuse a VAE of other images or of another latent shape."""
        spec, stride = self.model.latents, 2 ** len(vae.config.temperal_downsample)
        found = (vae.config.input_channels, vae.config.z_dim, stride)
        if found != (self.colours, spec.channels, spec.spatial_stride):
            raise ValueError(
                f"model.vae={self.model.vae} makes {found[1]} channels at stride {stride} of {found[0]}-channel "
                f"images, the model needs {spec.channels} at {spec.spatial_stride} of {self.colours}-channel ones"
            )


@contextmanager
def _image_positions(encoder: Qwen2_5_VLForConditionalGeneration):  # noqa: ANN202
    """Tell Qwen2.5-VL which tokens are images.

    The pipelines drop `mm_token_type_ids`, without which transformers 5 numbers an image's tokens like words instead
    of by row and column, as the model was trained: https://github.com/huggingface/diffusers/issues/14194
    """

    def tell(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = kwargs["input_ids"] == module.config.image_token_id
        return args, {"mm_token_type_ids": images.int(), **kwargs}

    known = "mm_token_type_ids" in inspect.signature(encoder.forward).parameters
    handle = encoder.register_forward_pre_hook(tell, with_kwargs=True) if known else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
