"""Media in a folder, with the captions, layers and sidecar masks beside them, and masks and controls in others."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.media.paths import Listed, MediaPath, folder, list_files
from mpp.sources.items import Item, MaskKind
from mpp.sources.settings import SourceSettings

_MEDIA = SUFFIXES | VIDEO_SUFFIXES
_LABEL, _SIDECAR = "-masklabel", ".mask"
_LAYER = re.compile(r"(.+)\.layer([0-9]+)")
_NUMBERED = re.compile(r"(.+)_([0-9]+)")


class Found(NamedTuple):
    """A file by its path below the folder that was searched.

    Attributes:
        root: That folder.
        name: Path below it, with slashes.
        key: The same without suffix.
        suffix: In lower case.
        real: Where it really lies.
        frames: Whether it is a folder of frames.
    """

    root: MediaPath
    name: str
    key: str
    suffix: str
    real: str
    frames: bool = False

    @classmethod
    def file(cls, root: MediaPath, listed: Listed) -> "Found":
        """Of a file."""
        key, suffix = posixpath.splitext(listed.name)
        return cls(root, listed.name, key, suffix.lower(), listed.real)

    @classmethod
    def folder(cls, root: MediaPath, name: str) -> "Found":
        """Of a folder of frames."""
        return cls(root, name, name, "", "", frames=True)

    @property
    def path(self) -> MediaPath:
        """Where it lies."""
        return self.root / self.name

    @property
    def still(self) -> bool:
        """Whether it is one image, and neither a video nor a folder of frames."""
        return not self.frames and self.suffix not in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Beside:
    """What one folder of media holds, by key: path below the folder without suffix.

    Attributes:
        media: Images and videos, layers among them.
        captions: Text files.
        labels: Masks named `NAME-masklabel.png`.
        sidecars: Masks named `NAME.mask.png`, `NAME.mask.mp4`, `NAME.mask`, and folders `NAME.mask`.
        strangers: Names of files that look like masks and are none.
    """

    media: dict[str, Found]
    captions: dict[str, Found]
    labels: dict[str, Found]
    sidecars: dict[str, Found]
    strangers: tuple[str, ...]

    @classmethod
    def read(cls, root: MediaPath, without: Collection[str]) -> "Beside":
        """Sort the files of a folder.

        Raises:
            ValueError: It cannot be read, or two of one kind share a stem.
        """
        kinds: dict[str, list[tuple[str, Found]]] = defaultdict(list)
        for listed in list_files(root, without):
            file = Found.file(root, listed)
            kind, key = _kind(file)
            kinds[kind].append((key, file))
        folders = {key: Found.folder(root, f"{key}{_SIDECAR}") for key, _ in kinds["frame"]}
        still = all(found.still for _, found in kinds["media"])
        return cls(
            _by_key(kinds["media"], "images" if still else "media"),
            _by_key(kinds["caption"], "captions"),
            _by_key(kinds["label"], "masks"),
            _by_key([*kinds["sidecar"], *folders.items()], "masks"),
            tuple(found.name for _, found in kinds["stranger"]),
        )

    @cached_property
    def folders(self) -> frozenset[str]:
        """Folders in it that hold media, as `_ancestors` gives them."""
        parents = {f"{posixpath.dirname(key)}/" for key in self.media}
        return frozenset(above for parent in parents for above in _ancestors(parent))


class MediaFolder:
    """A folder of media and the folders that belong to it: one split of a dataset.

    Args:
        dataset: Its settings.
        split: `train` or `val`.
        without: Folders in it that hold other things, as `real` gives them.
        option: The settings' names in messages, e.g. `data.`.

    Raises:
        ValueError: A folder is not there or holds no media, or two files of one kind share a stem.
    """

    def __init__(self, dataset: SourceSettings, split: str, without: Collection[str], option: str) -> None:
        val = "val_" if split == "val" else ""
        paths = {name: getattr(dataset, f"{val}{name}") for name in ("image_dir", "mask_dir", "control_dir")}
        roots = {name: folder(text, f"{option}{val}{name}") for name, text in paths.items() if text is not None}
        self.dataset, self.split = dataset, split
        self.beside = Beside.read(roots["image_dir"], without)
        if not self.beside.media:
            raise ValueError(
                f"{option}{val}image_dir={paths['image_dir']} holds no images ({', '.join(sorted(SUFFIXES))}) or "
                f"videos ({', '.join(sorted(VIDEO_SUFFIXES))})"
            )
        self.masks = self._read_masks(roots["mask_dir"]) if "mask_dir" in roots else {}
        self.controls = _files(roots["control_dir"], "control images") if "control_dir" in roots else {}
        self.control_numbers = _numbers(self.controls, self.beside.media)

    def items(self, *, with_layers: bool) -> list[tuple[Item, Found]]:
        """Its media without captions, sorted by key, and the file of each.

        Raises:
            ValueError: Layers lack a number or their image, control images are numbered with a gap, or an image's
                mask is a video.
        """
        media = self.beside.media
        layers = _layers(media) if with_layers else {}
        whole = {key: found for key, found in media.items() if not self._is_layer(key, with_layers=with_layers)}
        orphans = sorted(layers.keys() - whole.keys())
        if orphans:
            raise ValueError(
                f"{layers[orphans[0]][0].path} is a layer of {orphans[0]}, which is not there; add the whole image "
                f"as {orphans[0]}.png"
            )
        return [(self._item(key, found, layers.get(key, ())), found) for key, found in sorted(whole.items())]

    def unused(self, used: Collection[MediaPath]) -> list[str]:
        """Names of masks, control images and captions that belong to no media.

        Args:
            used: Masks and control images that belong to one.
        """
        media = self.beside.media
        files = [*self.masks.values(), *self.controls.values()]
        beside = [self.beside.labels, self.beside.sidecars] + (
            [self.beside.captions] if not self.dataset.captions else []
        )
        orphans = [found for kind in beside for key, found in kind.items() if key not in media]
        names = [posixpath.basename(found.name) for found in files if found.path not in used]
        return names + [found.name for found in orphans] + list(self.beside.strangers)

    def _is_layer(self, key: str, *, with_layers: bool) -> bool:
        match, media = _LAYER.fullmatch(key), self.beside.media
        return match is not None and media[key].still and (with_layers or match[1] in media)

    def _item(self, key: str, found: Found, layers: Sequence[Found]) -> Item:
        mask, kind = self._mask(key, found)
        own = tuple(self._mask(f"{key}.layer{n}", layer)[0] for n, layer in enumerate(layers))
        train = self.split == "train"
        return Item(
            key=key if train else f"@val/{key}",
            split=self.split,
            media=found.path,
            mask=mask,
            mask_kind=kind,
            caption="",
            captioned=False,
            layers=tuple(layer.path for layer in layers),
            layer_masks=own,
            controls=tuple(control.path for control in self.control_numbers.get(key, ())),
            invert=self.dataset.invert_mask,
            repeats=self.dataset.repeats if train else 1,
            alpha="alpha" in self.dataset.mask_sources,
            require_mask=self.dataset.require_mask,
        )

    def _mask(self, key: str, media: Found) -> tuple[MediaPath | None, MaskKind | None]:
        kinds = {"folder": self.masks, "masklabel": self.beside.labels, "sidecar": self.beside.sidecars}
        for kind in self.dataset.mask_sources:
            mask = kinds.get(kind, {}).get(key)
            if mask is not None:
                if media.still and not mask.still:
                    raise ValueError(
                        f"{mask.path} is a video or a folder of frames, the media that it is for is one image: "
                        f"{media.path}"
                    )
                return mask.path, kind
        return None, None

    def _read_masks(self, root: MediaPath) -> dict[str, Found]:
        """Masks by key; a folder that has a video's name and no media's folder holds its frames."""
        media = self.beside.media
        videos = {f"{key}/" for key, found in media.items() if not found.still} - self.beside.folders
        frames, files = {}, []
        for file in _media(root):
            video = next((path for path in _ancestors(file.name) if path in videos), None) if videos else None
            if video is None:
                files.append((file.key, file))
            else:
                frames[video[:-1]] = Found.folder(root, video[:-1])
        return _by_key([*files, *frames.items()], "masks")


def _kind(file: Found) -> tuple[str, str]:
    """What a file in a folder of media is, and the key of the media that it belongs to."""
    key = file.key
    if f"{_SIDECAR}/" in file.name:
        return "frame", file.name[: file.name.index(f"{_SIDECAR}/")]
    if file.suffix == _SIDECAR:
        return "sidecar", key
    if file.suffix == ".txt":
        return "caption", key
    if file.suffix not in _MEDIA:
        return "other", key
    if key.endswith(_SIDECAR):
        return "sidecar", key.removesuffix(_SIDECAR)
    if key.endswith(_LABEL):
        return "label" if file.suffix == ".png" else "stranger", key.removesuffix(_LABEL)
    return "media", key


def _ancestors(name: str) -> list[str]:
    """The folders that a file lies in, from the outermost, each ending in a slash."""
    parts = name.split("/")[:-1]
    return [f"{'/'.join(parts[:count])}/" for count in range(1, len(parts) + 1)]


def _media(root: MediaPath) -> list[Found]:
    """Images and videos below a folder."""
    files = (Found.file(root, listed) for listed in list_files(root))
    return [file for file in files if file.suffix in _MEDIA]


def _files(root: MediaPath, what: str) -> dict[str, Found]:
    return _by_key([(file.key, file) for file in _media(root)], what)


def _by_key(files: Iterable[tuple[str, Found]], what: str) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for key, file in files:
        twin = found.setdefault(key, file)
        if twin is not file:
            raise ValueError(f"two {what} share one stem: {twin.path}, {file.path}; rename or remove one of them")
    return found


def _layers(media: Mapping[str, Found]) -> dict[str, tuple[Found, ...]]:
    """Layers by their image's key, in order.

    Raises:
        ValueError: A number is missing, or is there twice.
    """
    found: dict[str, dict[int, Found]] = defaultdict(dict)
    for key, file in media.items():
        match = _LAYER.fullmatch(key)
        if match is None or not file.still:
            continue
        number = int(match[2])
        if number in found[match[1]]:
            twin = found[match[1]][number]
            raise ValueError(f"{file.path} and {twin.path} are both layer {number}; rename one of them")
        found[match[1]][number] = file
    for key, layers in found.items():
        missing = next(n for n in range(len(layers) + 1) if n not in layers)
        if missing < len(layers):
            raise ValueError(f"{key} has layers {sorted(layers)} but no {key}.layer{missing}; number them from 0")
    return {key: tuple(layers[n] for n in sorted(layers)) for key, layers in found.items()}


def _numbers(controls: Mapping[str, Found], media: Mapping[str, Found]) -> dict[str, tuple[Found, ...]]:
    """Control images by their sample's key: `NAME`, or `NAME_0`, `NAME_1`, ...

    Raises:
        ValueError: Both forms, a video, or a gap in the numbers.
    """
    numbered: dict[str, dict[int, Found]] = defaultdict(dict)
    for key, control in controls.items():
        if not control.still:
            raise ValueError(f"{control.path} is a video; control images are images")
        match = _NUMBERED.fullmatch(key)
        if match is None or key in media:  # what has a sample's own name belongs to that sample
            continue
        number = int(match[2])
        if number in numbered[match[1]]:
            twin = numbered[match[1]][number]
            raise ValueError(f"{control.path} and {twin.path} are both number {number}; rename one of them")
        numbered[match[1]][number] = control
    found: dict[str, tuple[Found, ...]] = {}
    for key in media:
        own = numbered.get(key, {})
        if key in controls and 0 in own:
            raise ValueError(
                f"{controls[key].path} and {own[0].path} are both control images of {key}; name them _0, _1, ..."
            )
        if key in controls:
            found[key] = (controls[key],)
        elif sorted(own) != list(range(len(own))):
            raise ValueError(f"control images of {key} are numbered {sorted(own)}; number them from 0 without a gap")
        elif own:
            found[key] = tuple(own[number] for number in sorted(own))
    return found
