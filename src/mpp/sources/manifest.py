"""A manifest: a JSONL file whose rows name media, masks and captions, wherever they lie."""

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from pydantic import ConfigDict

from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.media.paths import MediaPath, as_path, join, kinds
from mpp.sources.captions import clean
from mpp.sources.items import Item
from mpp.sources.settings import SourceSettings
from mpp.sources.tables import as_record, json_rows


@dataclass(frozen=True)
class Row:
    """One row of a manifest; paths are relative to the manifest's folder, or URLs.

    Args:
        media: An image, a video, or a folder of frames.
        mask: Its mask: an image, for videos also a video or a folder of frames.
        caption: Its caption.
        key: Its name; None: its path below the manifest's folder without suffix.
        split: `train` or `val`.
        repeats: How often an epoch visits it, >= 1; None: as the dataset says.
        invert_mask: Whether the mask is 1 where the file is black; None: as the dataset says.
        controls: Its control images, in order.
        layers: Its layers, bottom to top.
        layer_masks: Each layer's own mask, null where it has none.
        starts: Numbers of the source frames at which chosen clips begin; only for videos.

    Raises:
        ValueError: Numbers out of range, or layer masks that do not go with the layers.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    media: str
    mask: str | None = None
    caption: str | None = None
    key: str | None = None
    split: Literal["train", "val"] = "train"
    repeats: int | None = None
    invert_mask: bool | None = None
    controls: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    layer_masks: list[str | None] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        paths = [self.media, *self.controls, *self.layers, *filter(None, (self.mask, *self.layer_masks))]
        if any(not path.strip() or "\0" in path for path in paths) or "" in (self.mask, *self.layer_masks):
            raise ValueError("an empty path; leave the field out, or null, for none")
        if self.repeats is not None and (self.repeats < 1 or (self.split == "val" and self.repeats > 1)):
            raise ValueError(f"repeats must be at least 1, and 1 for validation, got {self.repeats}")
        if self.layer_masks and len(self.layer_masks) != len(self.layers):
            raise ValueError(f"it has {len(self.layers)} layers and {len(self.layer_masks)} layer_masks; null is none")
        if any(start < 0 for start in self.starts) or len(set(self.starts)) < len(self.starts):
            raise ValueError(f"starts must be different numbers of frames, counted from 0, got {self.starts}")


@dataclass(frozen=True)
class _Placed:
    """A row with its paths."""

    where: str
    row: Row
    media: MediaPath
    mask: MediaPath | None
    controls: tuple[MediaPath, ...]
    layers: tuple[MediaPath, ...]
    layer_masks: tuple[MediaPath | None, ...]

    def paths(self) -> list[MediaPath]:
        others = (*self.controls, *self.layers, *self.layer_masks)
        return [path for path in (self.media, self.mask, *others) if path is not None]


def manifest_items(dataset: SourceSettings, *, with_layers: bool) -> list[tuple[Item, str]]:
    """The rows of a dataset's manifest as items, each with its file and line.

    Args:
        dataset: Its settings, with a manifest.
        with_layers: Whether layers are read.

    Raises:
        ValueError: Names file and line of a row that is damaged, has unknown fields, or names what is not there.
    """
    manifest = as_path(dataset.manifest)
    rows = [_placed(manifest, line, values) for line, values in json_rows(manifest)]
    if not rows:
        raise ValueError(f"data.manifest={dataset.manifest} has no rows")
    known = kinds(list(dict.fromkeys(path for row in rows for path in row.paths())))
    for row in rows:
        _check(row, known)
    return [(_item(row, manifest, dataset, with_layers=with_layers), row.where) for row in rows]


def _placed(manifest: MediaPath, line: int, values: Mapping[str, object]) -> _Placed:
    where, folder = f"{manifest}:{line}", manifest.parent
    row = as_record(Row, values, where)
    try:
        media, *controls = (join(folder, text) for text in (row.media, *row.controls))
        layers = tuple(join(folder, text) for text in row.layers)
        mask, *masks = (None if text is None else join(folder, text) for text in (row.mask, *row.layer_masks))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _Placed(where, row, media, mask, tuple(controls), layers, tuple(masks) or (None,) * len(layers))


def _check(placed: _Placed, known: Mapping[MediaPath, Literal["file", "folder"]]) -> None:
    """Refuse a row that names what is not there, or the wrong kind of thing."""
    missing = next((path for path in placed.paths() if path not in known), None)
    if missing is not None:
        raise ValueError(f"{placed.where}: {missing} is not there")
    moving = _moving(placed.media, known)
    if not moving and _suffix(placed.media) not in SUFFIXES:
        raise ValueError(f"{placed.where}: {placed.media} is no image, video or folder of frames, by its suffix")
    if not moving and placed.row.starts:
        raise ValueError(f"{placed.where}: starts are for videos, and {placed.media} is an image")
    if placed.mask is not None and _moving(placed.mask, known) and not moving:
        raise ValueError(f"{placed.where}: the mask {placed.mask} is a video or a folder, its media is an image")
    for path in (*placed.controls, *placed.layers, *filter(None, placed.layer_masks)):
        if _moving(path, known):
            raise ValueError(f"{placed.where}: {path} is no image; layers, their masks and controls are images")
    for mask, media in ((placed.mask, placed.media), *zip(placed.layer_masks, placed.layers, strict=True)):
        if mask == media:
            raise ValueError(f"{placed.where}: {mask} is named as its own mask")


def _moving(path: MediaPath, known: Mapping[MediaPath, Literal["file", "folder"]]) -> bool:
    return known[path] == "folder" or _suffix(path) in VIDEO_SUFFIXES


def _suffix(path: MediaPath) -> str:
    return path.suffix.lower()


def _item(placed: _Placed, manifest: MediaPath, dataset: SourceSettings, *, with_layers: bool) -> Item:
    row = placed.row
    train = row.split == "train"
    repeats = dataset.repeats if row.repeats is None else row.repeats
    key = row.key if row.key is not None else _key(placed.media, manifest.parent)
    return Item(
        key=key if train else f"@val/{key}",
        split=row.split,
        media=placed.media,
        mask=placed.mask,
        mask_kind=None if placed.mask is None else "manifest",
        caption=clean(row.caption or ""),
        captioned=row.caption is not None,
        layers=placed.layers if with_layers else (),
        layer_masks=placed.layer_masks if with_layers else (),
        controls=placed.controls,
        invert=dataset.invert_mask if row.invert_mask is None else row.invert_mask,
        repeats=repeats if train else 1,
        starts=tuple(row.starts),
        alpha="alpha" in dataset.mask_sources,
        require_mask=dataset.require_mask,
    )


def _key(media: MediaPath, folder: MediaPath) -> str:
    """Path below the manifest's folder without suffix; of media elsewhere, the whole path."""
    if isinstance(media, Path) and isinstance(folder, Path):
        below = _below(Path(os.path.abspath(media)), Path(os.path.abspath(folder)))
    else:
        inside = str(media).removeprefix(f"{str(folder).rstrip('/')}/").partition("://")
        below = (inside[2] or inside[0]).strip("/")
    stem, suffix = posixpath.splitext(below)
    return stem if suffix.lower() in SUFFIXES | VIDEO_SUFFIXES else below


def _below(path: PurePath, folder: PurePath) -> str:
    """An absolute path with slashes, below a folder where it lies in it, else below its drive."""
    return path.relative_to(folder if path.is_relative_to(folder) else path.anchor).as_posix()
