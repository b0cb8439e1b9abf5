import re
import shlex
from pathlib import Path

import pytest

from mpp.config import CONFIG_DIR, build, check_config
from mpp.masking.segment_prompts import read_prompts
from tests.helpers import config

GUIDE = Path(__file__).parents[2].joinpath("docs", "masks.md").read_text()
LINES = re.findall(r"^python -m mpp\.masks (tool=.+)$", GUIDE, re.MULTILINE) + re.findall(
    r"`(tool=\w+ input.+?)`", GUIDE
)
TOOLS = sorted(path.stem for path in (CONFIG_DIR / "tool").glob("*.yaml"))


@pytest.mark.parametrize("line", LINES)
def test_every_example_of_the_guide_is_accepted(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "where.json").write_text(re.search(r"```json\n(.+?)```", GUIDE, re.DOTALL)[1])
    cfg = config("masks", [*shlex.split(line), "device=cpu"])
    check_config(cfg)
    build(cfg.job, tool=build(cfg.tool))


def test_the_guide_has_an_example_of_every_tool():
    assert {line.split()[0].removeprefix("tool=") for line in LINES} == set(TOOLS)


def test_the_guides_prompts_are_read(tmp_path):
    (tmp_path / "where.json").write_text(re.search(r"```json\n(.+?)```", GUIDE, re.DOTALL)[1])
    prompts = read_prompts(str(tmp_path / "where.json"), "tool.prompts")
    assert prompts["walk"].frame == 12
    assert len(prompts["two_people"].boxes) == 2
