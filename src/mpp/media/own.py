"""Folders that mpp writes, and how they are told from folders of media: none of their images is trained on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

MARK = ".mpp"
_SAYS = {"cache.json": b'"mpp"', ".hydra/config.yaml": b"mpp.", MARK: b"mpp"}  # what each marker holds, if it is ours
MARKERS = tuple(_SAYS)


def mark(folder: Path) -> None:
    """Mark a folder of images that mpp makes, and make it; nothing happens where that cannot be written."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(
            "Written by mpp. Images in this folder are left out by mpp.prepare.\n", encoding="utf-8"
        )


def is_marker(name: str, content: bytes) -> bool:
    """Whether a file of a marker's name says that its folder is ours, and not another program's.

    Args:
        name: One of `MARKERS`.
        content: The file's.
    """
    return _SAYS[name] in content


def is_own(folder: Path) -> bool:
    """Whether a folder of this machine is one that mpp wrote."""
    return any(is_marker(name, content) for name, content in _contents(folder))


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in MARKERS:
        with contextlib.suppress(OSError):
            yield name, (folder / name).read_bytes()
