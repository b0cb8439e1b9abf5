"""Whether files are what a cache file was made from: by size and time, or else by content."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mpp.cache.provenance import MediaProvenance, Source
from mpp.files import content_hash, read_record, write_json
from mpp.media.images import SUFFIXES
from mpp.media.paths import absolute, file_fingerprint
from mpp.media.videos import Timeline, read_timeline

Record = dict[str, Any]
M = TypeVar("M", bound=MediaProvenance)


class Fingerprints:
    """Fingerprints and contents of sources, each looked at once in a run; a folder of frames counts as one source."""

    def __init__(self) -> None:
        self._fingerprints: dict[str, Record] = {}
        self._contents: dict[str, str] = {}

    def of(self, path: Path) -> Record:
        """What tells that a source has not changed, without reading it."""
        name = str(path)
        if name not in self._fingerprints:
            self._fingerprints[name] = _folder_fingerprint(path) if path.is_dir() else file_fingerprint(path)
        return self._fingerprints[name]

    def content(self, path: Path) -> str:
        """Hash of what a source holds."""
        name = str(path)
        if name not in self._contents:
            self._contents[name] = _folder_content(path) if path.is_dir() else content_hash(path)
        return self._contents[name]

    def sources(self, paths: Sequence[Path]) -> tuple[Source, ...]:
        """What a cache file keeps of the sources it is made from."""
        return tuple(Source(self.of(path), self.content(path)) for path in paths)

    def current(self, known: M | None, wanted: M, paths: Sequence[Path]) -> bool:
        """Whether a cache file is what would be made now: in the same way, from files that hold what they held.

        Args:
            known: What the file was made from; None where there is none.
            wanted: How it would be made, whatever its sources.
            paths: What it would be made from, perhaps in another place.
        """
        if known is None or replace(known, sources=()) != replace(wanted, sources=()):
            return False
        was = known.sources
        return len(was) == len(paths) and all(self._same(path, one) for path, one in zip(paths, was, strict=True))

    def _same(self, path: Path, was: Source) -> bool:
        now = self.of(path)
        if now["bytes"] != was.fingerprint["bytes"]:
            return False
        other = {name for name, value in now.items() if was.fingerprint.get(name) != value}
        if not other or (other == {"source"} and now.get("inode") is not None):  # a moved file keeps its identity
            return True
        return self.content(path) == was.content


class Timelines:
    """Timelines of videos, kept beside the cache: an unchanged video is not decoded again to plan its clips.

    Args:
        folder: Where they are kept.
        fingerprints: Of this run.
    """

    def __init__(self, folder: Path, fingerprints: Fingerprints) -> None:
        self.folder, self.fingerprints = folder, fingerprints
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
        now = self.fingerprints.of(path)
        known = read_record(file)
        if known is not None and known.get("source") == now:
            with contextlib.suppress(KeyError, ValueError):  # of an older format
                return Timeline.from_json(known["timeline"])
        timeline = read_timeline(path, mask=mask)
        write_json(file, {"source": now, "timeline": timeline.to_json()}, synced=False)  # made anew where damaged
        return timeline


def _frames(path: Path) -> list[Path]:
    """The frames in a folder, as a timeline takes them: nothing that file managers leave there."""
    return [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and file.name[0] != "."]


def _folder_fingerprint(path: Path) -> Record:
    found = [file_fingerprint(file) for file in _frames(path)]
    return {
        "source": absolute(str(path)),
        "bytes": sum(one["bytes"] for one in found),
        "files": hashlib.sha256(repr([sorted(one.items()) for one in found]).encode()).hexdigest()[:32],
    }


def _folder_content(path: Path) -> str:
    files = [(file.name, content_hash(file)) for file in _frames(path)]
    return hashlib.sha256(repr(files).encode()).hexdigest()
