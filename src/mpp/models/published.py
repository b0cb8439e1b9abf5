"""Shapes of published transformers, for counting without their files: what differs from the defaults of their class.

Diffusers' classes have the sizes of one published model as defaults, and a family adds what its own settings say. Each
entry comes to the number of parameters that `docs/quickstarts.md` has, which a test compares.
"""

from collections.abc import Mapping

_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_WAN_IMAGE = {"in_channels": 36}
_WAN_CLIP = {**_WAN_IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}

PUBLISHED: Mapping[str, Mapping[str, object]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _WAN_SMALL,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {},
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _WAN_CLIP,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _WAN_CLIP,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {},
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _WAN_IMAGE,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _WAN_5B,
    "black-forest-labs/FLUX.1-dev": {},
    "black-forest-labs/FLUX.1-Kontext-dev": {},
    "black-forest-labs/FLUX.2-dev": {},
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "Qwen/Qwen-Image": {},
    "Qwen/Qwen-Image-Edit": {},
    "Qwen/Qwen-Image-Edit-2509": {},
    "Qwen/Qwen-Image-Edit-2511": {},
    "Qwen/Qwen-Image-Layered": {},
    "Tongyi-MAI/Z-Image": {},
    "hunyuanvideo-community/HunyuanVideo": {},
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": {"target_size": 640},
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": {"target_size": 640},
    "Lightricks/LTX-2": {},
}


def published_config(pretrained: str) -> Mapping[str, object]:
    """What the transformer's configuration has besides its class's defaults.

    Args:
        pretrained: Hub id.

    Raises:
        ValueError: Nothing is known of it.
    """
    if pretrained not in PUBLISHED:
        raise ValueError(
            f"the shape of model.pretrained={pretrained} is not known here; give a diffusers folder with the "
            f"transformer's config.json, or a single file. Known without files: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[pretrained]
