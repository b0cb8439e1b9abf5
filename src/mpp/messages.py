"""What is wrong with what was typed, one line a problem: the nearest name, and what libraries say in other words."""

import difflib
import re
import shlex
from collections.abc import Iterable

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mpp import cli

_ADVICE = re.compile(r"\s*(To append|See https?:|Set the environment|Config search path|Search path:|provider=).*")


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant: one with the same last word, a neighbour, or one that reads nearly the same.

    Args:
        key: What was typed.
        keys: All that there are, by their full names.
    """
    above, _, last = key.rpartition(".")
    by_last: dict[str, list[str]] = {}
    for known in keys:
        by_last.setdefault(known.rpartition(".")[2], []).append(known)
    full = [known for of in by_last.values() for known in of]
    beside = [known for known in full if known.rpartition(".")[0] == above]
    close = (
        by_last.get(last, ())
        or difflib.get_close_matches(key, beside, 1, 0.9)
        or [f"{above}.{name}".lstrip(".") for name in _close(last, beside, 0.6)]
        or difflib.get_close_matches(key, full, 1, 0.8)
        or [known for name in _close(last, full, 0.75) for known in by_last[name]]
    )
    return max(close, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio(), default=None)


def _close(last: str, keys: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(last, {known.rpartition(".")[2] for known in keys}, 1, cutoff)


def did_you_mean(key: str, keys: Iterable[str]) -> str:
    """A question that names the nearest key and ends in a space; nothing where none is near."""
    near = nearest(key, keys)
    return f"did you mean {near}? " if near else ""


def unknown(key: str, options: Iterable[str], owner: str, keys: Iterable[str], *, typed: str | None = None) -> str:
    """What is said of a setting that there is not.

    Args:
        key: The setting.
        options: What its owner has instead.
        owner: A class, a group or the command.
        keys: All settings by their full names.
        typed: What was typed, where more than `key`.
    """
    options = list(options)
    above = key.rpartition(".")[0]
    known = {*keys, *(f"{above}.{option}" if above else option for option in options)} - {key}
    near = did_you_mean(typed or key, known)
    return f"{key} is not a setting of {owner}; {near}it has {', '.join(options) or 'none'}"


def no_option(group: str, value: str, options: Iterable[str]) -> str:
    """What is said of an option that a group does not have."""
    options = sorted(options)
    known = f"it is one of {', '.join(options)}" if options else f"{group}/{value}.yaml is looked for in --config-dir"
    return f"{group}={value} is not there; {did_you_mean(value, options)}{known}"


def unreadable(word: str) -> str:
    """What is said of a word that Hydra's grammar does not read: how it is typed so that it does."""
    typed = re.fullmatch(r"([+~]*)([^=]*)=(.*)", word, re.DOTALL)
    if typed is None:
        file = difflib.get_close_matches(word.rpartition(".")[2], ("yaml", "yml"), 1) if "." in word else []
        hint = "; a job file's name ends in .yaml" if file else ""
        return f"{word}: settings are typed as KEY=VALUE and groups as GROUP=OPTION, without spaces around ={hint}"
    key, value = typed[1] + typed[2], typed[3]
    listed = value[:1] == "["
    inside = cli.overrides("", [f"loras=[{value.strip('[]')}]"])[0].partition("=")[2] if listed else ""
    for way in ([f"[{value.strip('[]')}]", inside] if listed else []) + [cli.quoted(value)]:
        if is_readable(f"{key}={way}"):
            what = "its brackets do not fit" if way == f"[{value.strip('[]')}]" else "its text needs quotes of its own"
            return f"{word} cannot be read: {what}; type {shlex.quote(f'{key}={way}')}"
    return f"{word} cannot be read: settings are typed as KEY=VALUE and groups as GROUP=OPTION, texts within quotes"


def is_readable(word: str) -> bool:
    """Whether Hydra's grammar reads a word."""
    try:
        return bool(OverridesParser.create().parse_override(word).key_or_group)
    except HydraException:
        return False


def several(word: str, *, group: bool) -> str:
    """What is said of several values, or of several options of a group, where one is meant."""
    key, _, value = word.partition("=")
    if group:
        return f"{word} is several options: choose one; --multirun makes a run of each"
    return (
        f"{word} is several values: for a list type {shlex.quote(f'{key}=[{value}]')}, for one text "
        f"{shlex.quote(f'{key}={cli.quoted(value)}')}; --multirun makes a run of each"
    )


def plain_words(error: BaseException) -> str:
    """What an error says, one line a problem, without the advice of libraries that does not hold here."""
    if isinstance(error, OmegaConfBaseException) or isinstance(error.__cause__, OmegaConfBaseException):
        found = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        key = getattr(found, "full_key", None)
        said = str(found).partition("\n")[0]
        return f"{key}: {said}" if key and key not in said else said
    text = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else str(error)
    if missing := re.fullmatch(r"You must specify '(\S+)', e.g.*?\nAvailable options:\s*(.*)", text, re.DOTALL):
        return f"{missing[1]}=... is missing: it is one of {', '.join(missing[2].split())}"
    if not isinstance(error, HydraException) or isinstance(error, Refused):
        return text
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and not _ADVICE.fullmatch(line))


class Refused(HydraException):
    """A configuration with mistakes in it.

    Args:
        problems: One line each.
        cfg: What was composed without what they are about; None where nothing was.
    """

    def __init__(self, problems: Iterable[str], cfg: object = None) -> None:
        self.problems, self.cfg = list(dict.fromkeys(problems)), cfg
        super().__init__("\n".join(self.problems))
