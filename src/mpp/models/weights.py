"""Where the weights of a model's components lie on this machine, and their fingerprints."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mpp.files import weights_fingerprint

log = logging.getLogger("mpp")

GGUF = ".gguf"
SINGLE_FILES = (".safetensors", GGUF)
_CONFIGS = ("", "tokenizer_", "preprocessor_", "scheduler_")  # what a component's folder holds: `..config.json`


class WeightsError(ValueError):
    """Weights that are not there or cannot be loaded, as opposed to something wrong with what they are used on."""


@contextmanager
def loading(source: str, option: str) -> Iterator[None]:
    """Raise whatever is raised while a component is loaded as a WeightsError that names the setting.

    Args:
        source: Where the component is loaded from.
        option: Name of the setting.
    """
    try:
        yield
    except Exception as error:
        said = isinstance(error, ValueError) and f"{option}=" in str(error)
        reason = str(error) if said else f"{option}={source} cannot be loaded ({type(error).__name__}: {error})"
        raise WeightsError(reason) from error


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say what is loaded before it is, and how long it took; of several processes the first speaks for all.

    Args:
        what: E.g. `transformer (14.3 B, bfloat16)`.
    """
    start = time.monotonic()
    say(f"loading {what} ...")
    yield
    say(f"loaded in {time.monotonic() - start:.1f} s")


def say(line: str) -> None:
    """Log a line; of several processes the first speaks for all."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    log.log(logging.DEBUG if several and torch.distributed.get_rank() > 0 else logging.INFO, "%s", line)


def count_of(parameters: int) -> str:
    """A number of parameters as people say it: `14.3 B`, `62.1 M`, `830`."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{name}"
    return str(parameters)


def resolve_folder(source: str, subfolder: str, option: str, *, fetch: bool = True, files: str = "*") -> Path:
    """Where a component of a diffusers folder or hub id lies on this machine.

    Args:
        source: A folder (a pipeline's, with `subfolder` in it, or the component's own) or a hub id `owner/name`.
        subfolder: The component, e.g. `transformer`.
        option: Name of the setting, for errors.
        fetch: Whether a hub id may be downloaded; else only an earlier download is found.
        files: Which of a hub id's files are wanted: without weights a model's description is small.

    Raises:
        ValueError: Nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path / subfolder, path):
            if any((folder / f"{kind}config.json").is_file() for kind in _CONFIGS):
                return folder
        raise ValueError(f"{option}={source}: the folder has neither {subfolder}/config.json nor config.json")
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{option}={source} is not there; give a diffusers folder, a hub id (owner/name), or for the transformer a "
            "single .safetensors or .gguf file"
        )
    try:
        snapshot = snapshot_download(source, allow_patterns=[f"{subfolder}/{files}"], local_files_only=not fetch)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option}={source} is neither a folder here nor a hub repository that could be fetched "
            f"({type(error).__name__}); check the name and the network, or download it and give the folder"
        ) from error
    folder = Path(snapshot) / subfolder
    if not folder.is_dir():
        raise ValueError(f"{option}={source}: the hub repository has no folder {subfolder}")
    return folder


def fingerprint_if_present(source: str, subfolder: str, option: str, *, fetch: bool) -> str | None:
    """Fingerprint of a component's weights, or None where they are not on this machine."""
    try:
        return weights_fingerprint(resolve_folder(source, subfolder, option, fetch=fetch))
    except ValueError:
        if fetch:
            raise
        return None


def component_fingerprint(source: str, subfolder: str, option: str, *, fetch: bool) -> str | None:
    """Fingerprint of a component's weights, or None; `source` may be the transformer's single file, which has none.

    Raises:
        ValueError: It was, or with `fetch`: nothing is there.
    """
    if source.endswith(SINGLE_FILES):
        if not fetch:
            return None
        raise ValueError(
            f"{option} is not set and model.pretrained is a single file; set {option} to the folder or hub id of a "
            f"pipeline that holds {subfolder}"
        )
    return fingerprint_if_present(source, subfolder, option, fetch=fetch)


def other_components(source: str, without: set[str]) -> list[Path]:
    """All of a pipeline but the named components, as folders and files here; [] where `source` is no pipeline.

    Raises:
        ValueError: A component is not there and cannot be fetched.
    """
    local = Path(source).expanduser()
    if not source or local.is_file():
        return []
    folder = local if local.is_dir() else _fetch(source, ["model_index.json"])
    index = folder / "model_index.json"
    if not index.is_file():
        return sorted(p for p in folder.iterdir() if p.name not in without and list(p.glob("*config.json")))
    entries = json.loads(index.read_bytes()).items()
    names = [n for n, kind in entries if isinstance(kind, list) and kind[0] is not None and n not in without]
    if not local.is_dir():
        folder = _fetch(source, ["model_index.json", "LICENSE*", *(f"{name}/*" for name in names)])
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"model.pretrained={source} lacks {', '.join(missing)}, which its model_index.json names")
    return [index, *sorted(folder.glob("LICENSE*")), *(folder / name for name in names)]


def _fetch(source: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the other components of model.pretrained={source} could not be fetched ({type(error).__name__}); check "
            "the network, or download it and give the folder"
        ) from error
