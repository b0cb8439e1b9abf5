"""Colours as a viewer shows them: ICC profiles of image files, converted to sRGB by LittleCMS."""

from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Profile = Literal["none", "converted", "misfit"]

_SPACES = {"RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB", "P": "RGB", "CMYK": "CMYK"}
_SPACES |= dict.fromkeys(("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"), "L")
_SAME = 2  # levels by which profiles of sRGB itself differ from LittleCMS's, or less


def profile_kind(image: Image.Image) -> Profile:
    """What becomes of an image's profile; only its head is looked at.

    Returns:
        `none` where there is none, or that of sRGB: the numbers stay what they are. `converted` where the numbers mean
        other colours than in sRGB. `misfit` where the profile is damaged or of other channels than the image, so that
        viewers leave it out.
    """
    profile, space = image.info.get("icc_profile"), _SPACES.get(image.mode)
    if not profile:
        return "none"
    try:
        return "none" if _transform(profile, space) is None else "converted"
    except ImageCms.PyCMSError:
        return "misfit"


def in_srgb(image: Image.Image, head: Image.Image) -> Image.Image:
    """An image as RGB in sRGB.

    Args:
        image: Without alpha, 8 bits; greys may be given as RGB.
        head: The image as it was opened, whose mode the profile is for.
    """
    if profile_kind(head) != "converted":
        return image.convert("RGB")
    space = _SPACES[head.mode]
    return ImageCms.applyTransform(image.convert(space), _transform(head.info["icc_profile"], space))


@lru_cache(maxsize=32)
def _transform(profile: bytes, space: str | None) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it makes no difference.

    Raises:
        PyCMSError: The profile is damaged, or of other channels.
    """
    if space is None:
        raise ImageCms.PyCMSError("no profile is for such channels")
    # its optimised way for greys is up to 10 levels off where a curve is steep
    flags = ImageCms.Flags.NOOPTIMIZE if space == "L" else ImageCms.Flags.NONE
    found = ImageCms.buildTransform(BytesIO(profile), _SRGB, space, "RGB", flags=flags)
    tried = _colours(space)
    was = np.asarray(tried.convert("RGB"), dtype=np.int16)
    if np.abs(np.asarray(ImageCms.applyTransform(tried, found), dtype=np.int16) - was).max() <= _SAME:
        return None
    return found


def _colours(space: str) -> Image.Image:
    """An image of all greys, and of colours all over the cube."""
    if space == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    channels = len(space)
    cube = np.stack(np.meshgrid(*[levels] * channels), -1).reshape(1, -1, channels)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], channels, axis=2)
    return Image.fromarray(np.concatenate([greys, cube], axis=1), space)


_SRGB = ImageCms.createProfile("sRGB")
