"""A sample's frames and masks as tensors: one frame for a picture, one per layer for a layered one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mpp.data.media import (
    ASPECT_TOLERANCE,
    Geometry,
    Picture,
    check_aspect,
    crop_picture,
    latent_mask,
    picture_size,
    picture_tensor,
    read_mask,
    read_picture,
)
from mpp.data.source import Item
from mpp.models.base import LatentSpec, PictureInputs


def frame_files(item: Item, spec: LatentSpec) -> tuple[Path, ...]:
    """The files that make up a sample: the picture, and its layers for layered models.

    Raises:
        ValueError: A layered model and no layers, or layers of another size than the picture.
    """
    if not spec.layered:
        return (item.media,)
    if not item.layers:
        stem = item.media.stem
        raise ValueError(f"{item.media} has no layers, and this model learns layers; add {stem}.layer0.png, ...")
    size = picture_size(item.media)
    for layer in item.layers:
        if picture_size(layer) != size:
            got = "x".join(map(str, picture_size(layer)))
            raise ValueError(f"{layer} is {got}, its picture {item.media} is {size[0]}x{size[1]}; export them alike")
    return (item.media, *item.layers)


def mask_files(item: Item, spec: LatentSpec) -> tuple[Path, ...]:
    """The mask files that apply to a sample; () where only alpha can be the mask, or there is none.

    Raises:
        ValueError: Some of its layers have a mask and others none.
    """
    own = (item.mask,) if item.mask is not None else ()
    layers = [path for path in item.layer_masks if path is not None]
    if not spec.layered or not layers:
        return own
    if len(layers) < len(item.layer_masks):
        lacking = item.layer_masks.index(None)
        raise ValueError(
            f"{item.media}: {len(layers)} of its {len(item.layer_masks)} layers have a mask, layer {lacking} has "
            f"none; add {item.media.stem}.layer{lacking}.png to the masks (white: learn all of it)"
        )
    return (*own, *layers)


def check_controls(item: Item, inputs: PictureInputs) -> None:
    """Refuse a sample with too few or too many control pictures.

    Raises:
        ValueError: Says how many there are and how many the model takes.
    """
    count = len(item.controls)
    if not inputs.least <= count <= inputs.most:
        wanted = str(inputs.least) if inputs.least == inputs.most else f"{inputs.least} to {inputs.most}"
        raise ValueError(
            f"{item.media} has {count} control pictures, this model takes {wanted}; put {item.media.stem}.png or "
            f"{item.media.stem}_0.png, {item.media.stem}_1.png, ... into data.control_dir"
        )


def read_controls(item: Item, geometry: Geometry) -> list[Image.Image]:
    """The control pictures, RGB: mirrored with the sample, and cut as it is where they have its shape.

    A control picture of the sample's shape shows the same view, and must go on showing it; others keep all they show.
    """
    found = []
    for path in item.controls:
        picture = read_picture(path).rgb
        ratio = picture.width * geometry.source[1] / (picture.height * geometry.source[0])
        if max(ratio, 1 / ratio) <= 1 + ASPECT_TOLERANCE:
            box = geometry.box(*picture.size)
            size = max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))
            picture = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS, box=box)
        found.append(ImageOps.mirror(picture) if geometry.flip else picture)
    return found


def read_frames(files: Sequence[Path], geometry: Geometry, *, layered: bool) -> tuple[Tensor, list[Image.Image]]:
    """Frames in their bucket.

    Returns:
        Pixels in [-1, 1], `(3, f, height, width)`, with alpha as a fourth channel for layers; and the pictures.
    """
    pictures = [read_picture(path) for path in files]
    images = [crop_picture(picture.rgb, geometry) for picture in pictures]
    frames = torch.cat([picture_tensor(image) for image in images], dim=1)
    if not layered:
        return frames, images
    alphas = [_alpha(picture, image.size, geometry) for picture, image in zip(pictures, images, strict=True)]
    alpha = torch.cat([picture_tensor(a.convert("RGB"))[:1] for a in alphas], dim=1)
    shown = [_over_grey(image, a) for image, a in zip(images, alphas, strict=True)]
    return torch.cat([frames, alpha]), shown


def read_mask_frames(item: Item, geometry: Geometry, shape: Sequence[int], spec: LatentSpec) -> Tensor:
    """A sample's mask at latent resolution, `(1, f, h, w)`.

    Layers have masks of their own, or the picture's; the whole picture of a layered sample without a mask of its own
    learns wherever any of its layers does.

    Raises:
        ValueError: An unreadable mask, or one of another shape than its picture.
    """
    cells = (shape[2], shape[3])
    if not spec.layered:
        if item.mask is not None:
            return latent_mask(read_mask(item.mask), geometry, cells)
        alpha = read_picture(item.media).alpha
        if alpha is None:
            raise ValueError(f"{item.media} changed while it was prepared; run `python -m mpp.prepare` again")
        return latent_mask(alpha, geometry, cells)
    whole = None if item.mask is None else latent_mask(read_mask(item.mask), geometry, cells)
    own = [latent_mask(read_mask(path), geometry, cells) for path in item.layer_masks if path is not None]
    layers = own or [whole] * len(item.layers)
    if whole is None:
        whole = torch.stack(own).amax(0)
    return torch.cat([whole, *layers], dim=1)


def check_masks(item: Item, spec: LatentSpec) -> None:
    """Decode a sample's masks and refuse those of another shape than the picture.

    Raises:
        ValueError: As above.
    """
    size = picture_size(item.media)
    for path in mask_files(item, spec):
        mask = read_mask(path)
        check_aspect((mask.shape[1], mask.shape[0]), size, f"{item.media} and {path}")


def transparent(picture: Picture) -> bool:
    """Whether a picture has an alpha that is not opaque."""
    return picture.alpha is not None and bool(picture.alpha.min() < 1)


def _alpha(picture: Picture, size: tuple[int, int], geometry: Geometry) -> Image.Image:
    """Alpha in the bucket, apart from the colours, which keep their values under transparent pixels."""
    if picture.alpha is None:
        return Image.new("L", size, 255)
    return crop_picture(Image.fromarray((picture.alpha * 255).round().astype("uint8")), geometry)


def _over_grey(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """For eyes: a layer over grey."""
    return Image.composite(image, Image.new("RGB", image.size, (128, 128, 128)), alpha)
