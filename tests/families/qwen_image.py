"""Qwen-Image: text to image, Edit, Edit 2509, Edit 2511."""

from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from tests.families.base import Variant
from tests.families.parts import QWEN_SPECIAL, qwen_tokenizer, seeded

TRANSFORMER = {
    "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}  # fmt: skip
SCHEDULER = {
    "use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192,
    "max_shift": 0.9, "shift_terminal": 0.02,
}  # fmt: skip


def vae(**settings) -> AutoencoderKLQwenImage:
    """A random VAE whose latent statistics are those of its latents of smooth images."""
    model = AutoencoderKLQwenImage(**{**VAE, **settings}).eval()
    images = torch.rand(8, model.config.input_channels, 6, 6) * 2 - 1
    images = nn.functional.interpolate(images, (64, 64), mode="bicubic")
    with torch.no_grad():
        latents = torch.cat([model.encode(p[None, :, None]).latent_dist.mode() for p in images])
    model.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    return model


def text_encoder(folder: Path, *, images: bool) -> None:
    """Qwen2.5-VL with its tokenizer, and with its processor where it sees images, of which it makes few tokens."""
    size = qwen_tokenizer(folder / "tokenizer")
    if images:
        qwen_tokenizer(folder / "processor")
        few = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 16}
        Qwen2VLImageProcessor(size=few).save_pretrained(folder / "processor")
    ids = {token: size - len(QWEN_SPECIAL) + number for number, token in enumerate(QWEN_SPECIAL)}
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT, "vocab_size": size, "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).eval().save_pretrained(folder / "text_encoder")


def build(folder: Path, *, images: bool = False, channels: int = 3, **settings) -> None:
    """A random pipeline; its scheduler as published."""
    QwenImageTransformer2DModel(**{**TRANSFORMER, **settings}).save_pretrained(folder / "transformer")
    vae(input_channels=channels).save_pretrained(folder / "vae")
    text_encoder(folder, images=images)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")


def unpack(tokens: Tensor, shape) -> Tensor:
    """By the pipeline's own function, whose sizes are in pixels."""
    return QwenImagePipeline._unpack_latents(tokens, shape[2] * 8, shape[3] * 8, 8)


def single_file(**settings) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformer of the real head size, and its state: the original's module names are those of diffusers."""
    torch.manual_seed(0)
    real = {"attention_head_dim": 128, "num_attention_heads": 1, "num_layers": 1, "axes_dims_rope": (16, 56, 56)}
    model = QwenImageTransformer2DModel(**{**TRANSFORMER, **real, **settings})
    return model, dict(model.state_dict())


def single_file_2511() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same with the empty tensor by which ComfyUI knows Edit 2511."""
    model, state = single_file(zero_cond_t=True)
    return model, {**state, "__index_timestep_zero__": torch.zeros(0)}


SMALL = "model.control_pixels=6144"
with_images = partial(build, images=True)
VARIANTS = [
    Variant("Qwen-Image", ("model=qwen_image",), seeded(build), unpack=unpack, single_file=single_file),
    Variant(
        "Qwen-Image-Edit",
        ("model=qwen_image_edit", SMALL),
        seeded(with_images),
        controls=1,
        unpack=unpack,
        single_file=single_file,
    ),
    Variant(
        "Qwen-Image-Edit 2509",
        ("model=qwen_image_edit_plus", SMALL),
        seeded(with_images),
        controls=2,
        unpack=unpack,
        single_file=single_file,
    ),
    Variant(
        "Qwen-Image-Edit 2511",
        ("model=qwen_image_edit_2511", SMALL),
        seeded(partial(with_images, zero_cond_t=True)),
        controls=2,
        unpack=unpack,
        single_file=single_file_2511,
    ),
]
