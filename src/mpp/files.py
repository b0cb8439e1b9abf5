"""Files on disk: atomic writing and fingerprints of weights. Standard library only."""

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

_SAMPLES, _SAMPLE_BYTES = 32, 4096
_LEFTOVER, _DAY = ".tmp", 24 * 3600


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that `path` is either its old self or the complete new one.

    `write` fills a temporary file in the same folder, which is then synced to disk and renamed. Two writers of one
    path do not disturb each other: the last rename wins.

    Raises:
        OSError: The disk is full or not writable; the temporary file is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_LEFTOVER, delete=False) as handle:
            temporary = Path(handle.name)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if is_out_of_space(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {path}; what was there before is untouched: free space, run again",
            ) from error
        raise


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error (or what caused it) says that the disk, quota or file size limit is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(f"os error {code}" in str(seen) for code in full):  # safetensors reports the number as text
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be made, before any work is done for it.

    Raises:
        ValueError: Says which setting names it, and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=_LEFTOVER):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}={folder} cannot be written ({error.strerror}); choose another folder, or make it writable"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files below a folder that killed processes left there more than a day ago."""
    for path in folder.rglob(f".*{_LEFTOVER}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where it is missing or no such thing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


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
        content = json.loads(config.read_text())
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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
