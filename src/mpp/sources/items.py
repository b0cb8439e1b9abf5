"""What a source says of one image or video."""

from dataclasses import dataclass
from typing import Literal

from mpp.media.images import is_video
from mpp.media.paths import MediaPath

MaskSource = Literal["folder", "masklabel", "sidecar", "alpha"]
MaskKind = Literal[MaskSource, "manifest"]


@dataclass(frozen=True)
class Item:
    """One image or video to prepare.

    Attributes:
        key: Its name, unique among all items: the path below its folder without suffix, behind the name of its dataset
            where there are several, and behind `@val/` for validation.
        split: `train` or `val`.
        media: The image or video file, or a folder of frames.
        mask: The mask file, or a folder of masks for the frames of a video; None where only the image's own alpha can
            be the mask.
        mask_kind: Where `mask` was found.
        caption: Its caption, with the trigger word; empty without one.
        captioned: Whether a caption was found.
        layers: Its layers, bottom to top; only read for layered models.
        layer_masks: Each layer's own mask, None where it has none.
        controls: Its control images.
        invert: Whether the mask is 1 where the file (or the alpha channel) says 0.
        repeats: How often an epoch visits it, >= 1.
        starts: Numbers of the source frames at which chosen clips begin; only for videos.
        variants: The caption with its tags in other orders; only for training.
        alpha: Whether the image's alpha is its mask where `mask` is None and the alpha is not opaque.
        require_mask: Whether it is refused without a mask.
    """

    key: str
    split: str
    media: MediaPath
    mask: MediaPath | None
    mask_kind: MaskKind | None
    caption: str
    captioned: bool
    layers: tuple[MediaPath, ...] = ()
    layer_masks: tuple[MediaPath | None, ...] = ()
    controls: tuple[MediaPath, ...] = ()
    invert: bool = False
    repeats: int = 1
    starts: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    alpha: bool = True
    require_mask: bool = False

    @property
    def video(self) -> bool:
        """Whether the media is a video or a folder of frames."""
        return is_video(self.media)
