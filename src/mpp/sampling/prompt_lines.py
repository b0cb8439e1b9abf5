"""Prompts as they are written: a text with options behind it, one on each line of a file or in a list."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpp.media.paths import as_path
from mpp.sources.tables import read_text

OPTIONS = {  # as in musubi-tuner's files of sample prompts: letter, setting, what its value is
    "w": ("width", "a whole number"),
    "h": ("height", "a whole number"),
    "f": ("frames", "a whole number"),
    "d": ("seed", "a whole number"),
    "s": ("steps", "a whole number"),
    "g": ("guidance_scale", "a number"),
    "l": ("guidance_scale", "a number"),
    "n": ("negative_prompt", "a text"),
    "i": ("controls", "an image file"),
    "ci": ("controls", "an image file"),
}
_KNOWN = ", ".join(f"--{letter} {setting}" for letter, (setting, _) in OPTIONS.items())


@dataclass(frozen=True)
class PromptLine:
    """One prompt as it was written.

    Attributes:
        text: The prompt itself.
        where: For messages: the file and its line, or the entry of the list.
        options: Its own settings by their names.
    """

    text: str
    where: str
    options: dict[str, Any] = field(default_factory=dict)


def prompt_lines(prompts: Sequence[str] | str) -> list[PromptLine]:
    """What is written as prompts: a list of them, the name of a text file, or one prompt.

    Args:
        prompts: A text that ends in `.txt` is a file with a prompt on each line, where `#` begins a comment line; any
            other text is one prompt.

    Raises:
        ValueError: The file cannot be read or holds no prompt, or an option is unknown or has no such value.
    """
    if not isinstance(prompts, str):
        return [_read(entry, f"sampling.prompts, entry {number}") for number, entry in enumerate(prompts, 1)]
    name = prompts.strip()
    if not name.lower().endswith(".txt"):
        return [_read(prompts, "sampling.prompts")] if name else []
    path = as_path(name)
    if not path.is_file():
        raise ValueError(
            f"sampling.prompts={name} is not there; give a text file with a prompt on each line, or prompts"
        )
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1)]
    found = [_read(line, f"{name}, line {number}") for number, line in lines if line and line[0] != "#"]
    if not found:
        raise ValueError(f"sampling.prompts={name} holds no prompt; write one on each line")
    return found


def _read(written: str, where: str) -> PromptLine:
    text, *rest = re.split(r"(?:^|\s+)--(?=\w)", written)
    options: dict[str, Any] = {}
    for part in rest:
        letter, _, value = (word.strip() for word in part.partition(" "))
        if letter.lower() not in OPTIONS:
            near = difflib.get_close_matches(letter.lower(), [setting for setting, _ in OPTIONS.values()], 1)
            hint = next((f"; {near[0]} is --{known}" for known, of in OPTIONS.items() if [of[0]] == near), "")
            raise ValueError(f"{where}: --{letter} is not an option of a prompt{hint}; there are {_KNOWN}")
        setting, kind = OPTIONS[letter.lower()]
        read = _value(value, kind)
        if read is None:
            raise ValueError(f"{where}: --{letter} ({setting}) must be {kind}, got {value!r}")
        if setting in ("width", "height", "frames", "steps") and read < 1:
            raise ValueError(f"{where}: --{letter} ({setting}) must be at least 1, got {value}")
        if setting == "controls":
            read = [*options.get(setting, []), read]
        elif setting in options:
            raise ValueError(f"{where}: {setting} is there twice, with --{letter} {value}; leave one out")
        options[setting] = read
    return PromptLine(text.strip() if rest else text, where, options)


def _value(text: str, kind: str) -> int | float | str | None:
    """None: the text is no such value."""
    if kind == "a text":
        return text
    if kind == "an image file":
        return text or None
    whole = kind == "a whole number"
    if not re.fullmatch(r"\d+" if whole else r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
        return None
    return int(text) if whole else float(text)
