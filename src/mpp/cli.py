"""The one front of all commands: what is typed becomes Hydra's overrides, before a configuration is read.

It knows words alone: nothing is imported for it, and no folder is made.
"""

import re
import sys
from collections.abc import Sequence

SHORT = {  # by command: what may be typed for a longer key
    "prepare": {"data": "source@data"},  # sources are a group apart from the caches that training reads
    "sample": {"lora": "lora_path"},  # a group of the training configs, of which Hydra would look for one
    "export": {"lora": "export.lora", "lora_path": "export.lora"}
    | {name: f"export.{name}" for name in ("merge", "overwrite")},
    "report": {"data.cache_dir": "report.cache_dir"}
    | {name: f"report.{name}" for name in ("output", "limit", "scanned")},
    "masks": {
        name: f"job.{name}" for name in ("input", "output", "overwrite", "video_format", "frame_folders", "preview")
    },
}
_A_CACHE = (
    "{word} is a cache, which training reads as it lies: python -m mpp.train {word} data.cache_dir=CACHE. Preparing "
    "makes one of media: set data.image_dir, data.manifest or data.datasets"
)
ELSEWHERE = {  # words of another command, and the way
    "prepare": {"data=musubi": _A_CACHE, "data=cached": _A_CACHE},
    "train": {
        "data=folder": "{word} is what caches are made of: python -m mpp.prepare data.image_dir=FOLDER "
        "data.cache_dir=CACHE; then train on the cache, with data.cache_dir=CACHE alone"
    },
}
_HELP = "hydra.help.template=${explained_settings:}"  # made by mpp.config, from the classes


def overrides(command: str, words: Sequence[str]) -> list[str]:
    """What is typed after a command, as Hydra's overrides; those come out as they are.

    Args:
        command: Its name, `train` for `python -m mpp.train`.
        words: What is typed.

    Raises:
        ValueError: A word belongs to another command.
    """
    for word in words:
        elsewhere = ELSEWHERE.get(command, {}).get(word)
        if elsewhere is not None:
            raise ValueError(elsewhere.format(word=word))
    words = sorted(words, key=lambda word: word not in ("--multirun", "-m"))  # Hydra takes it at either end alone
    explain = [_HELP] if {"--help", "-h"} & set(words) and _HELP not in words else []
    return explain + [re.sub(r"^(\+*)([^=+]+)(?==)", lambda at: at[1] + _full(command, at[2]), word) for word in words]


def _full(command: str, key: str) -> str:
    return SHORT.get(command, {}).get(key, key)


def rewrite_arguments(command: str) -> None:
    """Turn this process's own words; `sys.argv` changes, since processes that DDP starts repeat it."""
    try:
        sys.argv[1:] = overrides(command, sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
