"""The Dockerfile says what the project says elsewhere; nothing is built here."""

import json
import re
import shlex
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
LINES = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text("utf-8")).splitlines()
STEPS = [line.split(" ", 1) for line in LINES if line and not line.startswith("#")]
TOLD = {kind: [said for known, said in STEPS if known == kind] for kind in dict.fromkeys(kind for kind, _ in STEPS)}
COPIED = [word for said in TOLD["COPY"] for word in shlex.split(said)[:-1]]


def test_its_python_is_one_that_the_project_takes():
    (version,) = {found for said in TOLD["RUN"] for found in re.findall(r"\bpython(\d\.\d+)\b", said)}
    assert version in SpecifierSet(PROJECT["project"]["requires-python"])


def test_all_that_is_installed_is_of_the_tested_versions():
    installs = [said for said in TOLD["RUN"] if "pip install" in said]
    assert [said.split()[-1] for said in installs] == ["torch", '".[$EXTRAS]"']
    assert all("-c constraints.txt" in said and "==" not in said for said in installs)
    pinned = {
        Requirement(line).name for line in (REPOSITORY / "constraints.txt").read_text().split("\n") if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    (chosen,) = [said.partition("=")[2].split(",") for said in TOLD["ARG"]]
    wanted = [*PROJECT["project"]["dependencies"], *(needed for extra in chosen for needed in extras[extra])]
    assert {Requirement(line).name for line in wanted} <= pinned


def test_what_the_wheel_is_built_from_is_copied_and_sent():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    built = {part.partition("/")[0] for part in wheel["only-include"]}
    assert {*built, "pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "constraints.txt"} == set(COPIED)
    sent = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    assert {line[1:] for line in sent if line.startswith("!")} == set(COPIED)
    assert all((REPOSITORY / name).exists() for name in COPIED)


def test_words_behind_it_are_a_command_and_nobody_is_root():
    assert json.loads(TOLD["ENTRYPOINT"][-1]) == ["python", "-m"]
    module, *_ = json.loads(TOLD["CMD"][-1])
    assert (REPOSITORY / "src" / f"{module.replace('.', '/')}.py").is_file()
    assert not TOLD["USER"][-1].startswith(("0", "root"))
    kinds = [kind for kind, _ in STEPS]
    assert "RUN" not in kinds[kinds.index("USER") :]
