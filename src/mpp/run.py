"""`python -m mpp.run`: prepare, report and train by a job file, one after the other.

Each is a process of its own: what one took of memory is free for the next, Hydra and Lightning begin anew, and the
processes that DDP starts repeat the words of training alone.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from mpp import cli
from mpp.job_file import STARTS, commands_of, is_job_file

STAGES = ("prepare", "report", "train")
HELP = """python -m mpp.run mychar.yaml [KEY=VALUE ...] [--show] [--quiet] [--json]

Prepares, reports and trains by a job file, which python -m mpp.init writes. All words are checked before the first of
them begins; the first that fails ends it, with its exit code. Settings that are typed win over the file; each goes to
the commands that have it. --show prints the commands instead; --quiet leaves warnings and errors, and --json makes the
last line of each command a JSON object of what it came to. docs/job.md says more.
"""


def commands(words: Sequence[str]) -> dict[str, list[str]]:
    """The words of each command, all read at the start: who edits the file meanwhile changes nothing.

    Raises:
        ValueError: There is no job file, it is wrong, or a word belongs to none of the commands.
    """
    if not words or not is_job_file(words[0]):
        got = f", got {words[0]}" if words else ""
        raise ValueError(f"mpp.run wants a job file as its first word, as in python -m mpp.run mychar.yaml{got}")
    found: dict[str, list[str]] = {name: [words[0]] for name in STAGES}
    for word in words[1:]:
        key, equals, _ = word.lstrip("+").partition("=")
        if not equals or key.startswith(("-", "~")):
            raise ValueError(f"mpp.run takes KEY=VALUE, --show, --quiet and --json behind the job file, got {word}")
        owners = ("train",) if key in STARTS else commands_of(key)
        if not set(owners) & set(STAGES):
            raise ValueError(
                f"{word} is for {', '.join(f'mpp.{name}' for name in owners)}, which mpp.run does not call"
            )
        for name in set(owners) & set(STAGES):
            found[name].append(word)
    return {name: cli.overrides(name, own) for name, own in found.items()}


def check(todo: Mapping[str, Sequence[str]]) -> None:
    """Refuse what any of the commands would refuse of its words, before the first begins.

    Args:
        todo: The words of each command.

    Raises:
        ValueError: Names each problem once.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mpp.config import check_config, compose
    from mpp.messages import plain_words
    from mpp.training.runs import begun

    found: list[str] = []
    for command, words in todo.items():
        if cli.goes_on(words):
            continue  # its configuration is the run's own
        try:
            cfg = compose(command, words)
            check_config(cfg)
            if command == "train":
                begun(Path(cfg.output_dir))
        except (ValueError, HydraException, OmegaConfBaseException) as error:
            found += cli.in_short(command, plain_words(error)).splitlines()
    if found:
        raise ValueError("\n".join(dict.fromkeys(found)))


def call(command: str, words: Sequence[str]) -> int:
    """Run one command to its end; signals reach it, and it says what they mean.

    Returns:
        Its exit code, 128 and the signal's number where one killed it.
    """
    process = subprocess.Popen([sys.executable, "-m", f"mpp.{command}", *words])  # noqa: S603 (our own command)

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    names = ("SIGTERM", "SIGHUP", "SIGUSR1")
    before = {number: signal.signal(number, pass_on) for name in names if (number := getattr(signal, name, None))}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to both
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Command line entry."""
    words = cli.words_or_help(HELP)
    flags = [word for word in words if word in cli.SWITCHES and word != "--show"]
    try:
        todo = commands([word for word in words if word not in cli.SWITCHES])
        if "--show" not in words:
            check(todo)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for command, meant in todo.items():
        if "--show" in words:
            print(cli.shown(command, meant))
            continue
        if not flags:
            print(f"--- {command}", flush=True)
        code = call(command, [*meant, *flags])
        if code:
            left = [f"mpp.{name}" for name in STAGES[STAGES.index(command) + 1 :]]
            if left:
                print(f"mpp.{command} ended with exit code {code}; not started: {', '.join(left)}", file=sys.stderr)
            sys.exit(code)


if __name__ == "__main__":
    main()
