"""What a tool works on: images, videos and folders of frames, found in folders and matched by name."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpp.files import content_hash
from mpp.masking.pixels import read_alpha
from mpp.masking.video_frames import video_images, video_masks
from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES, DecodedImage, read_image, read_raw_mask
from mpp.media.mask import Mask, judged
from mpp.media.paths import look_through, reaching
from mpp.sources.beside import mask_owner
from mpp.wording import few

_BESIDE = re.compile(r"-masklabel$|\.mask$|\.mask(?=/)")  # masks that lie beside their media


@dataclass(frozen=True)
class FrameSequence:
    """An image or mask, a video of them, or a folder of frames.

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

    def images(self) -> Iterator[DecodedImage]:
        """Its frames as 8-bit images; a single file gives one.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        return video_images(self.path) if self.is_video else map(read_image, self.files)

    def alphas(self) -> Iterator[Mask | None]:
        """The alpha channel of each frame, None where there is none.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        if not self.is_video:
            return map(read_alpha, self.files)
        return (None if frame.alpha is None else Mask(frame.alpha) for frame in self.images())

    def fingerprint(self) -> str:
        """Hash of its files' contents.

        Raises:
            ValueError: A file is unreadable; names it.
        """
        with reaching(self.path):
            hashes = [content_hash(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def find_sequences(
    root: str | None,
    option: str,
    *,
    masks: bool,
    frame_folders: bool = False,
    without: str | None = None,
    masked: bool = True,
) -> dict[str, FrameSequence]:
    """All media below a folder by their key, or one file.

    Args:
        root: The folder, searched with its subfolders, or a file.
        option: The setting's name, for errors.
        masks: Whether the files are masks: where such lie beside media (`NAME-masklabel.png`, `NAME.mask.png`,
            `NAME_mask.png` and the like, `NAME.mask.mp4`, a folder `NAME.mask`), only they count; else they are left
            out.
        frame_folders: Whether the images of one folder are the frames of one clip.
        without: A folder inside it that is left out.
        masked: Whether media beside which a mask lies count too.

    Raises:
        ValueError: There is nothing at `root`, no media in it, or two of one name.
    """
    if root is None:
        raise ValueError(f"{option}=... is missing: give a folder, or a file")
    path = Path(root).expanduser()
    known = SUFFIXES | VIDEO_SUFFIXES
    if path.is_file() and path.suffix.lower() in known:
        return {path.stem: FrameSequence(path.stem, path)}
    if not path.is_dir():
        raise ValueError(f"{option}={root} is no folder, and no image or video")
    inner = None if without is None else Path(without).expanduser().resolve()
    # as prepare lists them: links are followed, hidden ones are left out
    listing = look_through(path)
    files = [p for p in (path / listed.name for listed in listing.files) if p.suffix.lower() in known]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if inner is not None and inner != path.resolve():
        files = [p for p in files if not p.resolve().is_relative_to(inner)]
    keys = {_key(path, p) for p in files}
    beside = {p: key for p in files if (key := _media_of(_key(path, p), keys)) is not None}
    chosen = beside if masks and beside else {p: _key(path, p) for p in files if p not in beside}
    if not chosen:
        names = ", ".join(few([name for name in listing.own if name], 3))
        own = f" but in folders that mpp wrote, which are left out ({names}); name one of them itself" if names else ""
        raise ValueError(f"{option}={root} holds no images and no videos{own}")
    clips = _by_key(chosen)
    if not masked:
        have = {owner for p, key in beside.items() for owner in (key, _key(path, p).split(".mask/")[0])}
        clips = {key: clip for key, clip in clips.items() if key not in have}
    return _grouped(clips, option) if frame_folders else clips


def pair(
    clips: Mapping[str, FrameSequence], others: Mapping[str, FrameSequence]
) -> list[tuple[FrameSequence, FrameSequence | None]]:
    """Each clip with the other of its name, or None.

    A file and a folder of frames match too: `NAME.mp4` with `NAME/0001.png`, ..., and these with one `NAME.png`.
    """
    folders, other_folders = _frame_folders(clips), _frame_folders(others)
    pairs: list[tuple[FrameSequence, FrameSequence | None]] = []
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


def _frame_folders(clips: Mapping[str, FrameSequence]) -> dict[str, FrameSequence]:
    """The images that lie in each folder as one clip, by the folder's key."""
    inside: dict[str, list[Path]] = defaultdict(list)
    for clip in clips.values():
        if not clip.moving:
            inside[clip.key.rpartition("/")[0]].append(clip.path)
    ordered = {key: sorted(paths, key=lambda path: _natural(path.stem)) for key, paths in inside.items()}
    return {key: FrameSequence(key, paths[0].parent, tuple(paths)) for key, paths in ordered.items()}


def _media_of(key: str, keys: Collection[str]) -> str | None:
    """The key of the media beside which a mask lies, by its own key; None of what is no such mask."""
    return _BESIDE.sub("", key) if _BESIDE.search(key) else mask_owner(key, keys)


def _by_key(keys: Mapping[Path, str]) -> dict[str, FrameSequence]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path, key in keys.items():
        found[key].append(path)
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1]} share one name; rename or remove one of them")
    return {key: FrameSequence(key, paths[0]) for key, paths in sorted(found.items())}


def _key(root: Path, path: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _grouped(clips: Mapping[str, FrameSequence], option: str) -> dict[str, FrameSequence]:
    """The images of each folder as one clip."""
    loose = [clip for clip in clips.values() if "/" not in clip.key and not clip.moving]
    if loose:
        raise ValueError(
            f"frame_folders=true takes each folder of images for a clip, but {loose[0].path} lies in "
            f"{option} itself; give the folder above"
        )
    videos, folders = {key: clip for key, clip in clips.items() if clip.moving}, _frame_folders(clips)
    for key in videos.keys() & folders.keys():
        raise ValueError(f"{videos[key].path} and the folder of frames beside it share one name; rename one of them")
    return dict(sorted((videos | folders).items()))


def _natural(name: str) -> list[int | str]:
    """Sorts `frame_2` before `frame_10`."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))]
