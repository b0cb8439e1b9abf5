"""How musubi-tuner stores the samples of each family: the one place outside `models` that names families.

Sources stand in `musubi_contents`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Architecture
from mpp.musubi.contents import CONTROLS, Contents, MusubiFormat, control_contents, controls, needed, no_images

_HUNYUAN15_SCALE = 1.03682  # VAE_SCALING_FACTOR of its hunyuan_video_1_5_vae.py


def format_of(architecture: Architecture) -> MusubiFormat:
    """How a model's samples are stored.

    Raises:
        ValueError: They are neither read nor written, whether musubi-tuner has caches of the family or not.
    """
    family = architecture.family
    form = _FORMATS.get(family)
    if form is None:
        theirs = f"has caches ({_UNREAD[family]})" if family in _UNREAD else "has none"
        raise ValueError(
            f"data.layout=musubi and export=musubi do not know {family}, of which musubi-tuner {theirs}; prepare a "
            "cache with `python -m mpp.prepare` and train on it with data.layout=mpp"
        )
    return form(architecture) if callable(form) else form


# ---------------------------------------------------------------- WAN


def _wan(model: Architecture) -> MusubiFormat:
    """The architecture `wan`, of which musubi-tuner knows the VAE of 2.1 alone.

    Latents are normalised; the first frame's are stored with their mask, as the transformer takes them.
    """
    seen = "latents_image" + ("|clip" if model.clip_dim else "")
    return MusubiFormat(
        names={"wan": ("wan",)},
        text={"text": ("t5", 2)},
        latents_dtype=torch.bfloat16,
        tokens=(1, model.text_length),
        reads=seen if model.image_to_video else "",
        ignores="clip|latents_image|latents_control",
        images=partial(_wan_images, model.clip_dim) if model.image_to_video else no_images,
        contents=_wan_contents,
        mistyped=("clip",),
    )


def _wan_images(clip_dim: int | None, contents: Contents) -> dict[str, Tensors]:
    condition, latents = needed(contents, "latents_image", 4).float(), contents["latents"]
    channels, *cells = latents.shape
    if list(condition.shape) != [4 + channels, *cells]:
        raise ValueError(f"holds latents_image of shape {tuple(condition.shape)}, wanted is {(4 + channels, *cells)}")
    if clip_dim is None:
        return {"condition": condition}
    image = needed(contents, "clip", 2).float()
    if image.shape[1] != clip_dim:
        raise ValueError(f"holds clip {image.shape[1]} wide, model.clip_dim is {clip_dim}")
    return {"image": image, "condition": condition}


def _wan_contents(record: Conditioning, latents: Tensor) -> dict[str, Tensor]:
    del latents
    found = {} if record.condition is None else {"latents_image": record.condition.bfloat16()}
    return found if record.image is None else {**found, "clip": record.image.half()}


# ---------------------------------------------------------------- HunyuanVideo


_HUNYUAN = MusubiFormat(  # text to video alone
    names={"hv": ("hunyuan_video",)},
    text={"text": ("llm", 2), "pooled": ("clipL", 1)},
    latents_dtype=torch.float16,
    scale=0.476986,  # SCALING_FACTOR of its hunyuan_model/vae.py
    padded=256,  # text_len of its hunyuan_model/text_encoder.py
    varlen=False,
    ignores="clipL_mask",
)


def _hunyuan15(model: Architecture) -> MusubiFormat:
    """The architecture `hv15`."""
    video = model.images.first_frame
    return MusubiFormat(
        names={"hv15": ("hunyuan_video_1_5",)},
        text={"text": ("vl_embed", 2), "glyphs": ("byt5_embed", 2)},
        latents_dtype=torch.float16,
        scale=_HUNYUAN15_SCALE,
        reads="latents_image|siglip" if video else "",
        ignores="latents_image|siglip",
        images=_hunyuan15_images if video else no_images,
        contents=_hunyuan15_contents,
    )


def _hunyuan15_images(contents: Contents) -> dict[str, Tensors]:
    """The first frame's latents stand, as the VAE made them, before zeros and above their mask; stills need none."""
    channels, frames, *cells = contents["latents"].shape
    if frames == 1:
        return {}
    latents = needed(contents, "latents_image", 4)
    if list(latents.shape) != [channels + 1, frames, *cells]:
        wanted = (channels + 1, frames, *cells)
        raise ValueError(f"holds latents_image of shape {tuple(latents.shape)}, wanted is {wanted}")
    return {
        "image_latents": latents[:channels, :1].float() * _HUNYUAN15_SCALE,
        "image_embeds": needed(contents, "siglip", 2),
    }


