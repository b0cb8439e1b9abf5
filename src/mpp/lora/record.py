"""What of a run's record goes into files that are handed on: how it was made, but no path and no prompt.

Decided by kind: a number stays, and a string where it is one word, of a setting that is no path and no text.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

_WORD = re.compile(r"[\w.+-]*", re.ASCII)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_BASE = re.compile(r"pretrained\w*|vae|text_encoder")  # where weights of the base lie
_PATH = re.compile(r"(\w+_)?(dir|folder|path|file)|manifest|input|output|preview|resume|lora|loras|init|thumbnail")
_TEXT = re.compile(r"(\w+_)?(prompts?|captions?|replace|trigger\w*)")
_TARGETS = re.compile(r"(?!\\\\)[\w.(){}\[\]|*+?^$\\-]*|\[('[\w.]+'(, )?)*\]", re.ASCII)  # modules by regex or names
_BESIDE = {"callbacks", "export", "logger", "sampling"}  # groups that shape no weights, and hold names and texts
_HOMES = {"home", "Users"}


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's record with None for every path and text; what is public already stays as it is.

    Of the base model hub ids stay, and the names alone of local files and folders. In the groups for logs, callbacks,
    samples and files no strings stay but names of classes.

    Args:
        record: As `MaskedPriorModule.record` makes it, of any version.
    """
    return _public(record, "", beside=False)


def base_name(source: str) -> str | None:
    """A base model as others may know it: its hub id, or its file's or folder's name alone; None where that says who.

    Args:
        source: Hub id, file or folder.
    """
    if _HUB_ID.fullmatch(source) and not Path(source).exists():
        return source
    path = PurePosixPath(source.replace("\\", "/"))
    private = path.name.startswith("~") or path.parent.name in _HOMES or not _WORD.fullmatch(path.name)
    return None if private else path.name or None


def _public(value: Any, name: str, *, beside: bool) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping) and not _TEXT.fullmatch(name):
        beside = beside or name in _BESIDE
        return {
            key: _public(entry, key, beside=beside)
            for key, entry in ((str(key), entry) for key, entry in value.items())
            if _WORD.fullmatch(key)
        }
    if isinstance(value, list | tuple) and not _TEXT.fullmatch(name):
        return [_public(entry, name, beside=beside) for entry in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return _public_text(value, name, beside=beside) if isinstance(value, str) else None


def _public_text(text: str, name: str, *, beside: bool) -> str | None:
    if name == "_target_":
        return text if _WORD.fullmatch(text) else None
    if beside or _PATH.fullmatch(name) or _TEXT.fullmatch(name):
        return None
    if _BASE.fullmatch(name):
        return base_name(text)
    return text if (_TARGETS if name.endswith("targets") else _WORD).fullmatch(text) else None
