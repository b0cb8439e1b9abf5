"""A sample's frames and masks as tensors: one frame for an image, those of a clip, or one per layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mpp.media import videos
from mpp.media.geometry import ASPECT_TOLERANCE, Geometry, check_aspect, crop_image, latent_mask
from mpp.media.images import DecodedImage, image_size, is_video, read_image, read_mask
from mpp.media.videos import Timeline
from mpp.models.contract import ImageInputs, LatentSpec
from mpp.sources.clips import Clip, pool_in_time
from mpp.sources.items import Item


@dataclass(frozen=True)
class Cut:
    """What of an image or video makes up a sample.

    Attributes:
        geometry: How each frame is brought to its bucket.
        clip: Which frames of a video; None for an image.
        media: The video's timeline; None for an image.
        mask: The timeline of a mask that moves; None for a still one.
    """

    geometry: Geometry
    clip: Clip | None = None
    media: Timeline | None = None
    mask: Timeline | None = None

    @property
    def numbers(self) -> tuple[int, int, int, int, bool]:
        """Its geometry as cache files keep it: size of the media, size of the bucket, and whether it is mirrored."""
        return (*self.geometry.source, *self.geometry.size, self.geometry.flip)

    @property
    def frames(self) -> tuple[int, ...] | None:
        """Numbers of the source frames of a clip; None for an image."""
        return None if self.clip is None else self.clip.frames


def frame_files(item: Item) -> tuple[Path, ...]:
    """The files that make up a sample: the image or video, and its layers, which are only read for models of layers."""
    return (item.media, *item.layers)


def check_layers(item: Item, spec: LatentSpec) -> None:
    """Refuse an image without layers where the model learns layers, and layers of another size than their image.

    Raises:
        ValueError: As above.
    """
    if not spec.frames.has_layers:
        return
    if not item.layers:
        stem = item.media.stem
        raise ValueError(f"{item.media} has no layers, and this model learns layers; add {stem}.layer0.png, ...")
    size = image_size(item.media)
    for layer in item.layers:
        if image_size(layer) != size:
            got = "x".join(map(str, image_size(layer)))
            raise ValueError(f"{layer} is {got}, its image {item.media} is {size[0]}x{size[1]}; export them alike")


def mask_files(item: Item) -> tuple[Path, ...]:
    """The mask files that apply to a sample; () where only alpha can be the mask, or there is none.

    Raises:
        ValueError: Some of its layers have a mask and others none.
    """
    own = (item.mask,) if item.mask is not None else ()
    layers = [path for path in item.layer_masks if path is not None]
    if not layers:
        return own
    if len(layers) < len(item.layer_masks):
        lacking = item.layer_masks.index(None)
        raise ValueError(
            f"{item.media}: {len(layers)} of its {len(item.layer_masks)} layers have a mask, layer {lacking} has "
            f"none; add {item.media.stem}.layer{lacking}.png to the masks (white: learn all of it)"
        )
    return (*own, *layers)


def mask_sources(item: Item) -> tuple[Path, ...]:
    """The files that a sample's mask is made from: its mask files, else the media itself, whose alpha it is.

    Raises:
        ValueError: As `mask_files` raises.
    """
    return mask_files(item) or (item.media,)


def mask_kind(item: Item, *, transparent: bool) -> str | None:
    """Where a sample's mask comes from; None without one.

    Args:
        item: The sample's.
        transparent: Whether the media has an alpha that is not opaque; with layers beside it that is no mask.
    """
    if item.mask_kind is not None:
        return item.mask_kind
    if any(item.layer_masks):
        return "folder"
    return "alpha" if transparent and item.alpha and not item.layers else None


def check_controls(item: Item, inputs: ImageInputs) -> None:
    """Refuse a sample with too few or too many control images.

    Raises:
        ValueError: Says how many there are and how many the model takes.
    """
    count = len(item.controls)
    if not inputs.least <= count <= inputs.most:
        wanted = str(inputs.least) if inputs.least == inputs.most else f"{inputs.least} to {inputs.most}"
        raise ValueError(
            f"{item.media} has {count} control images, this model takes {wanted}; put {item.media.stem}.png or "
            f"{item.media.stem}_0.png, {item.media.stem}_1.png, ... into data.control_dir"
        )


def read_controls(item: Item, geometry: Geometry) -> list[Image.Image]:
    """The control images, RGB: mirrored with the sample, and cut as it is where they have its shape.

    A control image of the sample's shape shows the same view, and must go on showing it; others keep all they show.
    """
    found = []
    for path in item.controls:
        image = read_image(path, srgb=True).rgb
        ratio = image.width * geometry.source[1] / (image.height * geometry.source[0])
        if max(ratio, 1 / ratio) <= 1 + ASPECT_TOLERANCE:
            box = geometry.box(*image.size)
            size = max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))
            image = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, box=box)
        found.append(ImageOps.mirror(image) if geometry.flip else image)
    return found


def read_item_frames(item: Item, cut: Cut) -> Tensor:
    """A sample's frames in their bucket.

    Returns:
        Bytes `(channels, f, height, width)`: RGB, with alpha as a fourth channel for layers.

    Raises:
        ValueError: A file is unreadable.
    """
    if cut.clip is not None:
        shown = videos.read_frames(item.media, cut.media, cut.clip.frames)
        return torch.stack([_bytes(crop_image(frame, cut.geometry)) for frame in shown], dim=1)
    images = [read_image(path, srgb=True) for path in frame_files(item)]
    frames = torch.stack([_bytes(crop_image(image.rgb, cut.geometry)) for image in images], dim=1)
    if not item.layers:
        return frames
    alphas = [_bytes(_alpha(image, cut.geometry).convert("RGB"))[:1] for image in images]
    return torch.cat([frames, torch.stack(alphas, dim=1)])


def first_image(item: Item, cut: Cut) -> Image.Image:
    """A sample's first frame in its bucket."""
    if cut.clip is None:
        return crop_image(read_image(item.media, srgb=True).rgb, cut.geometry)
    return crop_image(next(iter(videos.read_frames(item.media, cut.media, cut.clip.frames[:1]))), cut.geometry)


