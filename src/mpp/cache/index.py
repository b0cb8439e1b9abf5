"""The samples of a cache as a sequence that is parsed where it is looked at: a million of them open in seconds."""

import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from mpp.files import write_atomically

_AGAIN = "run `python -m mpp.prepare` again"
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Entry:
    """One sample in the index.

    Attributes:
        key: Its name, unique in the cache; randomness depends on it.
        split: `train` or `val`.
        shape: Latent shape (c, f, h, w).
        text: Name of its text file.
        caption: The caption itself.
        mask: Where the mask came from (`folder`, `masklabel`, `sidecar`, `alpha`), or None without one.
        flip: Whether it is the mirrored copy of another sample.
        images: Shapes of its image conditioning, by field name; samples of one batch have equal ones.
        seen: What the text encoder saw besides the caption: identities of the images.
        source: Key of the video that it was cut from; "" where it is a whole image.
        repeats: How often an epoch visits it.
        variants: Other captions of it that have embeddings, of which each visit draws one.
    """

    key: str
    split: str
    shape: tuple[int, ...]
    text: str
    caption: str
    mask: str | None
    flip: bool = False
    images: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    source: str = ""
    repeats: int = 1
    variants: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Key of the image or video that it shows: clips of one video, and an image and its mirror, share it."""
        return self.source or self.key.removesuffix("@flip")

    def signature(self, given_frames: int = 0) -> tuple[object, ...]:
        """What samples of one batch share: latent shape without the frames that are given, and image shapes."""
        return _signature(self.shape, self.images, given_frames)


_COLUMNS_OF = {"images": "pictures"}  # fields that are called otherwise in the file
_NAMES = {_COLUMNS_OF.get(f.name, f.name) for f in fields(Entry)}


class Index(Sequence[Entry]):
    """Rows of an index file, each parsed when it is asked for.

    Attributes:
        masked: For each row whether it has a mask.
        repeats: For each row how often an epoch visits it.
    """

    def __init__(self, columns: "_Columns", rows: np.ndarray) -> None:
        self._columns, self._rows = columns, rows

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Look at every row once.

        Raises:
            ValueError: The file is damaged.
        """
        with path.open("rb") as handle:
            columns = _columns(handle, _MappedText(path, handle.fileno()), path)
        return cls(columns, np.arange(len(columns.split)))

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Index":
        """An index of entries that are in no file."""
        return cls.read([line_of(entry) for entry in entries], Path("index"))

    @classmethod
    def read(cls, lines: Sequence[bytes], path: Path) -> "Index":
        """An index of rows that were read from `path`.

        Raises:
            ValueError: A row is damaged.
        """
        columns = _columns(lines, b"".join(lines), path)
        return cls(columns, np.arange(len(lines)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> "Index": ...

    def __getitem__(self, index: int | slice) -> "Entry | Index":
        """One row, or some of them as an index of their own."""
        if isinstance(index, slice):
            return Index(self._columns, self._rows[index])
        row = self._rows[index]
        start, stop = self._columns.starts[row], self._columns.starts[row + 1]
        return _entry(json.loads(self._columns.text[start:stop]))

    def __iter__(self) -> Iterator[Entry]:
        """All rows."""
        return (self[i] for i in range(len(self)))

    @property
    def masked(self) -> np.ndarray:
        """For each row whether it has a mask."""
        return self._columns.masked[self._rows]

    @property
    def repeats(self) -> np.ndarray:
        """For each row how often an epoch visits it."""
        return self._columns.repeats[self._rows]

    def signatures(self, given_frames: int = 0) -> list[tuple[object, ...]]:
        """For each row what samples of one batch share."""
        known = [_signature(shape, dict(images), given_frames) for shape, images in self._columns.kinds]
        return [known[kind] for kind in self._columns.kind[self._rows].tolist()]

    def of_split(self, split: str) -> "Index":
        """The rows of one split."""
        return self.where(self._columns.split[self._rows] == _SPLITS.index(split))

    def originals(self) -> "Index":
        """Without mirrored copies."""
        return self.where(~self._columns.flip[self._rows])

    def where(self, chosen: np.ndarray) -> "Index":
        """The rows for which `chosen`, a boolean of each, is true."""
        return Index(self._columns, self._rows[chosen])


class _MappedText:
    """The text of an index file, mapped into memory. Another process is told its name and maps the file itself.

    Raises:
        ValueError: The file was replaced before the other process mapped it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._text = path.absolute(), _mapped(descriptor)
        self._known = _seen(os.fstat(descriptor))

    def __getitem__(self, part: slice) -> bytes:
        if self._text is None:
            with self._path.open("rb") as handle:
                if _seen(os.fstat(handle.fileno())) != self._known:
                    raise ValueError(f"{self._path} was written anew since this run began: start it again")
                self._text = _mapped(handle.fileno())
        return self._text[part]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_text": None}


def _mapped(descriptor: int) -> mmap.mmap | bytes:
    empty = os.fstat(descriptor).st_size == 0
    return b"" if empty else mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _seen(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class _Columns:
    """What is looked at of every row: the rest stays in the file, which is mapped into memory."""

    text: _MappedText | bytes
    starts: np.ndarray
    split: np.ndarray
    masked: np.ndarray
    flip: np.ndarray
    repeats: np.ndarray
    kind: np.ndarray
    kinds: list[tuple[tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]]


def _columns(lines: Iterable[bytes], text: _MappedText | bytes, path: Path) -> _Columns:
    starts, rows = array("q", [0]), array("i")
    kinds: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            _check_row(row)
            images = tuple((name, tuple(shape)) for name, shape in sorted(row["pictures"].items()))
            kind = kinds.setdefault((tuple(row["shape"]), images), len(kinds))
            split, masked = _SPLITS.index(row["split"]), row["mask"] is not None
            rows.extend((split, masked, row["flip"], row["repeats"], kind))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is damaged in line {number} ({error}); {_AGAIN}") from error
        starts.append(starts[-1] + len(line))
    table = np.array(rows).reshape(-1, 5)
    return _Columns(
        text=text,
        starts=np.array(starts),
        split=table[:, 0].astype(np.int8),
        masked=table[:, 1].astype(bool),
        flip=table[:, 2].astype(bool),
        repeats=table[:, 3],
        kind=table[:, 4],
        kinds=list(kinds),
    )


def _check_row(row: dict[str, Any]) -> None:
    """Refuse what is no row: raise KeyError or TypeError that says why. Plain code, since it runs a million times."""
    if row.keys() != _NAMES:
        raise KeyError(", ".join(sorted(row.keys() ^ _NAMES)))
    shape, images, repeats = row["shape"], row["pictures"], row["repeats"]
    sizes = [*shape, repeats] if not images else [*shape, repeats, *(n for each in images.values() for n in each)]
    whole = len(shape) == 4 and all([type(size) is int and size > 0 for size in sizes])  # noqa: C419 (faster)
    words = type(row["key"]) is type(row["text"]) is type(row["caption"]) is type(row["source"]) is str
    lists = row["seen"] + row["variants"]
    kinds = type(row["flip"]) is bool and isinstance(row["mask"], str | None)
    if not (whole and words and kinds and (not lists or all(isinstance(text, str) for text in lists))):
        raise TypeError("a value of an unexpected type or size")


def write_index(path: Path, entries: Sequence[Entry]) -> None:
    """Write an index atomically, in an order that does not depend on who prepared what: split, origin, key."""
    ordered = sorted(entries, key=lambda entry: (_SPLITS.index(entry.split), entry.origin, entry.key))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            handle.writelines(line_of(entry) for entry in ordered)

    write_atomically(path, write)


def line_of(entry: Entry) -> bytes:
    """An entry as a row of the file."""
    row = {_COLUMNS_OF.get(name, name): value for name, value in asdict(entry).items()}
    return json.dumps(row).encode() + b"\n"


def _signature(shape: tuple[int, ...], images: dict[str, tuple[int, ...]], given_frames: int) -> tuple[object, ...]:
    channels, frames, *cells = shape
    return (channels, frames - given_frames, *cells, *((name, *size) for name, size in sorted(images.items())))


def _entry(row: dict[str, Any]) -> Entry:
    lists = {name: tuple(row[name]) for name in ("shape", "seen", "variants")}
    images = {name: tuple(shape) for name, shape in row["pictures"].items()}
    return Entry(**{name: row[name] for name in row if name != "pictures"} | lists, images=images)