def _hunyuan15_contents(record: Conditioning, latents: Tensor) -> dict[str, Tensor]:
    if record.image_latents is None:
        return {}
    first = functional.pad(record.image_latents / _HUNYUAN15_SCALE, (0, 0) * 3 + (0, 1), value=1.0)
    later = latents.shape[1] - 1
    return {"latents_image": functional.pad(first, (0, 0, 0, 0, 0, later)), "siglip": record.image_embeds}


# ---------------------------------------------------------------- FLUX.2


def _flux2(names: Mapping[str, tuple[str, ...]], model: Architecture) -> MusubiFormat:
    """Latents are normalised 2x2 patches as ours; klein's two sizes have names of their own."""
    return MusubiFormat(
        names=names,
        text={"text": ("ctx_vec", 2)},
        latents_dtype=torch.float32,
        flat=True,
        sizes=2,
        tokens=(model.text_length, model.text_length),
        varlen=False,
        reads=CONTROLS,
        ignores="ctx_seq_len",
        images=partial(controls, least=model.images.least, most=model.images.most, axes=3),
        contents=partial(_control_contents, torch.float32),
        widths={"f2k4b": 7680, "f2k9b": 12288},  # three layers of Qwen 3 4B and 8B
    )


# ---------------------------------------------------------------- Qwen-Image

# Latents are normalised. musubi-tuner calls all of them `qwen_image` inside, blissful-tuner by their own names.
_QWEN = MusubiFormat(names={"qi": ("qwen_image",)}, text={"text": ("vl_embed", 2)}, latents_dtype=torch.bfloat16)


def _qwen_edit(model: Architecture) -> MusubiFormat:
    """Edit, 2509 and 2511 share a name: their files do not say for which of them text was encoded."""
    return replace(
        _QWEN,
        names={"qie": ("qwen_image", "qwen_image_edit")},
        reads=CONTROLS,
        images=partial(controls, least=model.images.least, most=model.images.most, axes=4),
        contents=partial(_control_contents, torch.bfloat16),
    )


def _whole_image(contents: Contents) -> dict[str, Tensors]:
    return {"condition": contents["latents"][:, :1].clone()}


_QWEN_LAYERED = replace(  # the whole image is the first frame; older files hold it again as `latents_control_0`
    _QWEN,
    names={"qil": ("qwen_image", "qwen_image_layered")},
    ignores="latents_control_0",
    images=_whole_image,
)


def _control_contents(dtype: torch.dtype, record: Conditioning, latents: Tensor) -> dict[str, Tensor]:
    del latents
    return control_contents(record.controls, dtype)


# ---------------------------------------------------------------- Z-Image


_Z_IMAGE = MusubiFormat(
    names={"zi": ("z_image",)},
    text={"text": ("llm_embed", 2)},
    latents_dtype=torch.float32,
    shift=0.1159,  # ZIMAGE_VAE_SHIFT_FACTOR and ZIMAGE_VAE_SCALING_FACTOR of its zimage_config.py
    scale=0.3611,
    flat=True,
)


_FORMATS = {
    "wan": _wan,
    "wan_i2v": _wan,
    "wan_i2v_clip": _wan,
    "hunyuan_video": _HUNYUAN,
    "hunyuan_video15": _hunyuan15,
    "hunyuan_video15_i2v": _hunyuan15,
    "flux2": partial(_flux2, {"f2d": ("flux_2_dev",)}),
    "flux2_klein": partial(_flux2, {"f2k4b": ("flux_2_klein_4b",), "f2k9b": ("flux_2_klein_9b",)}),
    "qwen_image": _QWEN,
    "qwen_image_edit": _qwen_edit,
    "qwen_image_edit_plus": _qwen_edit,
    "qwen_image_layered": _QWEN_LAYERED,
    "z_image": _Z_IMAGE,
}

# short names of the architectures that musubi-tuner has besides: its dataset/architectures.py
_UNREAD = {"flux_kontext": "fk", "kandinsky5": "k5"}
