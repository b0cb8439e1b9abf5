"""Z-Image: text to image."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from tests.families.base import Variant
from tests.families.parts import qwen_tokenizer, seeded

TRANSFORMER = {
    "in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64],
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 1024,
}  # fmt: skip


def transformer(**settings) -> ZImageTransformer2DModel:
    """A random transformer; its padding tokens, zero when made, are random too."""
    model = ZImageTransformer2DModel(**{**TRANSFORMER, **settings}).eval()
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(token)
    return model


@seeded
def text_to_image(folder: Path) -> None:
    """The base model; its scheduler as published."""
    transformer().save_pretrained(folder / "transformer")
    AutoencoderKL(**VAE).eval().save_pretrained(folder / "vae")
    vocabulary = qwen_tokenizer(folder / "tokenizer")
    Qwen3Model(Qwen3Config(vocab_size=vocabulary, **TEXT)).eval().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")


def single_file() -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformer of the real head size, and its state under ComfyUI's names for Z-Image."""
    torch.manual_seed(0)
    model = transformer(
        dim=128, n_heads=1, n_kv_heads=1, n_layers=1, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512]
    )
    state = dict(model.state_dict())
    for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        attention = f"{block}.attention"
        state[f"{attention}.qkv.weight"] = torch.cat([state.pop(f"{attention}.to_{x}.weight") for x in "qkv"])
        state[f"{attention}.out.weight"] = state.pop(f"{attention}.to_out.0.weight")
        state[f"{attention}.q_norm.weight"] = state.pop(f"{attention}.norm_q.weight")
        state[f"{attention}.k_norm.weight"] = state.pop(f"{attention}.norm_k.weight")
    for ours, theirs in (("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer.")):
        for name in [name for name in state if name.startswith(ours)]:
            state[theirs + name.removeprefix(ours)] = state.pop(name)
    state["norm_final.weight"] = torch.ones(128)  # left over from Lumina in the published file
    return model, state


VARIANTS = [
    Variant(
        "Z-Image", ("model=z_image",), text_to_image, unpack=lambda x, shape: x[:, :, None], single_file=single_file
    )
]
