"""Qwen-Image-Layered: an image into RGBA layers, with the base frame generated and without."""

from functools import partial

from diffusers import QwenImageLayeredPipeline
from torch import Tensor

from tests.families.base import Variant
from tests.families.parts import seeded
from tests.families.qwen_image import build, single_file

FLAGS = {"use_additional_t_cond": True, "use_layer3d_rope": True}


def unpack(tokens: Tensor, shape) -> Tensor:
    """By the pipeline's own function, whose sizes are in pixels and whose layers do not count the first frame."""
    _, frames, height, width = shape
    return QwenImageLayeredPipeline._unpack_latents(tokens, height * 8, width * 8, frames - 1, 8)


VARIANTS = [
    Variant(
        name,
        ("model=qwen_image_layered", *overrides),
        seeded(partial(build, channels=4, **FLAGS)),
        frames=3,
        unpack=unpack,
        single_file=partial(single_file, **FLAGS),
    )
    for name, overrides in (
        ("Qwen-Image-Layered", ()),
        ("Qwen-Image-Layered without base frame", ("model.drop_base_frame=true",)),
    )
]