def as_pixels(frames: Tensor) -> Tensor:
    """Bytes as the VAE takes them: float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def as_image(frame: Tensor) -> Image.Image:
    """One frame of `read_item_frames`, `(channels, height, width)`, for eyes: a layer over grey."""
    array = frame.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[..., :3])
    if array.shape[2] == 3:
        return image
    return Image.composite(image, Image.new("RGB", image.size, (128, 128, 128)), Image.fromarray(array[..., 3]))


def read_item_masks(item: Item, cut: Cut, shape: Sequence[int], spec: LatentSpec) -> Tensor:
    """A sample's mask at latent resolution, `(1, f, h, w)`.

    A clip's moving mask is cut as the clip is and averaged over the frames of each latent frame; a still one holds for
    all of them. Layers have masks of their own, or the image's; the whole image of a layered sample without a
    mask of its own learns wherever any of its layers does.

    Raises:
        ValueError: An unreadable mask.
    """
    cells = (shape[2], shape[3])

    def average(mask: np.ndarray) -> Tensor:
        found = latent_mask(mask, cut.geometry, cells)
        return 1 - found if item.invert else found

    if item.layers:
        return _layer_masks(
            None if item.mask is None else average(read_mask(item.mask)),
            [average(read_mask(path)) for path in item.layer_masks if path is not None],
            len(item.layers),
        )
    if item.mask is None and cut.clip is not None:
        alphas = videos.read_alpha_frames(item.media, cut.media, cut.clip.frames)
        return pool_in_time((average(alpha)[0, 0] for alpha in alphas), spec.temporal_stride)[None]
    if item.mask is None:
        alpha = read_image(item.media).alpha
        if alpha is None:
            raise ValueError(f"{item.media} changed while it was prepared; run `python -m mpp.prepare` again")
        return average(alpha)
    if cut.mask is None:
        return average(read_mask(item.mask)).expand(1, shape[1], *cells).contiguous()
    moving = videos.read_mask_frames(item.mask, cut.mask, cut.clip.frames)
    return pool_in_time((average(mask)[0, 0] for mask in moving), spec.temporal_stride)[None]


def check_masks(item: Item, cut: Cut) -> None:
    """Refuse masks of another shape or length than their media; those that stand still are decoded for that.

    Raises:
        ValueError: As above.
    """
    size = cut.geometry.source
    for path in mask_files(item):
        if cut.mask is not None:
            videos.check_counts(cut.media, cut.mask, str(item.media), str(path))
            mask_size = cut.mask.size
        else:
            mask = read_mask(path)
            mask_size = (mask.shape[1], mask.shape[0])
        check_aspect(mask_size, size, f"{item.media} and {path}")


def moves(mask: Path | None) -> bool:
    """Whether a mask is one of a clip's frames each, a video or a folder, rather than one image."""
    return mask is not None and is_video(mask)


def transparent(image: DecodedImage) -> bool:
    """Whether an image has an alpha that is not opaque."""
    return image.alpha is not None and bool(image.alpha.min() < 1)


def _layer_masks(whole: Tensor | None, own: Sequence[Tensor], count: int) -> Tensor:
    layers = own or [whole] * count
    if whole is None:
        whole = torch.stack(list(own)).amax(0)
    return torch.cat([whole, *layers], dim=1)


def _bytes(image: Image.Image) -> Tensor:
    """`(channels, height, width)`."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def _alpha(image: DecodedImage, geometry: Geometry) -> Image.Image:
    """Alpha in the bucket, apart from the colours, which keep their values under transparent pixels."""
    if image.alpha is None:
        return Image.new("L", geometry.size, 255)
    return crop_image(Image.fromarray((image.alpha * 255).round().astype("uint8")), geometry)
