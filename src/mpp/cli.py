"""The one front of all commands: what is typed becomes Hydra's overrides, before a configuration is read.

It knows words alone: nothing is imported for it, and no folder is made.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mpp.job_file import is_job_file, read_job, refuse_own

SHORT = {  # by command: what may be typed for a longer key
    "prepare": {"data": "source@data"},  # sources are a group apart from the caches that training reads
    "sample": {"lora": "lora_path"},  # a group of the training configs, of which Hydra would look for one
    "export": {"lora": "export.lora", "lora_path": "export.lora"}
    | {name: f"export.{name}" for name in ("format", "merge", "overwrite")},
    "report": {"data.cache_dir": "report.cache_dir"}
    | {name: f"report.{name}" for name in ("output", "limit", "scanned")},
    "plan": {
        "data.cache_dir": "plan.cache_dir",
        "data.batch_size": "plan.batch_size",
        "trainer.precision": "plan.precision",
        "trainer.accumulate_grad_batches": "plan.accumulate",
    }
    | {name: f"plan.{name}" for name in ("size", "frames", "batch_size", "precision", "accumulate", "table")}
    | {name: f"plan.{name}" for name in ("tflops", "bandwidth", "transfer")},
    "masks": {
        name: f"job.{name}"
        for name in ("input", "output", "overwrite", "keep", "video_format", "frame_folders", "preview")
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
SWITCHES = frozenset({"--show", "--quiet", "--json"})  # of all commands, besides Hydra's
LISTS = frozenset({"lora_path", "loras", "sampling.prompts"})  # what may be several: [FILE:0.8, FILE2], [a cat, "a, b"]
_ACTIVATIONS = {"gradient_checkpointing": ("memory.activations", {"true": "checkpoint", "false": "keep"})}
OLDER = {"train": _ACTIVATIONS, "plan": _ACTIVATIONS}  # settings by the names and values that they were released with
_TEXTS = re.compile(  # settings that are a text, or a file besides true and false
    r"export\.metadata\.(title|author|license|description|tags|trigger_phrase|usage_hint|thumbnail)"
    r"|sampling\.(prompts|negative_prompt)"
)


def overrides(command: str, words: Sequence[str]) -> list[str]:
    """What is typed after a command, as Hydra's overrides; those come out as they are.

    Args:
        command: Its name, `train` for `python -m mpp.train`.
        words: What is typed; a job file may come first, and settings that are typed win over it.

    Raises:
        ValueError: A word belongs to another command, or the job file is wrong.
    """
    if words and is_job_file(words[0]):
        file, *typed = words
        at = next((n for n, word in enumerate(typed) if re.match(r"[^-=][^=]*=", word)), len(typed))
        words = [*typed[:at], *_from_job(command, file, typed), *typed[at:]]  # argparse wants settings side by side
    for before, word in zip(["", *words], words, strict=False):
        if is_job_file(word) and "=" not in word and not before.startswith("-"):
            raise ValueError(f"{word} must be the first word behind mpp.{command}, where a job file stands")
    for word in words:
        elsewhere = ELSEWHERE.get(command, {}).get(word)
        if elsewhere is not None:
            raise ValueError(elsewhere.format(word=word))
    sweep = {"--multirun", "-m"} & set(words)
    words = sorted(words, key=lambda word: word not in ("--multirun", "-m"))  # Hydra takes it at either end alone
    words = _renewed(command, words)
    return [_full(command, word, sweep=bool(sweep)) for word in words]


def _renewed(command: str, words: Sequence[str]) -> list[str]:
    """Words whose setting is called otherwise today, by its name of now; values that mean nothing stay.

    Raises:
        ValueError: Both names are there, and say different things.
    """
    found = list(words)
    for older, (newer, values) in OLDER.get(command, {}).items():
        for number, word in enumerate(words):
            typed = re.fullmatch(rf"\+*{older}=(.*)", word)
            chosen = [values.get(value.strip().lower()) for value in typed[1].split(",")] if typed else [None]
            if None in chosen:
                continue
            found[number] = f"{newer}={','.join(chosen)}"
            other = next((w for w in words if w.lstrip("+").startswith(f"{newer}=") and w != found[number]), None)
            if other is not None:
                raise ValueError(
                    f"{word} is the older word for {found[number]}, and {other} says otherwise; leave one out"
                )
    return found


def _from_job(command: str, file: str, typed: Sequence[str]) -> list[str]:
    """What a job file says to a command and nobody typed."""
    keys = {_full(command, word, sweep=False).lstrip("+").partition("=")[0] for word in typed if "=" in word}
    for key in sorted(keys):
        refuse_own(key, command)
    found = read_job(file).settings(command)
    if command == "train" and goes_on(typed):  # then the run's record holds, and `ckpt_path=last` asks for its folder
        found = {key: value for key, value in found.items() if key == "output_dir" and "ckpt_path" in keys}
    return [f"{key}={written(value)}" for key, value in found.items() if key.lstrip("+") not in keys]


def goes_on(words: Sequence[str]) -> bool:
    """Whether words ask to go on with a run."""
    return any(re.match(r"\+*(resume|ckpt_path)=(?!null$|$)", word) for word in words)


def written(value: Any) -> str:  # noqa: ANN401
    """A plain value as Hydra's grammar has it.

    Raises:
        ValueError: A mapping has a key that the grammar has no words for.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        odd = next((key for key in value if not re.fullmatch(r"\w[\w .-]*", key)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} cannot be a key within a value; letters, digits, spaces and .-_ can")
        return f"{{{','.join(f'{key}: {written(entry)}' for key, entry in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    bare = re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII) and value.lower() not in _WORDS
    return value if bare else _in_quotes(value)


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


_WORDS = frozenset({"null", "true", "false", "nan", "inf"})  # that mean something else in Hydra's grammar
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
    return _in_quotes(path)


def _in_quotes(text: str) -> str:
    text = re.sub(r'(\\*)("|\Z)', lambda at: at[1] * 2 + (at[2] and '\\"'), text)  # backslashes before a quote are two
    return f'"{text}"'


def in_short(command: str, text: str) -> str:
    """What is said of a command's words with the shorter ones where it asks for a setting, as its pages have them."""
    for short, full in reversed(SHORT.get(command, {}).items()):
        text = re.sub(rf"(?<![\w.]){re.escape(full)}(?==\.\.\. is missing|\? |,)", short, text)
    return text


def rewrite_arguments(command: str) -> frozenset[str]:
    """Turn this process's own words; `sys.argv` changes, since processes that DDP starts repeat it.

    With `--show` they are printed instead, and the process ends.

    Returns:
        Which of `--quiet` and `--json` were typed; Hydra does not see them.
    """
    flags = SWITCHES & set(sys.argv[1:])
    typed = [word for word in sys.argv[1:] if word not in SWITCHES]
    try:
        meant = overrides(command, typed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if "--show" in flags:
        sys.stdout.write(f"{shown(command, meant)}\n")
        sys.exit(0)
    if command == "train" and is_job_file(typed[0] if typed else "") and goes_on(typed):
        sys.stderr.write(f"{typed[0]} is set aside: a run goes on as it was begun; type what is to change\n")
    sys.argv[1:] = meant
    return flags


def shown(command: str, words: Sequence[str]) -> str:
    """A command with its words as one types it into a shell."""
    return " \\\n  ".join([f"python -m mpp.{command}", *map(shlex.quote, words)])


def words_or_help(text: str) -> list[str]:
    """What was typed after a command that is not Hydra's; asked for help, or typed alone, it ends with its text."""
    words = sys.argv[1:]
    if not words or {"--help", "-h"} & set(words):
        sys.stdout.write(text)
        sys.exit(0 if words else 2)
    return words
