"""The one front of all commands: what is typed becomes Hydra's overrides, before a configuration is read.

It knows words alone: nothing is imported for it, and no folder is made.
"""

import os
import re
import sys
from collections.abc import Sequence

SHORT = {  # by command: what may be typed for a longer key
    "prepare": {"data": "source@data"},  # sources are a group apart from the caches that training reads
    "sample": {"lora": "lora_path"},  # a group of the training configs, of which Hydra would look for one
    "export": {"lora": "export.lora", "lora_path": "export.lora"}
    | {name: f"export.{name}" for name in ("format", "merge", "overwrite")},
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
PATHS = frozenset(  # settings that are one file or folder, by the last word of their key, or by the whole of it
    {
        *("cache_dir", "output_dir", "export_dir", "save_dir", "sub_dir", "image_dir", "mask_dir", "control_dir"),
        *("val_image_dir", "val_mask_dir", "val_control_dir", "manifest", "folder", "input", "output", "preview"),
        *("pretrained", "pretrained_low", "resume", "ckpt_path", "lora_path", "export.lora", "lora.init", "loras"),
    }
)
LISTS = frozenset({"lora_path", "loras", "sampling.prompts"})  # what may be several: [FILE:0.8, FILE2], [a cat, "a, b"]
_TEXTS = re.compile(  # settings that are a text, or a file besides true and false
    r"export\.metadata\.(title|author|license|description|tags|trigger_phrase|usage_hint|thumbnail)"
    r"|sampling\.(prompts|negative_prompt)"
)
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
    sweep = {"--multirun", "-m"} & set(words)
    words = sorted(words, key=lambda word: word not in ("--multirun", "-m"))  # Hydra takes it at either end alone
    explain = [_HELP] if {"--help", "-h"} & set(words) and _HELP not in words else []
    return explain + [_full(command, word, sweep=bool(sweep)) for word in words]


def _full(command: str, word: str, *, sweep: bool) -> str:
    typed = re.fullmatch(r"(\+*)([^=+]+)=(.*)", word, re.DOTALL)
    if typed is None:
        return word
    key = SHORT.get(command, {}).get(typed[2], typed[2])
    several = sweep and re.search(r",|^\w+\(", typed[3])
    names = {key, key.rpartition(".")[2]}
    if not several and names & LISTS and typed[3][:1] == "[" and typed[3][-1:] == "]" and not os.path.exists(typed[3]):
        return f"{typed[1]}{key}=[{','.join(quoted(path) for path in _items(typed[3][1:-1]))}]"
    text = _TEXTS.fullmatch(key) and typed[3] not in ("true", "false")
    if not several and (text or names & PATHS):
        return f"{typed[1]}{key}={quoted(typed[3])}"
    return f"{typed[1]}{key}={typed[3]}"


_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""


def _items(text: str) -> list[str]:
    """What stands between commas; what has quotes around it, from comma to comma, may hold some."""
    found = re.findall(rf"\s*({_QUOTED}(?=\s*(?:,|$))|[^,]*?)\s*(?:,|$)", text, re.DOTALL)
    return [item for item in found if item]


def quoted(path: str) -> str:
    """The name of a file or folder as a value for Hydra, whose grammar knows spaces, commas, brackets and numbers.

    `null`, `???`, nothing, and what has quotes around it already come out as they are; `${...}` keeps its meaning.
    """
    if path in ("", "null", "???") or re.fullmatch(_QUOTED, path, re.DOTALL):
        return path
    text = re.sub(r'(\\*)("|$)', lambda at: at[1] * 2 + (at[2] and '\\"'), path)  # backslashes before a quote are two
    return f'"{text}"'


def rewrite_arguments(command: str) -> None:
    """Turn this process's own words; `sys.argv` changes, since processes that DDP starts repeat it."""
    try:
        sys.argv[1:] = overrides(command, sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
