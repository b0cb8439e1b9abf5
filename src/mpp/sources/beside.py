"""The files of one folder of media by what their names say: media, captions, masks beside them, and others.

Programs that make masks call them `a_mask.png`, `a-mask.png`, `a_wmask.png` or `a.mask.png`. Beside `a.png` these are
masks of it. Taken by mistake, an image with colours is refused as a mask, while a mask that is taken for an image would
train everywhere without a word.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.media.paths import Listed, Listing, MediaPath, look_through
from mpp.sources.passed import Passed, of_listing, unread
from mpp.wording import few

MEDIA = SUFFIXES | VIDEO_SUFFIXES
LAYER = re.compile(r"(.+)\.layer([0-9]+)")
_LABEL, _SIDECAR, _CONDITION = "-masklabel", ".mask", "-condlabel"
_CAPTIONS = (".txt", ".caption")  # the first that is there is read
_BETWEEN, _WORD = "[ ._-]", "w?mask(?:label)?"
_MASK = re.compile(rf"(.+){_BETWEEN}{_WORD}", re.IGNORECASE)
_LIKE_MASKS = (  # several masks of one image, and masks that are called the other way round
    re.compile(rf"(.+){_BETWEEN}{_WORD}s?(?:{_BETWEEN}?\(?[0-9]+\)?)?", re.IGNORECASE),
    re.compile(rf"{_WORD}s?{_BETWEEN}(.+)", re.IGNORECASE),
)
_MASKS = ("label", "sidecar")
_TWO_CAPTIONS = "NAME.txt is there too, and is the one that is read"
_CONDITIONS = "OneTrainer's control images; put them into data.control_dir as NAME.png"
_FOLDER = re.compile(rf"(?:(.+){_BETWEEN})?{_WORD}s?", re.IGNORECASE)


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
        labels: Masks named `NAME-masklabel.png`, of any format.
        sidecars: Masks named `NAME.mask.png`, `NAME_mask.png`, `NAME.mask.mp4`, `NAME.mask`, and folders `NAME.mask`.
        passed: What is not looked at further.
        doubtful: Names of media that are called like masks, of media that are not there.
    """

    media: dict[str, Found]
    captions: dict[str, Found]
    labels: dict[str, Found]
    sidecars: dict[str, Found]
    passed: tuple[Passed, ...]
    doubtful: tuple[str, ...]

    @classmethod
    def read(cls, root: MediaPath, without: Collection[str]) -> "Beside":
        """Sort the files of a folder.

        Raises:
            ValueError: It cannot be read, two of one kind share a stem, or media are called like masks of others in a
                way that is not taken for one.
        """
        listing = look_through(root, without)
        check_foreign(root, listing)
        kinds: dict[str, list[tuple[str, Found]]] = defaultdict(list)
        for listed in listing.files:
            file = Found.file(root, listed)
            kind, key = _kind(file)
            kinds[kind].append((key, file))
        keys = {key for key, _ in kinds["media"]}
        named = [(_mask_of(key, keys), (key, file)) for key, file in kinds["media"]]
        media = [row for owner, row in named if owner is None]
        labels, sidecars = ([(_owner(key, keys) or key, file) for key, file in kinds[kind]] for kind in _MASKS)
        sidecars += [(owner, file) for owner, (_, file) in named if owner is not None]
        frames = {key: Found.folder(root, f"{key}{_SIDECAR}") for key, _ in kinds["frame"]}
        captions = [
            by_key([row for row in kinds["caption"] if row[1].suffix == suffix], "captions") for suffix in _CAPTIONS
        ]
        found = cls(
            by_key(media, "images" if all(file.still for _, file in media) else "media"),
            captions[1] | captions[0],
            by_key(labels, "masks"),
            by_key([*sidecars, *frames.items()], "masks"),
            (
                *(unread(file.name) for _, file in kinds["other"]),
                *(Passed(file.name, "no frame of a mask, by its suffix or place") for _, file in kinds["no frame"]),
                *(Passed(captions[1][key].name, _TWO_CAPTIONS) for key in sorted(captions[0].keys() & captions[1])),
                *(Passed(file.name, _CONDITIONS) for _, file in kinds["condition"]),
                *of_listing(listing),
            ),
            tuple(file.name for key, file in media if any(p.fullmatch(posixpath.basename(key)) for p in _LIKE_MASKS)),
        )
        found._check_folders(root)
        return found

    @cached_property
    def folders(self) -> frozenset[str]:
        """Folders in it that hold media, as `ancestors` gives them."""
        parents = {f"{posixpath.dirname(key)}/" for key in self.media}
        return frozenset(above for parent in parents for above in ancestors(parent))

    def _check_folders(self, root: MediaPath) -> None:
        """Refuse media in a folder that is called like one of masks, and whose names are those of other media.

        Raises:
            ValueError: Names the folder, three of them, and what to do.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for key, file in self.media.items():
            for folder in ancestors(file.name):
                above, name = posixpath.split(folder[:-1])
                match = _FOLDER.fullmatch(name)
                if match is None:
                    continue
                rest = file.key.removeprefix(folder)
                video = self.media.get(posixpath.join(above, match[1])) if match[1] else None
                if posixpath.join(above, match[1] or "", rest) in self.media or (video and not video.still):
                    found[folder].append(key)
        for folder, keys in found.items():
            names = ", ".join(few(keys, 3))
            raise ValueError(
                f"{root / folder} is called like a folder of masks and holds media with the names of others "
                f"({names}); set data.mask_dir={root / folder} if they are masks (masks of a video's frames: a "
                "folder NAME.mask beside it), else rename the folder"
            )


def check_foreign(root: MediaPath, listing: Listing) -> None:
    """Refuse a folder that mpp wrote.

    Raises:
        ValueError: It is one.
    """
    if "" in listing.own:
        raise ValueError(
            f"{root} is a folder that mpp wrote, a cache or the output of a run, and what lies in it is no data to "
            "prepare; name another folder, or move what is yours out of it"
        )


def ancestors(name: str) -> list[str]:
    """The folders that a file lies in, from the outermost, each ending in a slash."""
    parts = name.split("/")[:-1]
    return [f"{'/'.join(parts[:count])}/" for count in range(1, len(parts) + 1)]


def by_key(files: Iterable[tuple[str, Found]], what: str) -> dict[str, Found]:
    """Files by key.

    Raises:
        ValueError: Two of them have one.
    """
    found: dict[str, Found] = {}
    for key, file in files:
        twin = found.setdefault(key, file)
        if twin is not file:
            raise ValueError(f"two {what} share one stem: {twin.path}, {file.path}; rename or remove one of them")
    return found


def _kind(file: Found) -> tuple[str, str]:
    """What a file in a folder of media is by its own name, and the key of the media that it belongs to."""
    key = file.key
    if f"{_SIDECAR}/" in file.name:
        key, inside = file.name.split(f"{_SIDECAR}/", 1)
        return "no frame" if "/" in inside or file.suffix not in SUFFIXES else "frame", key
    if file.suffix == _SIDECAR:
        return "sidecar", key
    if file.suffix in _CAPTIONS:
        return "caption", key
    if file.suffix not in MEDIA:
        return "other", key
    for kind, ending in (("sidecar", _SIDECAR), ("label", _LABEL), ("condition", _CONDITION)):
        if key.endswith(ending):
            return kind, key.removesuffix(ending)
    return "media", key


def mask_owner(key: str, keys: Collection[str]) -> str | None:
    """Which of some keys is that of the media beside which a file lies as `NAME_mask`; None for other names."""
    above, name = posixpath.split(key)
    match = _MASK.fullmatch(name)
    return _owner(posixpath.join(above, match[1]), keys) if match else None


def _mask_of(key: str, keys: Collection[str]) -> str | None:
    """The key of the media that an image or video is a mask of, by its name; None of other ones.

    Raises:
        ValueError: It is called like one of several masks of a media, or in another order.
    """
    owner = mask_owner(key, keys)
    if owner is not None:
        return owner
    above, name = posixpath.split(key)
    for pattern in _LIKE_MASKS:
        match = pattern.fullmatch(name)
        owner = _owner(posixpath.join(above, match[1]), keys) if match else None
        if owner is not None:
            stem = posixpath.basename(owner)
            raise ValueError(
                f"{key} is called like a mask of {owner}, and would train as an image; if it is the mask call it "
                f"{stem}_mask (`python -m mpp.masks tool=combine` makes one of several), else give it another name, or "
                "put it into another folder"
            )
    return None


def _owner(key: str, keys: Collection[str]) -> str | None:
    """The media with a key, perhaps written with its suffix (`a.png_mask.png`); None where there is none."""
    stem, suffix = posixpath.splitext(key)
    return next((name for name in (key, stem if suffix.lower() in MEDIA else key) if name in keys), None)
