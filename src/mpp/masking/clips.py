"""What a tool works on: pictures, videos and folders of frames, found in folders and matched by name."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpp.data.mask import Mask, judged
from mpp.data.media import SUFFIXES, VIDEO_SUFFIXES, Picture, read_picture
from mpp.data.picture_files import read_raw_mask
from mpp.data.places import list_files, reaching
from mpp.files import content_hash
from mpp.masking.frames import read_alpha
from mpp.masking.video import video_masks, video_pictures

_BESIDE = re.compile(r"-masklabel$|\.mask$|\.mask(?=/)")  # masks that lie beside their media


@dataclass(frozen=True)
class Clip:
    """A picture or mask, a video of them, or a folder of frames.

    Attributes:
        key: Path below its folder, without suffix.
        path: The file, or the folder of frames.
        frames: Files of a folder of frames, in order; () for a file.
    """

    key: str
    path: Path
    frames: tuple[Path, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether it is a video file."""
        return not self.frames and self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def moving(self) -> bool:
        """Whether it has frames: a video or a folder of them."""
        return bool(self.frames) or self.is_video

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files."""
        return self.frames or (self.path,)

    def masks(self, *, labels: bool = False) -> Iterator[Mask]:
        """Its frames as masks; a single file gives one.

        Args:
            labels: Whether numbers of labels are wanted, which are no masks otherwise.

        Raises:
            ValueError: A file is unreadable, or no mask; names it.
        """
        if self.is_video:
            return video_masks(self.path, labels=labels)
        return judged(map(read_raw_mask, self.files), labels=labels)

    def pictures(self) -> Iterator[Picture]:
        """Its frames as 8-bit pictures; a single file gives one.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        return video_pictures(self.path) if self.is_video else map(read_picture, self.files)

    def alphas(self) -> Iterator[Mask | None]:
        """The alpha channel of each frame, None where there is none.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        if not self.is_video:
            return map(read_alpha, self.files)
        return (None if frame.alpha is None else Mask(frame.alpha) for frame in self.pictures())

    def fingerprint(self) -> str:
        """Hash of its files' contents.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        with reaching(self.path):
            hashes = [content_hash(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def find_clips(
    root: str | None, option: str, *, masks: bool, frame_folders: bool = False, without: str | None = None
) -> dict[str, Clip]:
    """All media below a folder by their key, or one file.

    Args:
        root: The folder, searched with its subfolders, or a file.
        option: The setting's name, for errors.
        masks: Whether the files are masks: where such lie beside media (`NAME-masklabel.png`, `NAME.mask.png`,
            `NAME.mask.mp4`, a folder `NAME.mask`), only they count; else they are left out.
        frame_folders: Whether the pictures of one folder are the frames of one clip.
        without: A folder inside it that is left out.

    Raises:
        ValueError: There is nothing at `root`, no media in it, or two of one name.
    """
    if root is None:
        raise ValueError(f"{option}=... is missing: give a folder, or a file")
    path = Path(root).expanduser()
    known = SUFFIXES | VIDEO_SUFFIXES
    if path.is_file() and path.suffix.lower() in known:
        return {path.stem: Clip(path.stem, path)}
    if not path.is_dir():
        raise ValueError(f"{option}={root} is no folder, and no picture or video")
    inner = None if without is None else Path(without).expanduser().resolve()
    # as prepare lists them: links are followed, hidden ones are left out
    files = [p for p in (path / listed.name for listed in list_files(path)) if p.suffix.lower() in known]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if inner is not None and inner != path.resolve():
        files = [p for p in files if not p.resolve().is_relative_to(inner)]
    beside = [p for p in files if _BESIDE.search(_key(path, p))]
    files = beside if masks and beside else [p for p in files if p not in set(beside)]
    if not files:
        raise ValueError(f"{option}={root} holds no pictures and no videos")
    clips = _by_key(path, files)
    return _grouped(clips, option) if frame_folders else clips


def pair(clips: Mapping[str, Clip], others: Mapping[str, Clip]) -> list[tuple[Clip, Clip | None]]:
    """Each clip with the other of its name, or None.

    A file and a folder of frames match too: `NAME.mp4` with `NAME/0001.png`, ..., and these with one `NAME.png`.
    """
    folders, other_folders = _frame_folders(clips), _frame_folders(others)
    pairs: list[tuple[Clip, Clip | None]] = []
    for key, clip in clips.items():
        parent = key.rpartition("/")[0]
        if key in others:
            pairs.append((clip, others[key]))
        elif parent in others and parent not in clips and not clip.moving and parent not in other_folders:
            if parent in folders:  # once for all of its frames
                pairs.append((folders.pop(parent), others[parent]))
        else:
            pairs.append((clip, None if key in folders else other_folders.get(key)))
    return pairs


def _frame_folders(clips: Mapping[str, Clip]) -> dict[str, Clip]:
    """The pictures that lie in each folder as one clip, by the folder's key."""
    inside: dict[str, list[Path]] = defaultdict(list)
    for clip in clips.values():
        if not clip.moving:
            inside[clip.key.rpartition("/")[0]].append(clip.path)
    ordered = {key: sorted(paths, key=lambda path: _natural(path.stem)) for key, paths in inside.items()}
    return {key: Clip(key, paths[0].parent, tuple(paths)) for key, paths in ordered.items()}


def _by_key(root: Path, files: list[Path]) -> dict[str, Clip]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        found[_BESIDE.sub("", _key(root, path))].append(path)
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1]} share one name; rename or remove one of them")
    return {key: Clip(key, paths[0]) for key, paths in sorted(found.items())}


def _key(root: Path, path: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _grouped(clips: Mapping[str, Clip], option: str) -> dict[str, Clip]:
    """The pictures of each folder as one clip."""
    loose = [clip for clip in clips.values() if "/" not in clip.key and not clip.moving]
    if loose:
        raise ValueError(
            f"frame_folders=true takes each folder of pictures for a clip, but {loose[0].path} lies in "
            f"{option} itself; give the folder above"
        )
    videos, folders = {key: clip for key, clip in clips.items() if clip.moving}, _frame_folders(clips)
    for key in videos.keys() & folders.keys():
        raise ValueError(f"{videos[key].path} and the folder of frames beside it share one name; rename one of them")
    return dict(sorted((videos | folders).items()))


def _natural(name: str) -> list[int | str]:
    """Sorts `frame_2` before `frame_10`."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))]
