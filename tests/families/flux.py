"""FLUX.1 dev and Kontext."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.families.base import Variant
from tests.families.parts import clip_text, seeded, t5

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SCHEDULE = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def transformer(**settings) -> FluxTransformer2DModel:
    """A random transformer in which everything matters: text, time, guidance, both kinds of blocks."""
    model = FluxTransformer2DModel(**{**TRANSFORMER, **settings}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def vae() -> AutoencoderKL:
    """16 channels at stride 8, with the statistics of its own latents of smooth images."""
    model = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, (64, 64), mode="bicubic")
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mode()
    model.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return model


@seeded
def pipeline(folder: Path) -> None:
    """Dev and Kontext have the same components."""
    transformer().save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    clip_text(folder)
    t5(folder, name="text_encoder_2", tokenizer="tokenizer_2")
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")


def unpack(tensor, shape):
    """Packed tokens to latents."""
    _, _, height, width = shape
    return FluxPipeline._unpack_latents(tensor, 8 * height, 8 * width, 8)[:, :, None]


# names of black-forest-labs/flux, src/flux/model.py and modules/layers.py
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE, DOUBLE_NORMS),
    "single_blocks": ("single_transformer_blocks", SINGLE, SINGLE_NORMS),
}


def original_state(model: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """The state under the original implementation's names."""
    state = model.state_dict()
    found = {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in TOP.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):  # the original chunks shift first, diffusers scale
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    counts = {"double_blocks": len(model.transformer_blocks), "single_blocks": len(model.single_transformer_blocks)}
    for new, (old, layers, norms) in BLOCKS.items():
        for number in range(counts[new]):
            for name, parts in layers.items():
                for kind in ("weight", "bias"):
                    stacked = [state[f"{old}.{number}.{part}.{kind}"] for part in parts]
                    found[f"{new}.{number}.{name}.{kind}"] = torch.cat(stacked)
            for name, norm in norms.items():
                found[f"{new}.{number}.{name}.scale"] = state[f"{old}.{number}.{norm}.weight"]
    return found


def single_file():
    """One head of the published size."""
    torch.manual_seed(0)
    model = transformer(attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(16, 56, 56))
    return model, original_state(model)


DEV = Variant(
    "FLUX.1 dev",
    ("model=flux", "model.text_length=64"),
    pipeline,
    unpack=unpack,
    fixed_text=True,
    single_file=single_file,
)
KONTEXT = Variant(
    "FLUX.1 Kontext",
    ("model=flux_kontext", "model.text_length=64", "model.auto_resize=false"),
    pipeline,
    controls=1,
    unpack=unpack,
    fixed_text=True,
    single_file=single_file,
)
VARIANTS = [DEV, KONTEXT]
