"""Files on this machine, and through fsspec on object storage: finding, listing, reading, telling them apart."""

import hashlib
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations
from upath import UPath

from mpp.files import content_hash
from mpp.media.own import MARKERS, is_marker, is_own

MediaPath = Path | UPath

_AT_ONCE = 500  # files fetched together; more would fill memory with texts
_FEW = 16  # files of one remote folder that are looked up one by one instead of listing it
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # of S3, Azure, Google, SFTP, memory
_DRIVE = re.compile(r"^/(?=[A-Za-z]:)")  # of file:///C:/photos
_HIDDEN = re.compile(r"(?:[^/]+/)*?\.[^/]*")
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "checksum")


class Listed(NamedTuple):
    """One file below a folder.

    Attributes:
        name: Path below the folder, with slashes.
        real: Where it really lies, links followed: equal for two names of one file.
    """

    name: str
    real: str


class Listing(NamedTuple):
    """What lies below a folder, each by its path below it, with slashes.

    Attributes:
        files: The files.
        hidden: Files and folders whose names begin with a dot; not looked into.
        own: Folders that mpp wrote; not looked into. "" is the folder itself, which is.
    """

    files: list[Listed]
    hidden: list[str]
    own: list[str]


def as_path(text: str | Path) -> MediaPath:
    """A setting as a path: a URL (`s3://`, `gs://`, `https://`, `memory://`, ...) through fsspec, else of this machine.

    Raises:
        ValueError: The protocol is unknown, or its package is not installed.
    """
    text = str(text)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser()
    if protocol in ("file", "local"):
        return Path(_DRIVE.sub("", rest))
    try:
        path = UPath(text)
        path.fs  # noqa: B018 (loads the package)
    except ImportError as error:
        package = _package(protocol)
        remedy = f"; pip install {package}" if package else ""
        raise ValueError(f"{text} needs a package that is not installed ({error}){remedy}") from error
    except Exception as error:  # each file system connects with a client of its own
        raise ValueError(f"{text} cannot be reached ({short(error)})") from error
    return path


def join(folder: MediaPath, text: str) -> MediaPath:
    """A path that is written in a file of `folder`: relative to it, unless it is absolute or a URL.

    Raises:
        ValueError: As `as_path` raises.
    """
    if "://" in text or text.startswith("~"):
        return as_path(text)
    if isinstance(folder, Path):
        return Path(os.path.normpath(folder / text))
    base = str(folder)
    start = base.index("://") + 3
    return as_path(base[:start] + posixpath.normpath(posixpath.join(base[start:], text)))


def absolute(text: str) -> str:
    """A setting that names the same path from any working directory."""
    return text if "://" in text else str(as_path(text).absolute())


def real(path: MediaPath) -> str:
    """Where a file or folder really lies: equal for two names of one."""
    return os.path.realpath(path) if isinstance(path, Path) else str(path).rstrip("/")


