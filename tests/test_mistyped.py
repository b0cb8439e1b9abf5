"""Commands of the README with one drawn mistake: a word is left out, there twice, or misspelt."""

import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import mpp.init
import mpp.run
from mpp.config import CONFIG_DIR
from tests.documented import commands, problems_of
from tests.test_documented_commands import words_of
from tests.test_messages import typed  # noqa: F401 (a fixture)

README = [
    command
    for command in commands()
    if command.page.startswith("README.md") and command.name and "--help" not in command.typed
    if not any(word.startswith("resume=") for word in command.typed)  # what holds for it lies in a run's record
]
NEEDED = {  # what a command cannot begin without; report and export say so themselves
    "prepare": {"data.cache_dir"}, "report": set(), "train": {"data.cache_dir"}, "sample": {"output_dir"},
    "export": set(), "init": {"model", "images"}, "run": set(),
}  # fmt: skip
CHOICES = {"model", "loss", "lora", "optimizer", "schedule"}  # whose value is one of a list
ONE_OF = {"export.format", "format", "merge"}
HINT = re.compile(
    r"did you mean|nearest is|is missing|must be|should be|it has |it is one of |there are |with one of |typed? "
    r"|takes KEY=VALUE|wants a job file|python -m mpp\.init .* writes one|give the folder"
)


@dataclass(frozen=True)
class Edit:
    """A mistake: the command, its words with it, the offending word, and how it came about."""

    name: str
    words: tuple[str, ...]
    word: str
    how: str
    valid: bool


def misspelt(draws, text):
    """A text with two neighbouring letters exchanged, a letter left out, or there twice."""
    where = draws.choice([n for n in range(1, len(text) - 1) if text[n].isalpha() and text[n] != text[n - 1]])
    if draws.random() < 1 / 3 and text[where - 1].isalpha():
        return text[: where - 1] + text[where] + text[where - 1] + text[where + 1 :]
    return text[:where] + draws.choice(["", 2 * text[where]]) + text[where + 1 :]


def is_chosen(name, key):
    """Whether a key's value is one of few, so that a misspelt one is an error."""
    return key in ONE_OF or (key in CHOICES and name in ("prepare", "train", "sample", "export", "report") and not (
        key == "lora" and name in ("sample", "export")
    ))  # fmt: skip


def edit(seed):
    """What holds for it follows from which word was changed how, by the tables above."""
    draws = random.Random(seed)
    command = draws.choice(README)
    words = words_of(command)
    at = draws.randrange(len(words))
    word, how = words[at], draws.choice(["left out", "twice", "key", "key", "value"])
    key, equals, value = word.partition("=")
    if how == "left out" and len(words) > 1:
        valid = key not in NEEDED[command.name] and not word.endswith(".yaml")
        return Edit(command.name, (*words[:at], *words[at + 1 :]), word, how, valid)
    if how in ("twice", "left out"):
        how = "twice"
        return Edit(command.name, (*words[: at + 1], word, *words[at + 1 :]), word, how, valid=bool(equals))
    if how == "key" or not re.search("[a-z]{3}", value):
        wrong = misspelt(draws, key) + equals + value
        return Edit(command.name, (*words[:at], wrong, *words[at + 1 :]), wrong, "key", valid=False)
    wrong = f"{key}={misspelt(draws, value)}"
    valid = not is_chosen(command.name, key) and (command.name, key) not in {("init", "images")}
    return Edit(command.name, (*words[:at], wrong, *words[at + 1 :]), wrong, how, valid)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images, and the README's job file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    mpp.init.write(["model=wan", "images=photos", "masks=masks", "output=outputs/mychar"])
    return tmp_path


def front(name, words):
    """What a command answers: nothing where it would begin."""
    try:
        if name == "init":
            Path("mychar.yaml").unlink()
            mpp.init.write(list(words))
            return []
        if name == "run":
            return [line for own, meant in mpp.run.commands(words).items() for line in problems_of(own, meant)]
    except ValueError as error:
        return str(error).splitlines()
    return problems_of(name, list(words))


def parts(key):
    """A key and what stands above it: a misspelt beginning is named without the rest."""
    return [key[: at.start()] for at in re.finditer(r"\.|$", key)]


def check(found, lines):
    """Hold what is said to what the mistake is."""
    told = f"{found.name} {' '.join(found.words)}\n{found.how}: {found.word}\n" + "\n".join(lines)
    if found.valid:
        assert not lines, told
        return
    assert 1 <= len(lines) <= 2, told  # a word that is misspelt may also be missing
    assert all(HINT.search(line) for line in lines), told
    key, _, value = found.word.partition("=")
    if key.endswith(".yaml") and found.how == "left out":
        named = any("is missing" in line for line in lines)  # what it said
    elif found.how == "left out":
        named = any(line.startswith(f"{key}=...") for line in lines)
    else:  # a short word may be named by its full one, with what was typed for it
        named = any(line.startswith((found.word, *parts(key))) for line in lines) or any(
            said in line for said in (f"got {found.word}", f"{key} should be ", f"got {value!r}") for line in lines
        )
    assert named, told
    assert not any("Traceback" in line or line[:1].isspace() for line in lines), told


DRAWN = [edit(seed) for seed in range(250)]


def test_the_mistakes_are_of_all_kinds_and_most_are_mistakes():
    assert {found.name for found in DRAWN[:84]} == {
        "prepare",
        "report",
        "plan",
        "train",
        "sample",
        "export",
        "init",
        "run",
    }
    counted = Counter((found.how, found.valid) for found in DRAWN[:84])
    assert len(counted) == 7
    assert sum(count for (_, valid), count in counted.items() if not valid) > 42
    groups = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    assert groups >= CHOICES


@pytest.mark.parametrize("found", [pytest.param(f, id=f"{n}-{f.name}-{f.word}") for n, f in enumerate(DRAWN[:84])])
def test_a_mistyped_command_is_another_or_is_refused_with_the_way(found, folder):
    check(found, front(found.name, found.words))


@pytest.mark.slow
@pytest.mark.draws
@pytest.mark.parametrize("found", [pytest.param(f, id=f"{n}-{f.name}-{f.word}") for n, f in enumerate(DRAWN)])
def test_a_mistyped_command_ends_so_by_its_own_entry(found, folder, typed, monkeypatch, capsys):  # noqa: F811
    if found.name in ("init", "run"):
        monkeypatch.setattr(sys, "argv", [f"mpp-{found.name}", *found.words])
        monkeypatch.setattr(mpp.run, "call", lambda *_: 0)
        (folder / "mychar.yaml").unlink() if found.name == "init" else None
        code, said = 0, ""
        try:
            (mpp.init if found.name == "init" else mpp.run).main()
        except SystemExit as end:
            code, said = (1, end.code) if isinstance(end.code, str) else (end.code, capsys.readouterr().err)
        said = str(said)
    else:
        monkeypatch.chdir(folder)
        code, said = typed(found.name, list(found.words))
    lines = [line.removeprefix("error: ") for line in said.strip().splitlines()]
    assert (code == 0) == found.valid, said
    check(found, lines)
