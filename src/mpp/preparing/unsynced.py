"""Files of a cache between their writing and their being safe on the disk: synced together, before an index names them.

A file that is renamed before its content is on the disk may be short, empty or full of zeros after a power failure. So
a preparation that writes leaves a marker until it has synced what it wrote; the next one that finds the marker reads
whatever is younger whole before it takes it for current.
"""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpp.cache.format import is_whole
from mpp.files import sync, sync_folder, write_atomically
from mpp.preparing.shards import Shard

_AT_ONCE = 8  # nearly all of the time is waiting for the disk
_SLACK = 3600 * 10**9  # nanoseconds by which a clock may have been set back


class Unsynced:
    """What a preparation has written and not synced.

    Args:
        cache: Folder of the cache.
        shard: Of this process; each has a marker of its own.
    """

    def __init__(self, cache: Path, shard: Shard) -> None:
        self.cache, self._folder = cache, cache / "unsynced"
        self._own = self._folder / f"{shard.index}-of-{shard.count}"
        self._since = self._oldest()

    def begin(self) -> None:
        """Leave the marker, before the first file is written."""
        if not self._own.exists():
            write_atomically(self._own, Path.touch)
            sync_folder(self.cache)
        self._since = self._oldest()

    def trusts(self, path: Path) -> bool:
        """Whether a file is as it was written: what an interrupted preparation may have left is read whole."""
        return not self._is_doubtful(path) or is_whole(path)

    def sync(self, files: Iterable[Path]) -> None:
        """Wait until files, as far as they may not be, and their folders are on the disk."""
        doubtful = [path for path in files if self._is_doubtful(path)]
        folders = {folder for path in doubtful for folder in path.parents if folder.is_relative_to(self.cache)}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(sync, doubtful))
            list(pool.map(sync_folder, folders))

    def end(self, *, everything: bool) -> None:
        """Remove the marker, or those of all processes, once what was synced is vouched for."""
        for marker in self._markers() if everything else [self._own]:
            marker.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others have theirs in it, or there never was any
            self._folder.rmdir()

    def _is_doubtful(self, path: Path) -> bool:
        return self._since is not None and path.is_file() and path.stat().st_mtime_ns >= self._since - _SLACK

    def _markers(self) -> list[Path]:
        return list(self._folder.glob("*-of-*"))

    def _oldest(self) -> int | None:
        return min((marker.stat().st_mtime_ns for marker in self._markers()), default=None)
