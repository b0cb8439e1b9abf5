"""WAN 2.1 and 2.2: text and image to video, single experts and both, and TI2V-5B."""

import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mpp.models.tiny import TRANSFORMER, VAE, tiny_wan
from tests.families.base import Variant
from tests.families.parts import seeded

TINY = ("model.text_length=64",)
CLIP_WIDTH = 24
CHANNELS = {"in_channels": 36}  # noisy, mask and first frame
CLIP = {**CHANNELS, "image_dim": CLIP_WIDTH, "added_kv_proj_dim": 64}
FIVE = {"in_channels": 48, "out_channels": 48}
SMALL = {**TRANSFORMER, "num_attention_heads": 1, "attention_head_dim": 128, "rope_max_seq_len": 1024}
IMAGE = "model.image_to_video=true"


def save(folder: Path, *, second: bool = False, **changes) -> None:
    """The tiny text-to-video pipeline with other transformers."""
    tiny_wan(str(folder))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    for name in ("transformer", "transformer_2")[: 1 + second]:
        WanTransformer3DModel(**{**TRANSFORMER, **changes}).save_pretrained(folder / name)


def with_clip(folder: Path) -> None:
    """2.1 image to video: 4 x 4 patches and a class token instead of 16 x 16."""
    save(folder, **CLIP)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=16,
            patch_size=4,
        )
    ).eval().save_pretrained(folder / "image_encoder")  # fmt: skip
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "image_processor"
    )


def five(folder: Path) -> None:
    """TI2V-5B: patches of 2 x 2 pixels go into a VAE with residual down- and upsampling."""
    save(folder, **FIVE)
    shutil.rmtree(folder / "vae")
    random = torch.Generator().manual_seed(5)
    AutoencoderKLWan(
        **{**VAE, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        decoder_base_dim=8,
        scale_factor_spatial=16,
        latents_mean=(0.1 * torch.randn(48, generator=random)).tolist(),
        latents_std=(0.3 + 0.2 * torch.rand(48, generator=random)).tolist(),
    ).save_pretrained(folder / "vae")


def original_keys(state):
    """Diffusers keys to those of the released WAN files, written from the original model's module names."""
    table = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".o."),
        (".add_k_proj.", ".k_img."),
        (".add_v_proj.", ".v_img."),
        (".norm_added_k.", ".norm_k_img."),
        ("ffn.net.0.proj.", "ffn.0."),
        ("ffn.net.2.", "ffn.2."),
        ("proj_out.", "head.head."),
    ]
    renamed = {}
    for name, tensor in state.items():
        new = name
        for theirs, ours in table:
            new = new.replace(theirs, ours)
        if new == "scale_shift_table":
            new = "head.modulation"
        new = new.replace("scale_shift_table", "modulation")
        # norm2 and norm3 trade places between the two
        new = new.replace(".norm2.", ".norm_x.").replace(".norm3.", ".norm2.").replace(".norm_x.", ".norm3.")
        renamed[new] = tensor
    return renamed


def single_file(**changes):
    """A transformer with WAN's head size, and its state under the original names."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**SMALL, **changes})
    return model, {name: tensor.contiguous() for name, tensor in original_keys(model.state_dict()).items()}


def without_first_frame(tensor, shape):
    """The pipeline's latents hold the first frame too, which it overwrites with the given one."""
    del shape
    return tensor[:, :, 1:]


def variant(name, config, build, *overrides, single=None, **settings) -> Variant:
    """A variant of five frames, that is two latent ones."""
    file = None if single is None else partial(single_file, **single)
    chosen = (f"model={config}", *overrides)
    return Variant(name, chosen, seeded(build), frames=5, fixed_text=True, single_file=file, **settings)


VARIANTS = [
    variant("WAN 2.1 T2V", "wan", save, *TINY, single={}),
    variant(
        "WAN 2.1 I2V",
        "wan_i2v_480p",
        with_clip,
        f"model.clip_dim={CLIP_WIDTH}",
        single={**CLIP, "added_kv_proj_dim": 128},
    ),
    variant("WAN 2.2 A14B T2V both", "wan22", partial(save, second=True), *TINY),
    variant("WAN 2.2 A14B I2V both", "wan22_i2v", partial(save, second=True, **CHANNELS), *TINY),
    variant("WAN 2.2 A14B I2V low", "wan22_i2v_low", partial(save, second=True, **CHANNELS), *TINY, single=CHANNELS),
    variant("WAN 2.2 TI2V-5B T2V", "wan22_5b", five, *TINY, single=FIVE),
    variant("WAN 2.2 TI2V-5B I2V", "wan22_5b_i2v", five, *TINY, unpack=without_first_frame, single=FIVE),
]