@contextmanager
def reaching(path: MediaPath) -> Iterator[None]:
    """Turn what a file system raises into a ValueError that names the path: storages have errors of their clients."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({short(error)})") from error


def short(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:120]


def folder(text: str, option: str) -> MediaPath:
    """The folder that a setting names.

    Raises:
        ValueError: There is none.
    """
    path = as_path(text)
    with reaching(path):
        there = path.is_dir()
    if not there:
        raise ValueError(f"{option}={text} is no folder")
    return path


def list_files(root: MediaPath, without: Collection[str] = ()) -> list[Listed]:
    """The files that `look_through` finds.

    Raises:
        ValueError: A folder cannot be read.
    """
    return look_through(root, without).files


def look_through(root: MediaPath, without: Collection[str] = ()) -> Listing:
    """All files below a folder, from one listing; what is hidden, and folders that mpp wrote, are left out.

    Links are followed, on this machine, but not in circles.

    Args:
        root: The folder.
        without: Folders inside it to leave out, as `real` gives them.

    Raises:
        ValueError: A folder cannot be read.
    """
    with reaching(root):
        if isinstance(root, Path):
            found = Listing([], [], [])
            _walk(str(root), "", (os.path.realpath(root),), frozenset(without), found)
            return Listing(*map(sorted, found))
        return _look_through_remote(root, without)


def kinds(paths: Sequence[MediaPath]) -> dict[MediaPath, Literal["file", "folder"]]:
    """Which of some paths are files and which are folders; what is missing is left out.

    Of one folder on object storage many are looked up in one listing. Over HTTP nothing is looked up, since it has no
    folders to list: all are taken for files until they are read.

    Raises:
        ValueError: A storage cannot be reached.
    """
    found: dict[MediaPath, Literal["file", "folder"]] = {}
    remote: dict[MediaPath, list[MediaPath]] = {}
    for path in paths:
        if not isinstance(path, Path):
            remote.setdefault(path.parent, []).append(path)
            continue
        with reaching(path):
            if path.is_file():
                found[path] = "file"
            elif path.is_dir():
                found[path] = "folder"
    for parent, inside in remote.items():
        if parent.protocol.startswith("http"):
            found.update(dict.fromkeys(inside, "file"))
        else:
            known = _look(parent, inside)
            found.update({path: known[path.path.rstrip("/")] for path in inside if path.path.rstrip("/") in known})
    return found


def read_all(paths: Sequence[MediaPath]) -> Iterator[bytes]:
    """Contents of small files, in order; many at once from object storage.

    Raises:
        ValueError: One of them cannot be read.
    """
    for start in range(0, len(paths), _AT_ONCE):
        some = paths[start : start + _AT_ONCE]
        fetched = _fetch([path for path in some if not isinstance(path, Path)])
        for path in some:
            with reaching(path):
                content = fetched[path] if path in fetched else path.read_bytes()
                if isinstance(content, Exception):
                    raise content
            yield content


def file_fingerprint(location: MediaPath) -> dict[str, Any]:
    """What tells from outside whether a file has changed: its size, time and identity; of a folder, of all in it.

    On object storage the identity is the tag that the storage gives its contents; where it gives neither tag nor time,
    it is a hash of the contents.

    Raises:
        ValueError: It cannot be read.
    """
    with reaching(location):
        if not isinstance(location, Path):
            return {"source": str(location), **_remote_fingerprint(location)}
        status = location.stat()
    if location.is_dir():
        inside = [(listed.name, location / listed.name) for listed in list_files(location)]
        with reaching(location):
            states = [(name, path.stat()) for name, path in inside]
        digest = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in states]).encode())
        return {
            "source": absolute(str(location)),
            "bytes": sum(state.st_size for _, state in states),
            "mtime_ns": max((state.st_mtime_ns for _, state in states), default=0),
            "inode": digest.hexdigest(),
        }
    return {
        "source": absolute(str(location)),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,  # files of one size and time may trade names
    }


def _package(protocol: str) -> str | None:
    """The package that knows a protocol, or one behind a chain such as `simplecache::s3`."""
    known = known_implementations.get(protocol.rpartition("::")[2])
    package = known["class"].split(".")[0] if known else "fsspec"
    return None if package == "fsspec" else package


def _walk(root: str, below: str, chain: tuple[str, ...], without: Collection[str], found: Listing) -> None:
    """Add what one folder and those inside hold; `chain` is where it and the folders around it really lie."""
    if is_own(Path(root, below)):
        found.own.append(below[:-1])
        if below:
            return
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.name.startswith("."):
                found.hidden.append(name)
                continue
            linked = entry.is_symlink()
            where = os.path.realpath(entry.path) if linked else os.path.join(chain[-1], entry.name)
            if entry.is_dir():
                if not _among(where, without) and where not in chain:
                    _walk(root, f"{name}/", (*chain, where), without, found)
            elif entry.is_file() or (linked and not os.path.exists(entry.path)):  # a link to nothing fails when read
                found.files.append(Listed(name, where))


def _look_through_remote(root: UPath, without: Collection[str]) -> Listing:
    fs, start = root.fs, real(root)
    fs.invalidate_cache()  # a listing may have been kept from an earlier look
    base = root.path.rstrip("/") + "/"
    names = sorted(path.removeprefix(base) for path in fs.find(root.path))
    marked = {name: marker for name in names for marker in MARKERS if f"/{name}".endswith(f"/{marker}")}
    contents = fs.cat([f"{base}{name}" for name in marked]) if marked else {}
    said = [(name, marker) for name, marker in marked.items() if is_marker(marker, contents[f"{base}{name}"])]
    own = {name[: -len(marker)].rstrip("/") for name, marker in said}
    left_out = (*(f"{location}/" for location in without), *(f"{start}/{folder}/" for folder in own if folder))
    kept = [name for name in names if not f"{start}/{name}".startswith(left_out)]
    hidden = {match[0] for name in kept if (match := _HIDDEN.match(name))}
    files = [Listed(name, f"{start}/{name}") for name in kept if not _HIDDEN.match(name)]
    outermost = [folder for folder in own if not any(folder.startswith(f"{other}/") for other in own)]
    return Listing(files, sorted(hidden), sorted(outermost))


def _among(folder: str, others: Collection[str]) -> bool:
    """Whether a folder is one of some, also where the disk tells no capitals apart."""
    same = [other for other in others if other == folder or other.casefold() == folder.casefold()]
    return any(other == folder or (os.path.exists(other) and os.path.samefile(folder, other)) for other in same)


def _look(parent: UPath, inside: Sequence[UPath]) -> dict[str, Literal["file", "folder"]]:
    with reaching(parent):
        fs = parent.fs
        fs.invalidate_cache()
        try:
            rows = fs.ls(parent.path, detail=True) if len(inside) > _FEW else [_info(fs, path) for path in inside]
        except FileNotFoundError:
            return {}
    words = {"file": "file", "directory": "folder"}
    return {row["name"].rstrip("/"): words[row["type"]] for row in rows if row and row["type"] in words}


def _info(fs: AbstractFileSystem, path: UPath) -> dict[str, Any] | None:
    try:
        return fs.info(path.path)
    except FileNotFoundError:
        return None


def _fetch(paths: Sequence[UPath]) -> dict[UPath, bytes | Exception]:
    if not paths:
        return {}
    with reaching(paths[0].parent):
        contents = paths[0].fs.cat([path.path for path in paths], on_error="return")
    return {path: contents[path.path] for path in paths if path.path in contents}


def _remote_fingerprint(path: UPath) -> dict[str, Any]:
    info = path.fs.info(path.path)
    if info.get("type") == "directory":
        inside = path.fs.find(path.path, detail=True)
        seen = [(name, _state(details)) for name, details in sorted(inside.items())]
        certain = all(state[1] is not None or state[2] is not None for _, state in seen)
        tag = hashlib.sha256(repr(seen).encode()).hexdigest() if certain else content_hash(path)
        return {"bytes": sum(state[0] or 0 for _, state in seen), "mtime_ns": None, "inode": tag}
    size, changed, tag = _state(info)
    return {"bytes": size, "mtime_ns": changed, "inode": tag or (content_hash(path) if changed is None else None)}


def _state(info: dict[str, Any]) -> tuple[int | None, int | str | None, str | None]:
    """Size, time of change and tag of a remote file, as far as its storage says them."""
    changed = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(changed, datetime):
        changed = changed.timestamp()
    if isinstance(changed, float | int):
        changed = round(changed * 1e6) * 1000  # some listings have less digits than a look at the file
    tag = next((info[name] for name in _TAGS if info.get(name) is not None), None)
    return info.get("size"), changed if changed is None or isinstance(changed, int) else str(changed), tag and str(tag)
