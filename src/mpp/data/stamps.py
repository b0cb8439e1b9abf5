"""Whether files are what a cache file was made from: by size and time, or else by content."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpp.data.media import SUFFIXES
from mpp.data.places import absolute, stamp
from mpp.data.video import Timeline, read_timeline
from mpp.files import content_hash, read_record, write_json

Record = dict[str, Any]


class Stamps:
    """Stamps and contents of sources, each looked at once in a run; a folder of frames counts as one source."""

    def __init__(self) -> None:
        self._stamps: dict[str, Record] = {}
        self._contents: dict[str, str] = {}

    def of(self, path: Path) -> Record:
        """What tells that a source has not changed, without reading it."""
        name = str(path)
        if name not in self._stamps:
            self._stamps[name] = _folder_stamp(path) if path.is_dir() else stamp(path)
        return self._stamps[name]

    def content(self, path: Path) -> str:
        """Hash of what a source holds."""
        name = str(path)
        if name not in self._contents:
            self._contents[name] = _folder_content(path) if path.is_dir() else content_hash(path)
        return self._contents[name]

    def record(self, paths: Sequence[Path]) -> list[Record]:
        """What a cache file keeps of the sources it is made from."""
        return [self.of(path) | {"content": self.content(path)} for path in paths]

    def unchanged(self, paths: Sequence[Path], known: Sequence[Record]) -> bool:
        """Whether sources are what a record says."""
        return len(known) == len(paths) and all(self._same(path, was) for path, was in zip(paths, known, strict=True))

    def _same(self, path: Path, was: Record) -> bool:
        now = self.of(path)
        if now["bytes"] != was["bytes"]:
            return False
        return all(was.get(name) == value for name, value in now.items()) or self.content(path) == was["content"]


class Timelines:
    """Timelines of videos, kept beside the cache: an unchanged video is not decoded again to plan its clips.

    Args:
        folder: Where they are kept.
        stamps: Of this run.
    """

    def __init__(self, folder: Path, stamps: Stamps) -> None:
        self.folder, self.stamps = folder, stamps
        self._known: dict[str, Timeline] = {}

    def of(self, path: Path, *, mask: bool = False) -> Timeline:
        """Of a video or a folder of frames, perhaps one of masks.

        Raises:
            ValueError: It cannot be read to its end, or is no mask.
        """
        name = f"{path}{' as a mask' if mask else ''}"
        if name not in self._known:
            self._known[name] = self._find(path, name, mask=mask)
        return self._known[name]

    def _find(self, path: Path, name: str, *, mask: bool) -> Timeline:
        file = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        now = self.stamps.of(path)
        known = read_record(file)
        if known is not None and known.get("source") == now:
            with contextlib.suppress(KeyError, ValueError):  # of an older format
                return Timeline.from_json(known["timeline"])
        timeline = read_timeline(path, mask=mask)
        write_json(file, {"source": now, "timeline": timeline.to_json()})
        return timeline


def _frames(path: Path) -> list[Path]:
    """The frames in a folder, as a timeline takes them: nothing that file managers leave there."""
    return [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and file.name[0] != "."]


def _folder_stamp(path: Path) -> Record:
    found = [stamp(file) for file in _frames(path)]
    return {
        "source": absolute(str(path)),
        "bytes": sum(one["bytes"] for one in found),
        "files": hashlib.sha256(repr([sorted(one.items()) for one in found]).encode()).hexdigest()[:32],
    }


def _folder_content(path: Path) -> str:
    files = [(file.name, content_hash(file)) for file in _frames(path)]
    return hashlib.sha256(repr(files).encode()).hexdigest()
