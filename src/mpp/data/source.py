"""A folder of pictures with masks and captions, as the list of samples to prepare."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mpp.data.media import SUFFIXES, is_video
from mpp.data.preservation import OtherCaptions

MaskKind = Literal["folder", "masklabel", "alpha"]
_LABEL = "-masklabel"
_LAYER = re.compile(r"(.+)\.layer(\d+)")


@dataclass(frozen=True)
class Item:
    """One picture to prepare.

    Attributes:
        key: Path below the picture folder without suffix.
        split: `train` or `val`.
        media: The picture or video file, or a folder of frames.
        mask: The mask file, or None where only the picture's own alpha can be the mask.
        mask_kind: Where `mask` was found.
        caption: Text of the caption file; empty without one.
        captioned: Whether there is a caption file.
        layers: Its layers, bottom to top; only read for layered models.
        layer_masks: Each layer's own mask, None where it has none.
        controls: Its control pictures.
        invert: Whether the mask is 1 where the file says 0.
        repeats: How often an epoch visits it, >= 1.
        starts: Numbers of the source frames at which chosen clips begin; only for videos.
    """

    key: str
    split: str
    media: Path
    mask: Path | None
    mask_kind: MaskKind | None
    caption: str
    captioned: bool
    layers: tuple[Path, ...] = ()
    layer_masks: tuple[Path | None, ...] = ()
    controls: tuple[Path, ...] = ()
    invert: bool = False
    repeats: int = 1
    starts: tuple[int, ...] = ()

    @property
    def video(self) -> bool:
        """Whether the media is a video or a folder of frames."""
        return is_video(self.media)


@dataclass(frozen=True)
class FolderSource:
    """Where pictures, masks and captions lie, and how they are brought into shape.

    Args:
        image_dir: Folder of pictures, searched with its subfolders. `NAME.txt` beside a picture is its caption,
            `NAME.layer0.png`, `NAME.layer1.png`, ... are its layers from bottom to top, for layered models.
        cache_dir: Where the cache goes.
        mask_dir: Folder of masks, matched by path below it and stem, any picture format. Layers have masks of their
            own as `NAME.layer0.png`, ...; without any, the picture's mask holds for all layers.
        control_dir: Folder of control pictures (edited pictures, references) for models that see them: `NAME.png`, or
            several as `NAME_0.png`, `NAME_1.png`, ...
        val_image_dir: Folder of pictures for validation only.
        val_mask_dir: Masks for these.
        val_control_dir: Control pictures for these.
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
    control_dir: str | None = None
    val_image_dir: str | None = None
    val_mask_dir: str | None = None
    val_control_dir: str | None = None
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

    def items(self, *, layered: bool = False) -> list[Item]:
        """All pictures, sorted by key.

        Args:
            layered: Whether layers are read; else those of a picture that is there are left out.

        Raises:
            ValueError: A folder is not there or holds no pictures, two pictures (or masks) share a stem, layers lack a
                number or their picture, or control pictures are numbered with a gap.
        """
        found = self._scan("train", self.image_dir, self.mask_dir, self.control_dir, layered=layered)
        if self.val_image_dir is not None:
            found += self._scan("val", self.val_image_dir, self.val_mask_dir, self.val_control_dir, layered=layered)
        return found

    def unused(self, items: Sequence[Item]) -> list[str]:
        """Masks and control pictures in their folders that belong to no picture: most often a misspelt name."""
        used = {item.mask for item in items} | {path for item in items for path in (*item.layer_masks, *item.controls)}
        folders = {
            "mask_dir": (self.mask_dir, self.val_mask_dir),
            "control_dir": (self.control_dir, self.val_control_dir),
        }
        found = []
        for option, pair in folders.items():
            for folder in filter(None, pair):
                files = _by_stem(_folder(folder, f"data.{option}"), option).values()
                found += [path.name for path in files if path not in used]
        return found

    def _scan(
        self, split: str, image_dir: str, mask_dir: str | None, control_dir: str | None, *, layered: bool
    ) -> list[Item]:
        val = "val_" if split == "val" else ""
        root = _folder(image_dir, f"data.{val}image_dir")
        masks = _by_stem(_folder(mask_dir, f"data.{val}mask_dir"), "masks") if mask_dir is not None else {}
        controls = {}
        if control_dir is not None:
            controls = _by_stem(_folder(control_dir, f"data.{val}control_dir"), "control pictures")
        others = (self.mask_dir, self.control_dir, self.val_image_dir, self.val_mask_dir, self.val_control_dir)
        files = _by_stem(root, "pictures", without=others)
        layers = _layers(files) if layered else {}
        pictures = {key: path for key, path in files.items() if not _is_layer(key, files, layered=layered)}
        if not pictures:
            raise ValueError(f"data.{val}image_dir={image_dir} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        orphans = sorted(layers.keys() - pictures.keys())
        if orphans:
            raise ValueError(
                f"{layers[orphans[0]][0]} is a layer of {orphans[0]}, which is not there; add the whole picture as "
                f"{orphans[0]}.png"
            )
        return [
            self._item(split, key, path, masks=masks, layers=layers.get(key, ()), controls=_numbered(controls, key))
            for key, path in sorted(pictures.items())
        ]

    def _item(
        self,
        split: str,
        stem: str,
        picture: Path,
        *,
        masks: dict[str, Path],
        layers: tuple[Path, ...],
        controls: tuple[Path, ...],
    ) -> Item:
        mask, kind = self._mask(picture, masks.get(stem))
        caption = picture.with_suffix(".txt")
        own = tuple(self._mask(layer, masks.get(f"{stem}.layer{n}"))[0] for n, layer in enumerate(layers))
        return Item(
            key=f"@val/{stem}" if split == "val" else stem,
            split=split,
            media=picture,
            mask=mask,
            mask_kind=kind,
            caption=_read_caption(caption) if caption.is_file() else "",
            captioned=caption.is_file(),
            layers=layers,
            layer_masks=own,
            controls=controls,
        )

    def _mask(self, picture: Path, folder_mask: Path | None) -> tuple[Path | None, MaskKind | None]:
        label = picture.with_name(f"{picture.stem}{_LABEL}.png")
        candidates = {"folder": folder_mask, "masklabel": label if label.is_file() else None}
        kind = next((k for k in self.mask_sources if candidates.get(k) is not None), None)
        return (candidates[kind], kind) if kind else (None, None)


def _is_layer(key: str, files: dict[str, Path], *, layered: bool) -> bool:
    match = _LAYER.fullmatch(key)
    return match is not None and (layered or match[1] in files)


def _layers(files: dict[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Layers by their picture's key, in order.

    Raises:
        ValueError: A number is missing.
    """
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for key, path in files.items():
        if match := _LAYER.fullmatch(key):
            number = int(match[2])
            if number in found[match[1]]:
                raise ValueError(f"{path} and {found[match[1]][number]} are both layer {number}; rename one of them")
            found[match[1]][number] = path
    for key, layers in found.items():
        missing = [n for n in range(max(layers) + 1) if n not in layers]
        if missing:
            raise ValueError(f"{key} has layers {sorted(layers)} but no {key}.layer{missing[0]}; number them from 0")
    return {key: tuple(layers[n] for n in sorted(layers)) for key, layers in found.items()}


def _numbered(controls: dict[str, Path], key: str) -> tuple[Path, ...]:
    """Control pictures of a sample: `NAME`, or `NAME_0`, `NAME_1`, ...

    Raises:
        ValueError: Both forms, or a gap in the numbers.
    """
    numbered = {int(n): path for k, path in controls.items() if (n := k.removeprefix(f"{key}_")) != k and n.isdigit()}
    if key in controls:
        if 0 in numbered:
            raise ValueError(
                f"{controls[key]} and {numbered[0]} are both control pictures of {key}; name them _0, _1, ..."
            )
        return (controls[key],)
    if sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"control pictures of {key} are numbered {sorted(numbered)}; number them from 0 without a gap")
    return tuple(numbered[n] for n in sorted(numbered))


def _folder(path: str, option: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{option}={path} is no folder")
    return folder


def _by_stem(root: Path, what: str, without: Sequence[str | None] = ()) -> dict[str, Path]:
    """Picture files below a folder by their relative path without suffix; folders of masks inside it are left out."""
    inner = [Path(folder).expanduser().resolve() for folder in without if folder]
    inner = [folder for folder in inner if folder != root.resolve() and folder.is_relative_to(root.resolve())]
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix.lower() not in SUFFIXES or hidden or path.stem.endswith(_LABEL) or not path.is_file():
            continue
        if any(path.resolve().is_relative_to(folder) for folder in inner):
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
