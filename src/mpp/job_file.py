"""A job file: what is said once for all commands, as settings of each.

It knows words alone, as `mpp.cli` does, and reads YAML itself, since every mistake is named by its line.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

COMMANDS = ("prepare", "report", "plan", "train", "sample", "export")  # that take a job file as their first word


@dataclass(frozen=True)
class Key:
    """One thing that a job file says.

    Attributes:
        kind: What its value is: `text`, `whole number`, `number` or `prompts`.
        settings: By command the setting that it stands for.
    """

    kind: str
    settings: dict[str, str]


def _key(kind: str, **settings: str) -> Key:
    return Key(kind, settings)


_MODEL = {command: "model" for command in COMMANDS if command != "report"}
_PROMPTS = dict.fromkeys(("prepare", "train", "sample"), "sampling.prompts")
KEYS = {
    "model": Key("text", _MODEL),
    "loss": _key("text", report="loss", plan="loss", train="loss"),
    "lora": _key("text", plan="lora", train="lora"),
    "optimizer": _key("text", plan="optimizer", train="optimizer"),
    "schedule": _key("text", train="schedule"),
    "data.images": _key("text", prepare="data.image_dir"),
    "data.masks": _key("text", prepare="data.mask_dir"),
    "data.captions": _key("text", prepare="data.captions"),
    "data.cache": _key(
        "text", prepare="data.cache_dir", report="report.cache_dir", plan="plan.cache_dir", train="data.cache_dir"
    ),
    "data.resolution": _key("whole number", prepare="data.resolution"),
    "train.steps": _key("whole number", train="trainer.max_steps"),
    "train.batch": _key("whole number", train="data.batch_size", plan="plan.batch_size"),
    "train.lr": _key("number", train="optimizer.lr"),
    "train.rank": _key("whole number", plan="lora.rank", train="lora.rank"),
    "samples": Key("prompts", _PROMPTS),
    "output": _key("text", train="output_dir", sample="lora_path", export="export.lora"),
}
NEEDED = ("model", "data.cache", "output")
AUTO = "auto"  # what mpp.init takes for masks that it is to make
GENERATED = "generated"  # where in `output` mpp.sample writes


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRAINING = _names("teacher schedule trainer callbacks logger experiment seed compile val_sigmas validate_first")
ROOTS = {  # whose settings are those of a root key
    "model": tuple(_MODEL),
    "loss": ("report", "plan", "train"),
    "lora": ("plan", "train"),
    "optimizer": ("plan", "train"),
    "gradient_checkpointing": ("plan", "train"),
    "sampling": tuple(_PROMPTS),
    "plan": ("plan",),
    "device": ("prepare", "sample"),
    "prepare": ("prepare",),
    "report": ("report",),
    "hydra": COMMANDS,
    **dict.fromkeys(_TRAINING, ("train",)),
}
SHARED_ROOTS = {  # keys that are something else in each command: the names below them
    "data": {
        "prepare": _names(
            "image_dir manifest captions mask_dir control_dir val_image_dir val_mask_dir val_control_dir mask_sources "
            "invert_mask require_mask repeats caption_variants cache_dir datasets on_error resolution max_aspect flip "
            "empty_caption clips preservation"
        ),
        "report": _names("cache_dir"),
        "train": _names(
            "cache_dir batch_size val_fraction require_mask strict_masks strict_sources on_empty_mask "
            "unmasked_probability caption_dropout preservation num_workers seed layout"
        ),
    },
    "data.preservation": {
        "prepare": _names("replace caption"),
        "train": _names("rate replace caption cache_dir"),
    },
    "memory": {
        "prepare": _names("text_encoder text_layers vae"),
        "train": _names("activations base card resident teacher vae"),
        "plan": _names("activations base card resident teacher vae"),
        "sample": _names("base resident text_encoder text_layers vae"),
    },
    "export": {
        "train": _names("formats metadata"),
        "export": _names("format merge output dtype overwrite"),
    },
}
STARTS = frozenset({"resume", "resume_lr", "resume_schedule", "ckpt_path", "output_dir"})  # typed, for training alone


def is_job_file(word: str) -> bool:
    """Whether a word is the name of a job file, and no setting or flag."""
    named = re.search(r"\.ya?ml$", word, re.IGNORECASE) is not None and not word.startswith("-")
    return named and ("=" not in word or os.path.isfile(word))


def refuse_own(key: str, command: str | None = None) -> None:
    """Refuse a job file's own key where a setting is meant.

    Args:
        key: What stands in a setting's position.
        command: Whose setting is meant, if that is known.

    Raises:
        ValueError: Names the setting that it stands for.
    """
    settings = KEYS[key].settings if key in KEYS else {}
    if settings and key not in settings.values():
        of = dict.fromkeys([settings[command]] if command in settings else settings.values())
        raise ValueError(f"{key} is a key of job files; its setting is {' or '.join(of)}")


def commands_of(key: str) -> tuple[str, ...]:
    """The commands that know a setting, as far as its first words tell.

    Raises:
        ValueError: None does; names the nearest.
    """
    refuse_own(key)
    root, _, below = key.partition(".")
    if root in ROOTS:
        return ROOTS[root]
    if root not in SHARED_ROOTS or not below:
        raise ValueError(
            _unknown(key, root, [*ROOTS, *(f"{name}.*" for name in SHARED_ROOTS if "." not in name)], "any command")
        )
    found, above = COMMANDS, root
    while above in SHARED_ROOTS and below:
        name, _, below = below.partition(".")
        owners = SHARED_ROOTS[above]
        known = tuple(command for command in found if name in owners.get(command, ()))
        if not known:
            raise ValueError(_unknown(key, name, frozenset().union(*owners.values()), above))
        found, above = known, f"{above}.{name}"
    return found


def _unknown(key: str, name: str, options: Iterable[str], owner: str) -> str:
    options = sorted(options)
    near = difflib.get_close_matches(name, options, 1)
    hint = f"nearest is {near[0]}; " if near else ""
    return f"{key} is not a setting of {owner}; {hint}there are {', '.join(options)}"


@dataclass(frozen=True)
class JobFile:
    """What a job file says.

    Attributes:
        said: Its own keys by their whole names, without those left empty.
        more: What its `set` says, by the names that settings have.
    """

    said: dict[str, Any]
    more: dict[str, Any]

    def settings(self, command: str) -> dict[str, Any]:
        """Its part of one command, as settings.

        Raises:
            ValueError: The command takes no job file.
        """
        if command not in COMMANDS:
            raise ValueError(f"mpp.{command} takes no job file; {', '.join(f'mpp.{name}' for name in COMMANDS)} do")
        found = {KEYS[key].settings[command]: v for key, v in self.said.items() if command in KEYS[key].settings}
        if command == "sample":
            found["output_dir"] = os.path.join(self.said["output"], GENERATED)
        return found | {key: v for key, v in self.more.items() if command in commands_of(key.lstrip("+"))}


def read_job(file: str) -> JobFile:
    """Read a job file.

    Args:
        file: Its path.

    Raises:
        ValueError: It is not there or no YAML, has an unknown key, a value of the wrong type, or says something twice;
            names file and line.
    """
    said: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for key, node in _entries(file, _load(file), ""):
        try:
            value = _plain(node)
        except RecursionError:
            raise ValueError(f"{_at(file, node)}: {key} holds itself") from None
        if value is None:
            continue
        if key.startswith("set."):
            more[key.removeprefix("set.")] = _setting(key.removeprefix("set."), value, said, _at(file, node))
        else:
            said[key] = _checked(key, value, _at(file, node))
    missing = next((key for key in NEEDED if key not in said), None)
    if missing is not None:
        raise ValueError(f"{file}: {missing} is missing; a job file needs {', '.join(NEEDED)}")
    return JobFile(said, more)


def _load(file: str) -> yaml.MappingNode:
    try:
        with open(file, encoding="utf-8-sig") as handle:
            root = yaml.compose(handle, yaml.SafeLoader)
    except FileNotFoundError:
        raise ValueError(f"{file} is not there; python -m mpp.init model=MODEL images=FOLDER writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; a text with `: ` or ` #` in it needs quotes" if "mapping" in f"{error.problem}" else ""
        raise ValueError(f"{file}{line}: not YAML ({error.problem}){hint}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} should hold keys and values, as python -m mpp.init writes them")
    return root


def _at(file: str, node: yaml.Node) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


def _entries(file: str, node: yaml.MappingNode, above: str) -> Iterator[tuple[str, yaml.Node]]:
    """Every key by its whole name with what it holds, those of `set` last.

    Raises:
        ValueError: A key is unknown, there twice, or holds no keys though it should.
    """
    sections = {key.partition(".")[0] for key in KEYS if "." in key} | {"set"}
    options = [key.removeprefix(above) for key in KEYS if key.startswith(above)] if above else [
        *dict.fromkeys([key.partition(".")[0] for key in KEYS]), "set"
    ]  # fmt: skip
    seen = set()
    for named, held in sorted(node.value, key=lambda entry: not above and entry[0].value == "set"):
        at, name = _at(file, named), named.value if isinstance(named, yaml.ScalarNode) else "(a list)"
        if name in seen:
            raise ValueError(f"{at}: {above}{name} is there twice; leave one out")
        seen.add(name)
        if above != "set." and name not in options:
            near = difflib.get_close_matches(name, options, 1)
            hint = f"nearest is {near[0]}; " if near else ""
            raise ValueError(
                f"{at}: {above}{name} is not a key of a job file; {hint}{above.rstrip('.') or 'it'} has "
                f"{', '.join(options)}; settings by their full names stand under set"
            )
        if above or name not in sections:
            yield f"{above}{name}", held
        elif isinstance(held, yaml.MappingNode):
            yield from _entries(file, held, f"{name}.")
        elif not isinstance(held, yaml.ScalarNode) or _plain(held) is not None:
            raise ValueError(f"{at}: {name} should hold keys and values on lines of their own below it")


def _plain(node: yaml.Node) -> Any:  # noqa: ANN401
    """What a node says; numbers and words as Hydra reads them, so that `1e-4` is a number and `no` a text."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(entry) for entry in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(name)): _plain(value) for name, value in node.value}
    text: str = node.value
    if node.style is not None:  # in quotes
        return text
    if text.lower() in ("", "null", "~"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.?\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        return float(text)
    return text


def _checked(key: str, value: Any, at: str) -> Any:  # noqa: ANN401
    kind = KEYS[key].kind
    if key == "data.masks" and value == AUTO:
        hint = f"mpp.init masks={AUTO} and mpp.masks tool=salient make one; another of that name is ./{AUTO}"
        raise ValueError(f"{at}: data.masks is a folder; {hint}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    fits = {
        "text": isinstance(value, str) and value.strip() != "",
        "whole number": number and isinstance(value, int),
        "number": number,
        "prompts": isinstance(value, str) or texts,
    }
    if not fits[kind]:
        wish = {"text": "a text", "prompts": "a prompt, a list of them or a .txt file"}.get(kind, f"a {kind}")
        hint = "; quotes around it make it a text" if kind in ("text", "prompts") else ""
        raise ValueError(f"{at}: {key} must be {wish}, got {value!r}{hint}")
    return value


def _setting(key: str, value: Any, said: dict[str, Any], at: str) -> Any:  # noqa: ANN401
    """A value of `set`, if the setting is there and nothing else says it."""
    if not re.fullmatch(r"\+{0,2}[\w@/.-]+", key):
        raise ValueError(f"{at}: {key!r} under set is no name of a setting, as --help of the commands lists them")
    bare = key.lstrip("+")
    again = next((own for own in said if bare in KEYS[own].settings.values()), None)
    if again is not None:
        raise ValueError(f"{at}: {bare} says what {again} says; leave out one of them")
    try:
        commands_of(bare)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    return value
