"""An independent writer of musubi-tuner's and blissful-tuner's cache files, from their documented keys.

Source: musubi-tuner `src/musubi_tuner/dataset/cache_io.py` (`save_latent_cache*`, `save_text_encoder_output_cache*`),
`dataset/architectures.py` (names), `dataset/image_video_dataset.py` (`get_latent_cache_path`, the parts of file names),
`*_cache_latents.py` (what the tensors are); blissful-tuner's `dataset/cache_io.py` for `mask_weights` and
`cache_mask_*`. Plain safetensors: nothing of mpp is imported.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

FULL = {
    "hv": "hunyuan_video", "wan": "wan", "f2d": "flux_2_dev", "f2k4b": "flux_2_klein_4b", "f2k9b": "flux_2_klein_9b",
    "qi": "qwen_image", "qie": "qwen_image", "qil": "qwen_image", "hv15": "hunyuan_video_1_5", "zi": "z_image",
    "fp": "framepack", "k5": "kandinsky5",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Tensors of one sample by their keys, and where its files were written."""

    latents: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]

    def write(self, folder, short, item="a", **more):
        """Both files of an image."""
        path = latents_file(folder, short, item, self.latents, **more)
        text_file(folder, short, item, self.text)
        return path


def latents_file(folder, short, item, tensors, *, size=(640, 480), window=None, stated=None, baked=None, **metadata):
    """`{item}_{w:04d}x{h:04d}_{short}.safetensors`; of a clip `{item}_{start:05d}-{frames:03d}_...`."""
    said = {"architecture": stated or FULL.get(short, short), "width": str(size[0]), "height": str(size[1])}
    said["format_version"] = "1.0.1"
    if window is not None:
        item = f"{item}_{window[0]:05d}-{window[1]:03d}"
        said["frame_count"] = str(window[1])
    if baked is not None:
        said["cache_mask_gamma"], said["cache_mask_min_weight"] = (format(value, ".6g") for value in baked)
    path = Path(folder) / f"{item}_{size[0]:04d}x{size[1]:04d}_{short}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(tensors, path, {**said, **metadata})
    return path


def text_file(folder, short, item, tensors, *, caption=None, stated=None):
    """`{item}_{short}_te.safetensors`."""
    said = {"architecture": stated or FULL.get(short, short), "caption1": caption or f"an image of {item}"}
    path = Path(folder) / f"{item}_{short}_te.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(tensors, path, {**said, "format_version": "1.0.1"})
    return path


def _save(tensors, path, metadata):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)


def values(shape, dtype, seed=0):
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_values(shape, dtype=torch.float16, seed=7):
    """Random weights in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wan(f=2, h=4, w=6, *, tokens=5, dim=32, clip=None, image=False, seed=0):
    """bfloat16 throughout; CLIP's features are float16 under a key that says bfloat16."""
    latents = {f"latents_{f}x{h}x{w}_bfloat16": values((16, f, h, w), torch.bfloat16, seed)}
    if image or clip:
        latents[f"latents_image_{f}x{h}x{w}_bfloat16"] = values((20, f, h, w), torch.bfloat16, seed + 1)
    if clip:
        latents["clip_bfloat16"] = values((17, clip), torch.float16, seed + 2)
    return Made(latents, {"varlen_t5_bfloat16": values((tokens, dim), torch.bfloat16, seed + 3)})


def hv(f=2, h=4, w=6, *, tokens=5, dim=32, pooled=24, seed=0):
    """float16; Llama's states at 256 tokens with a mask of the real ones, CLIP's pooled state with a mask too."""
    latents = {f"latents_{f}x{h}x{w}_float16": values((16, f, h, w), torch.float16, seed)}
    text = {
        "llm_float16": values((256, dim), torch.float16, seed + 1),
        "llm_mask": (torch.arange(256) < tokens).long(),
        "clipL_float16": values((pooled,), torch.float16, seed + 2),
        "clipL_mask": torch.ones(77, dtype=torch.int64),
    }
    return Made(latents, text)


def hv15(f=2, h=4, w=6, *, tokens=5, dim=32, glyphs=3, glyph_dim=24, siglip=None, seed=0):
    """float16 latents as the VAE made them; the first frame's in float32 before zeros, under its mask."""
    latents = {f"latents_{f}x{h}x{w}_float16": values((32, f, h, w), torch.float16, seed)}
    if siglip:
        first = torch.zeros(33, f, h, w)
        first[:32, 0], first[32, 0] = values((32, h, w), torch.float16, seed + 1).float(), 1.0
        latents[f"latents_image_{f}x{h}x{w}_float32"] = first
        latents["siglip_float16"] = values((9, siglip), torch.float16, seed + 2)
    text = {
        "varlen_vl_embed_bfloat16": values((tokens, dim), torch.bfloat16, seed + 3),
        "varlen_byt5_embed_float16": values((glyphs, glyph_dim), torch.float16, seed + 4),
    }
    return Made(latents, text)


def flux2(h=4, w=6, *, tokens=224, dim=48, controls=(), seed=0):
    """float32 without an axis of frames, sizes without frames in the keys."""
    latents = {f"latents_{h}x{w}_float32": values((128, h, w), torch.float32, seed)}
    for number, (rows, columns) in enumerate(controls):
        key = f"latents_control_{number}_{rows}x{columns}_float32"
        latents[key] = values((128, rows, columns), torch.float32, seed + 1 + number)
    return Made(latents, {"ctx_vec_bfloat16": values((tokens, dim), torch.bfloat16, seed + 9)})


def qwen(f=1, h=4, w=6, *, tokens=5, dim=32, controls=(), seed=0):
    """bfloat16; frames are layers."""
    latents = {f"latents_{f}x{h}x{w}_bfloat16": values((16, f, h, w), torch.bfloat16, seed)}
    for number, (rows, columns) in enumerate(controls):
        key = f"latents_control_{number}_1x{rows}x{columns}_bfloat16"
        latents[key] = values((16, 1, rows, columns), torch.bfloat16, seed + 1 + number)
    return Made(latents, {"varlen_vl_embed_bfloat16": values((tokens, dim), torch.bfloat16, seed + 9)})


def z_image(h=4, w=6, *, tokens=5, dim=24, seed=0):
    """float32 as the VAE made them, without an axis of frames, which the key has."""
    latents = {f"latents_1x{h}x{w}_float32": values((16, h, w), torch.float32, seed)}
    return Made(latents, {"varlen_llm_embed_bfloat16": values((tokens, dim), torch.bfloat16, seed + 9)})
