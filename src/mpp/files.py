"""Files on disk: atomic writing and fingerprints of weights. Standard library only."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unicodedata import normalize

_SAMPLES, _SAMPLE_BYTES = 32, 4096
_LEFTOVER, _DAY = ".tmp", 24 * 3600
_SHORT = 40  # characters of a file's name in that of its temporary file
WINDOWS = os.name == "nt"
_TRIES, _WAIT = 20, 0.1  # at replacing a file that another program has open, seconds


def write_atomically(path: Path, write: Callable[[Path], object], *, synced: bool = True) -> None:
    """Write a file so that `path` is either its old self or the complete new one.

    `write` fills a temporary file in the same folder, which is then synced to disk and renamed. Two writers of one
    path do not disturb each other: the last rename wins. Unless it is `synced`, the caller syncs it and its folder
    later, before anything relies on them: until then a power failure may leave a damaged file.

    Raises:
        OSError: The disk is full or not writable; the temporary file is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name is cut, so that it fits wherever that of `path` does
    temporary = path.with_name(f".{path.name[:_SHORT]}.{secrets.token_hex(8)}{_LEFTOVER}")
    try:
        mode = _mode_of_new(temporary)
        write(temporary)
        temporary.chmod(mode)
        if synced:
            sync(temporary)
        _replace(temporary, path)
        if synced:
            sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_out_of_space(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {path}; what was there before is untouched: free space, run again",
            ) from error
        raise


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Write a folder so that `target` is either what it was or the complete new one.

    Raises:
        OSError: The disk is full or not writable; what was there before is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    new, old = aside / "new", aside / "old"
    try:
        new.mkdir()
        mode = _mode_of_new(aside / "probe")
        write(new)
        for file in (p for p in new.rglob("*") if p.is_file()):
            file.chmod(mode)
            sync(file)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if is_out_of_space(error):
            raise OSError(f"no space left to write {target}; free space, run again") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _mode_of_new(path: Path) -> int:
    """The permissions of a new file on this system, which this makes; those of safetensors are its writer's alone."""
    path.touch()
    return path.stat().st_mode


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b") as handle:  # Windows syncs no handle that only reads
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk; Windows opens no folders and keeps a journal of names instead."""
    if WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def _replace(temporary: Path, path: Path) -> None:
    for left in reversed(range(_TRIES)):
        try:
            os.replace(temporary, path)
        except PermissionError as error:
            if not WINDOWS:
                raise
            if not left:
                raise PermissionError(
                    error.errno, f"{path} cannot be replaced, another program has it open: close that, run again"
                ) from error
            time.sleep(_WAIT)  # a virus scanner looks at new files for a moment
        else:
            return


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error (or what caused it) says that the disk, quota or file size limit is exhausted."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    seen: BaseException | None = error
    met: set[int] = set()  # an error that is raised again while its own wrapper is handled closes a ring
    while seen is not None and id(seen) not in met:
        met.add(id(seen))
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(f"os error {code}" in str(seen) for code in full):  # safetensors reports the number as text
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be made, before any work is done for it; none is left behind.

    Raises:
        ValueError: Says which setting names it, and why.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=_LEFTOVER):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}={folder} cannot be written ({error.strerror}); choose another folder, or make it writable"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # never there, or somebody else's by now
                path.rmdir()


def names_told_apart(folder: Path) -> Callable[[str], str]:
    """From a name to what a folder's file system makes of it: equal for two names that it takes for one file.

    The folder need not be there yet. Those of macOS and Windows tell no capitals apart, and some no ways to write an
    accent.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with NamedTemporaryFile(dir=there, prefix=".\N{LATIN CAPITAL LETTER E WITH ACUTE}", suffix=_LEFTOVER) as handle:
        probe = Path(handle.name)
        capitals = not probe.with_name(probe.name.swapcase()).exists()
        accents = not probe.with_name(normalize("NFD", probe.name)).exists()

    def told_apart(name: str) -> str:
        name = name if accents else normalize("NFC", name)
        return name if capitals else name.casefold()

    return told_apart


def remove_leftovers(folder: Path, *, older_than: float = _DAY) -> None:
    """Remove temporary files below a folder that killed processes left there.

    Args:
        folder: Where they are looked for.
        older_than: Seconds; younger ones may be another process's that is writing. 0 where none can be.
    """
    for path in folder.rglob(f".*{_LEFTOVER}"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows: somebody writes it
            if path.stat().st_mtime <= time.time() - older_than:
                path.unlink()


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where it is missing or no such thing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: object, *, synced: bool = True) -> None:
    """Write JSON as `write_atomically` does."""
    data = json.dumps(content, indent=1).encode() + b"\n"
    write_atomically(path, lambda temporary: temporary.write_bytes(data), synced=synced)


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, of the names and contents of the files in it, hidden ones left out."""
    if path.is_dir():
        inside = [(file.name, content_hash(file)) for file in path.iterdir() if not file.name.startswith(".")]
        return hashlib.sha256(json.dumps(sorted(inside)).encode()).hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weights_fingerprint(source: Path) -> str:
    """Identity of a model's weights, independent of where they lie: 16 hex digits.

    Covers each weight file's name, size, head (where safetensors keeps names and shapes) and 32 evenly spread
    blocks, and `config.json`'s architecture. Reading a few hundred kilobytes of a 30 GB model is enough to tell
    two models apart, and takes milliseconds.

    Args:
        source: A `.safetensors` file, or a folder that holds weight files.

    Raises:
        ValueError: The folder has no weight files.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise ValueError(f"{source} holds no .safetensors weights")
    digest = hashlib.blake2b(digest_size=8)
    config = source / "config.json"
    if source.is_dir() and config.is_file():
        content = json.loads(config.read_bytes())
        stable = {k: v for k, v in content.items() if not k.startswith("_") and not k.endswith("version")}
        digest.update(json.dumps(stable, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}:".encode() if source.is_file() else f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 17))
            for index in range(_SAMPLES):
                handle.seek(size * index // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
