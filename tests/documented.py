"""The commands of the README and the docs, as they are typed, and fast ways to compose and to run them."""

import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import mpp.config
from mpp import cli
from mpp.checks import problems
from mpp.messages import Refused, plain_words

REPOSITORY = Path(__file__).parents[1]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
SHELLS = ("", "sh", "bash", "shell", "console")  # what a block of commands says behind its fence
PROGRAMS = ("python", "make", "pip", "torchrun", "srun", "docker")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        line: What is typed.
        page: Where, as README.md:78.
    """

    line: str
    page: str

    @property
    def words(self) -> tuple[str, ...]:
        """Its words, up to where its output is piped elsewhere."""
        words = shlex.split(self.line)
        ends = [n for n, word in enumerate(words) if word in ("|", "&&", ";", ">", "2>")]
        return tuple(words[: ends[0]] if ends else words)

    @property
    def module(self) -> str | None:
        """The module that Python runs, also where torchrun, srun or a container start it."""
        found = re.match(r"(?:(?:torchrun|srun)\s.*?)?(?:python[\d.]* )?-m (\S+)|docker run .*?(\bmpp\.\w+)", self.line)
        return (found[1] or found[2]) if found else None

    @property
    def name(self) -> str | None:
        """The command of mpp, `train` for `python -m mpp.train`."""
        module = self.module or ""
        return module.removeprefix("mpp.") if module.startswith("mpp.") else None

    @property
    def typed(self) -> list[str]:
        """What is typed behind the module."""
        return list(self.words[self.words.index(self.module) + 1 :])


def fenced(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a page's blocks of commands with their numbers, those that a backslash goes on as one."""
    language, whole, start = None, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*(?:```|~~~)(\w*)", line)
        if fence:
            language = fence[1] if language is None else None
            continue
        if language in SHELLS:
            whole, start = (f"{whole} {line.strip()}", start) if whole else (line.strip().removeprefix("$ "), number)
            whole, goes_on = whole.removesuffix("\\").rstrip(), whole.endswith("\\")
            if not goes_on:
                yield start, whole
                whole = ""


def of_page(page: Path) -> Iterator[Command]:
    """Its commands: those of its blocks, and those of mpp that stand in a sentence with words of their own."""
    text = page.read_text("utf-8")
    lines = list(fenced(text))
    for number, line in enumerate(text.splitlines(), 1):
        lines += [(number, found) for found in re.findall(r"`(python -m mpp\.[a-z]+ [^`]+)`", line)]
    for number, line in lines:
        plain = re.sub(r"(^|\s+)#\s.*$", "", line)
        plain = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", plain)  # environment variables before it
        if plain.partition(" ")[0] in PROGRAMS:
            yield Command(" ".join(plain.split()), f"{page.relative_to(REPOSITORY).as_posix()}:{number}")


def commands() -> list[Command]:
    """All commands, each once, from wherever it stands first."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in of_page(page):
            found.setdefault(command.line, command)
    return list(found.values())


# ---------------------------------------------------------------- composing them

GROUPS = {path.name for path in mpp.config.CONFIG_DIR.iterdir() if path.is_dir()} | {"source@data"}


@cache
def _composed(name: str, *groups: str) -> DictConfig:
    return mpp.config.compose(name, list(groups))


def problems_of(name: str, words: Sequence[str]) -> list[str]:
    """What a command says is wrong with its words, a line each; composing what groups have in common is done once."""
    try:
        found = _problems_of(name, cli.overrides(name, words))
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        found = plain_words(error).splitlines()
    return [cli.in_short(name, problem) for problem in found]


def _problems_of(name: str, words: list[str]) -> list[str]:
    if cli.goes_on(words):  # the rest lies in the run's record
        words = [word for word in words if not word.startswith(("resume=", "ckpt_path="))]
        words += [word for word in ["data.cache_dir=x"] if not any("data.cache_dir=" in word for word in words)]
    (words, *_), *_ = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    groups = [word for word in words if word.partition("=")[0] in GROUPS]
    cfg = deepcopy(_composed(name, *groups))
    typed = OverridesParser.create().parse_overrides([word for word in words if word not in groups])
    try:
        mpp.config._override(typed, cfg)
    except Refused as error:
        return [*error.problems, *problems(cfg)]
    return problems(cfg)


# ---------------------------------------------------------------- running them

_LOADED = (
    "mpp.config", "mpp.recorded", "mpp.fitting", "mpp.prepare", "mpp.sample", "mpp.export", "mpp.report", "mpp.masks",
    "mpp.init", "mpp.run", "mpp.preparing.preparation", "mpp.sampling.generation", "mpp.models.families.wan",
)  # fmt: skip


def type_in(folder: Path, name: str, words: Sequence[str]) -> tuple[int | None, str]:
    """Run a command in a folder, in a process that has its imports already: exit code, and all that it says."""
    log = folder / ".said"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    process = context.Process(target=_in_folder, args=(str(folder), str(log), name, list(words)))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    said = log.read_text("utf-8", "replace")
    log.unlink()
    return process.exitcode, said


def _in_folder(folder: str, log: str, name: str, words: list[str]) -> None:
    os.chdir(folder)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    _run(name, words)


def _run(name: str, words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = [f"mpp-{name}", *words]
    for starter in ("mpp.init", "mpp.run"):  # which start processes of their own
        import_module(starter).call = _call
    import_module(f"mpp.{name}").main()


def _call(name: str, words: Sequence[str]) -> int:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(name, words))
    process.start()
    process.join()
    return int(process.exitcode or 0)
