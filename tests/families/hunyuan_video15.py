"""HunyuanVideo 1.5: text to video and image to video."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig

from tests.families.base import Variant
from tests.families.parts import qwen_tokenizer, seeded

# 4.4M parameters, nearly all in the ByT5 projection, whose width of 2048 no setting changes.
TRANSFORMER = {
    "in_channels": 65, "out_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
VAE = {"block_out_channels": (8, 8, 16, 32, 64), "layers_per_block": 1}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
GLYPHS = {"vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
IMAGE = {
    "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
# The published targets, but for the number of the last block.
TARGETS = (
    r"transformer_blocks\.(\d+\.(attn\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ff\.net\.(0\.proj|2))"
    r"|(?!1\.)\d+\.(attn\.(add_q_proj|to_add_out)|ff_context\.net\.(0\.proj|2)))"
)


def transformer(**settings) -> HunyuanVideo15Transformer3DModel:
    """A random transformer."""
    return HunyuanVideo15Transformer3DModel(**{**TRANSFORMER, **settings}).eval()


def vae() -> AutoencoderKLHunyuanVideo15:
    """A random VAE whose latents of smooth images have unit variance."""
    model = AutoencoderKLHunyuanVideo15(**VAE).eval()
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, (64, 64), mode="bicubic")
    with torch.no_grad():
        latents = torch.cat([model.encode(image[None, :, None]).latent_dist.mode() for image in images])
    model.register_to_config(scaling_factor=1 / float(latents.std()))
    return model


def save(folder: Path, task: str) -> None:
    """All that both tasks have."""
    transformer(task_type=task).save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    size = qwen_tokenizer(folder / "tokenizer")
    Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(vocab_size=size, **TEXT)).eval().save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    T5EncoderModel(T5Config(**GLYPHS)).eval().save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")


@seeded
def text_to_video(folder: Path) -> None:
    """Text to video."""
    save(folder, "t2v")


@seeded
def image_to_video(folder: Path) -> None:
    """Image to video, with SigLIP."""
    save(folder, "i2v")
    SiglipVisionModel(SiglipVisionConfig(**IMAGE)).eval().save_pretrained(folder / "image_encoder")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "feature_extractor")


VARIANTS = [
    Variant(f"HunyuanVideo 1.5 {name}", (f"model={config}", f"model.lora_targets='{TARGETS}'"), build, frames=5)
    for name, config, build in (
        ("T2V", "hunyuan_video15", text_to_video),
        ("I2V", "hunyuan_video15_i2v", image_to_video),
    )
]
