"""The documentation: its links, the settings that it names, and the messages that it quotes."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from mpp import cli
from mpp.checks import flattened
from mpp.config import CONFIG_DIR, check_config, compose, plain_values
from mpp.job_file import ROOTS, SHARED_ROOTS, STARTS
from tests.test_layers import modules, nodes

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
GUIDES = ("start", "quickstarts", "memory", "moving", "trouble")  # for newcomers, held to the program word for word
SHORT = {"keep", "overwrite", "device", "format"}  # what commands take by short names


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """What a page's headings are called in links, as GitHub makes it."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    titles = [
        re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_to_a_file_and_its_heading():
    wrong = []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, anchor = link.partition("#")
            if ":" in path:
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{page.name}: {link}")
    assert not wrong, "\n".join(wrong)


def test_the_index_names_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)", text_of(DOCS / "index.md")))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


# ---------------------------------------------------------------- settings


@cache
def known_settings():
    """The full names of all settings of the commands, with some families' and optimizers' own."""
    words = {
        "train": [["model=wan22", "data.cache_dir=c", "schedule=cosine"], ["optimizer=prodigy", "data.cache_dir=c"]],
        "prepare": [["data.image_dir=i", "data.cache_dir=c"]],
        "sample": [["output_dir=o"]],
        "export": [["lora=x", "export.format=peft"]],
        "plan": [["size=64x64"]],
        "masks": [["tool=feather", "input=a", "output=b"]],
    }
    return {
        key for name, typed in words.items() for some in typed for key in flattened(plain_values(composed(name, some)))
    }


def composed(command, words):
    return compose(command, cli.overrides(command, words))


def named_settings(name):
    """What a guide names in code: settings with their values, None where it gives none."""
    for line in text_of(DOCS / f"{name}.md").splitlines():
        ours = line.split(" | ")[1] if name == "moving" and line.startswith("| ") and line.count(" | ") > 1 else line
        if name == "trouble" and line.startswith("| "):  # the message is what was wrong
            ours = line.rpartition(" | ")[2]
        for code in re.findall(r"`([^`]+)`", ours):
            for key, value in re.findall(r"(?<![\w./'-])([a-z_]+(?:\.[a-z_]+)*)(=\S*)?", code.removeprefix("--")):
                if value or (key.partition(".")[0] in {*ROOTS, *SHARED_ROOTS} and "." in key):
                    yield key, value.strip("=\"';,") or None


def is_there(key, value):
    """Whether there is a setting of this name, or of a group this option."""
    if (key, value) == ("masks", "auto"):  # of mpp.init
        return True
    if (CONFIG_DIR / key).is_dir():
        return value is None or (CONFIG_DIR / key / f"{value}.yaml").is_file()
    return key in known_settings() | SHORT | STARTS


@pytest.mark.parametrize("name", GUIDES)
def test_settings_that_the_guides_name_are_there(name):
    found = set(named_settings(name))
    wrong = [f"{key}={value}" for key, value in found if not is_there(key, value)]
    assert len(found) > 2
    assert not wrong, ", ".join(wrong)


def job_files():
    blocks = re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", text_of(DOCS / "quickstarts.md"), re.DOTALL)
    for number, (name, text) in enumerate(blocks):
        yield pytest.param(name, text, id=name, marks=() if number == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("name", "text"), list(job_files()))
def test_job_files_of_the_quickstarts_are_right(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    for command in ("prepare", "train"):
        cfg = composed(command, [name])
        check_config(cfg)
        assert len(cfg.sampling.prompts) == 1


@pytest.mark.slow
def test_commands_of_the_tables_of_moving_are_right():
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text_of(DOCS / "moving.md"), re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("python -m mpp.train ")]
    assert len(lines) == 3
    for line in lines:
        check_config(composed("train", shlex.split(line)[3:]))


# ---------------------------------------------------------------- messages


@cache
def literals():
    """What the program may say: its texts of eight characters and more, between what is filled in."""
    texts = [
        node.value
        for path in modules().values()
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    parts = {part for text in texts for part in (text, *re.split(r"\{[^{}]*\}", text)) if len(part) > 7}
    return sorted(parts, key=len, reverse=True)


def test_messages_that_are_quoted_are_the_programs():
    said = re.findall(r"^\| `+ ?((?:error|warning): .+?) ?`+ \| ", text_of(DOCS / "trouble.md"), re.MULTILINE)
    assert len(said) > 15
    for message in said:
        left = message.partition(": ")[2]
        for text in literals():
            left = left.replace(text, "")
        assert len(left) < 0.4 * len(message), (
            f"this is not said any more: {message}; none of the program's is {left!r}"
        )
