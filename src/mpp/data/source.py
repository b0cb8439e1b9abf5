"""A folder of pictures with masks and captions, as the list of samples to prepare."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mpp.data.media import SUFFIXES
from mpp.data.preservation import OtherCaptions

MaskKind = Literal["folder", "masklabel", "alpha"]
_LABEL = "-masklabel"


@dataclass(frozen=True)
class Item:
    """One picture to prepare.

    Attributes:
        key: Path below the picture folder without suffix.
        split: `train` or `val`.
        picture: The picture file.
        mask: The mask file, or None where only the picture's own alpha can be the mask.
        mask_kind: Where `mask` was found.
        caption: Text of the caption file; empty without one.
        captioned: Whether there is a caption file.
    """

    key: str
    split: str
    picture: Path
    mask: Path | None
    mask_kind: MaskKind | None
    caption: str
    captioned: bool


@dataclass(frozen=True)
class FolderSource:
    """Where pictures, masks and captions lie, and how they are brought into shape.

    Args:
        image_dir: Folder of pictures, searched with its subfolders. `NAME.txt` beside a picture is its caption.
        cache_dir: Where the cache goes.
        mask_dir: Folder of masks, matched by path below it and stem, any picture format.
        val_image_dir: Folder of pictures for validation only.
        val_mask_dir: Masks for these.
        mask_sources: Which kinds of mask are taken, the first found wins: `folder` (`mask_dir`), `masklabel`
            (`NAME-masklabel.png` beside the picture), `alpha` (the picture's alpha channel, where it is not opaque).
        require_mask: Refuse pictures without a mask instead of training on all of them.
        on_error: `stop` at unreadable pictures and wrong masks, or `skip` them and name them at the end.
        resolution: Side of the square bucket in pixels.
        max_aspect: Longest side of a bucket over its shortest.
        flip: Also prepare each training picture mirrored.
        preservation: Other captions of the training pictures that are encoded as well, for preservation samples.

    Raises:
        ValueError: An unknown mask source or error mode.
    """

    image_dir: str
    cache_dir: str
    mask_dir: str | None = None
    val_image_dir: str | None = None
    val_mask_dir: str | None = None
    mask_sources: Sequence[MaskKind] = ("folder", "masklabel", "alpha")
    require_mask: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    resolution: int = 512
    max_aspect: float = 2.0
    flip: bool = False
    preservation: OtherCaptions = field(default_factory=OtherCaptions)

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        unknown = [kind for kind in self.mask_sources if kind not in get_args(MaskKind)]
        if unknown:
            raise ValueError(f"data.mask_sources may name {', '.join(get_args(MaskKind))}, got {unknown[0]!r}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"data.on_error must be stop or skip, got {self.on_error!r}")

    def items(self) -> list[Item]:
        """All pictures, sorted by key.

        Raises:
            ValueError: A folder is not there or holds no pictures, or two pictures (or masks) share a stem.
        """
        found = self._scan("train", self.image_dir, self.mask_dir, "data.image_dir")
        if self.val_image_dir is not None:
            found += self._scan("val", self.val_image_dir, self.val_mask_dir, "data.val_image_dir")
        return found

    def unused_masks(self, items: Sequence[Item]) -> list[str]:
        """Masks in the mask folders that belong to no picture: most often a misspelt name."""
        used = {item.mask for item in items}
        folders = [folder for folder in (self.mask_dir, self.val_mask_dir) if folder is not None]
        masks = [path for folder in folders for path in _by_stem(_folder(folder, "data.mask_dir"), "masks").values()]
        return [path.name for path in masks if path not in used]

    def _scan(self, split: str, image_dir: str, mask_dir: str | None, option: str) -> list[Item]:
        root = _folder(image_dir, option)
        masks = _by_stem(_folder(mask_dir, "data.mask_dir"), "masks") if mask_dir is not None else {}
        pictures = _by_stem(root, "pictures", within=mask_dir)
        if not pictures:
            raise ValueError(f"{option}={image_dir} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        prefix = "@val/" if split == "val" else ""
        return [self._item(prefix + key, split, path, masks.get(key)) for key, path in sorted(pictures.items())]

    def _item(self, key: str, split: str, picture: Path, folder_mask: Path | None) -> Item:
        label = picture.with_name(f"{picture.stem}{_LABEL}.png")
        candidates = {"folder": folder_mask, "masklabel": label if label.is_file() else None}
        kind = next((k for k in self.mask_sources if candidates.get(k) is not None), None)
        caption = picture.with_suffix(".txt")
        return Item(
            key=key,
            split=split,
            picture=picture,
            mask=candidates[kind] if kind else None,
            mask_kind=kind,
            caption=_read_caption(caption) if caption.is_file() else "",
            captioned=caption.is_file(),
        )


def _folder(path: str, option: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{option}={path} is no folder")
    return folder


def _by_stem(root: Path, what: str, within: str | None = None) -> dict[str, Path]:
    """Picture files below a folder by their relative path without suffix; a mask folder inside it is left out."""
    inner = Path(within).expanduser().resolve() if within else None
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix.lower() not in SUFFIXES or hidden or path.stem.endswith(_LABEL) or not path.is_file():
            continue
        if inner is not None and inner != root.resolve() and path.resolve().is_relative_to(inner):
            continue
        found[path.relative_to(root).with_suffix("").as_posix()].append(path)
    twins = [paths for paths in found.values() if len(paths) > 1]
    if twins:
        names = ", ".join(str(path) for path in twins[0])
        raise ValueError(f"two {what} share one stem: {names}; rename or remove one of them")
    return {key: paths[0] for key, paths in found.items()}


def _read_caption(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
