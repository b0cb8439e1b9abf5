"""What a class's source says of it is what the imported class says; words are answered without importing it."""

import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import mpp.checks
import mpp.config
from mpp import outline
from mpp.checks import flattened
from mpp.config import CONFIG_DIR, compose, plain_values
from mpp.settings import default_settings, locate, look_up
from tests.outlined import composed, described

REPOSITORY = Path(__file__).parents[1]
HEAVY = {
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "diffusers", "transformers", "peft", "accelerate"),
    *("torchmetrics", "scipy", "pandas", "numpy", "PIL", "av", "safetensors", "tensorboard", "prodigyopt"),
}
MISSPELT = {
    "train": ["model=toy", "optimizer.lrr=1"],
    "prepare": ["data.clips.fsp=24"],
    "sample": ["sampling.promts=x"],
    "export": ["export.fromat=kohya"],
    "report": ["loss.prior_wieght=1"],
    "masks": ["tool=invert", "tool.sigma=3"],
}
WRONG_TYPE = {
    "train": ["lora.rank=abc", "data.cache_dir=c", "output_dir=o"],
    "prepare": ["data.resolution=abc", "data.cache_dir=c", "data.image_dir=i"],
    "sample": ["sampling.width=abc", "output_dir=o"],
    "export": ["export.overwrite=abc", "lora=l", "export.format=peft"],
    "report": ["report.limit=abc", "data.cache_dir=c"],
    "masks": ["tool=feather", "tool.sigma=abc", "input=i", "output=o"],
}
NEEDED = {"train": ["output_dir=o"], "sample": ["output_dir=o"], "masks": ["tool=invert"]}
RUN = """
import atexit, json, runpy, sys
names, sys.argv = sys.argv[1], sys.argv[2:]
atexit.register(lambda: open(names, "w").write(json.dumps(sorted(sys.modules))))
runpy.run_module(f"mpp.{sys.argv[0]}", run_name="__main__", alter_sys=True)
"""
CALL = """
import json, sys
from mpp.outline import outline
from tests.outlined import composed, described
name, inputs = json.load(sys.stdin)
found = [described(outline(given)) if name == "described" else composed(*given) for given in inputs]
print(json.dumps([found, sorted(sys.modules)]))
"""


def child(code, *words, text="", cwd=REPOSITORY):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{REPOSITORY / 'src'}:{REPOSITORY}"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300, check=False
    )


def said_without_importing(name, inputs):
    """What a process of its own, which imports nothing that takes long, makes of each input."""
    done = child(CALL, text=json.dumps([name, inputs]))
    assert done.returncode == 0, done.stderr
    found, modules = json.loads(done.stdout)
    return found, heavy(modules)


def heavy(modules):
    return {name.partition(".")[0] for name in modules} & HEAVY


def as_json(value):
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------- outlines are what the classes are


@cache
def targets():
    """All classes and functions that configurations name, all of torch's optimizers and schedules, and the roles."""
    texts = [path.read_text() for path in sorted(CONFIG_DIR.rglob("*.yaml"))]
    named = {target for text in texts for target in re.findall(r"^ *_target_: (\S+)", text, re.MULTILINE)}
    for room, base in (
        (torch.optim, torch.optim.Optimizer),
        (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    ):
        kinds = [name for name, kind in vars(room).items() if isinstance(kind, type) and issubclass(kind, base)]
        named |= {f"{room.__name__}.{name}" for name in kinds}
    named |= {"mpp.core.flow.LinearShift", "mpp.core.flow.EmpiricalShift", *mpp.checks.ROLES.values()}
    return sorted(target for target in named if not target.startswith("bitsandbytes."))  # which needs a GPU


def test_an_outline_is_what_the_imported_class_is():
    found, imported = said_without_importing("described", targets())
    assert len(found) > 70
    assert not imported
    for target, outlined in zip(targets(), found, strict=True):
        real = as_json(described(locate(target)))
        if not target.startswith("mpp."):  # torch says of some that they lie elsewhere, and adds to their docstrings
            outlined |= {"class": real["class"], "reasons": real["reasons"]}
        if real["hints"] is None:
            outlined["hints"] = None
        assert outlined == real, target


@pytest.fixture
def written(tmp_path, monkeypatch):
    """From the text of a module to its name; its package is read as that of mpp."""
    names = iter(f"drawn{number}" for number in range(100))
    folder = tmp_path / f"package_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for packages in ("READ", "OWN"):
        monkeypatch.setattr(outline, packages, getattr(outline, packages) | {folder.name})

    def write(text):
        name = next(names)
        (folder / f"{name}.py").write_text(text)
        return f"{folder.name}.{name}"

    return write


TAKES_START = "class Found:\n    def __init__(self, a=START): ..."
RECORD = "@dataclass\nclass Found(Base):\n    a: int = 1"


@pytest.mark.parametrize(
    "text",
    [
        f"if len('a') == 1:\n    START = 3\nelse:\n    START = 4\n{TAKES_START}",
        f"START = 3\nSTART = 4\n{TAKES_START}",
        f"START = 3\nSTART += 1\n{TAKES_START}",
        f"START = []\nSTART.append(3)\n{TAKES_START}",
        f"START = {{}}\nSTART['a'] = 3\n{TAKES_START}",
        f"START = {{}}\nfor a in 'ab':\n    START[a] = 3\n{TAKES_START}",
        f"START = 1\n{TAKES_START}\nFound.__init__ = lambda self, a=2: None",
        f"START = 1\n{TAKES_START}\nFound.__init__.__defaults__ = (5,)",
        f"START = 1\n{TAKES_START}\nsetattr(Found, '__init__', lambda self, a=2: None)",
        "START = 1\nclass Found:\n    START = 2\n    def __init__(self, a=START): ...",
        "class Found:\n    def set(self, a=1): ...\n    __init__ = set",
        f"from nowhere import START\n{TAKES_START}",
        f"import nowhere\nSTART = nowhere.START\n{TAKES_START}",
        f"import nowhere\nSTART = (1, nowhere.START)\n{TAKES_START}",
        "def made():\n    return 5\nclass Found:\n    def __init__(self, a=made()): ...",
        "def more(f):\n    return lambda b=2: f(b)\nclass Found:\n    @more\n    def __init__(self, a=1): ...",
        f"START = 1\ndef more(kind):\n    return kind\n@more\n{TAKES_START}",
        "class Found:\n    if True:\n        def __init__(self, a=1): ...",
        "from nowhere import Base\nclass Found(Base):\n    pass",
        f"from dataclasses import dataclass\nfrom nowhere import Base\n{RECORD}",
        "class Other:\n    pass",
    ],
)
def test_what_depends_on_more_than_the_source_is_refused(written, text):
    with pytest.raises(outline.UnreadableError):
        outline.outline(f"{written(text)}.Found")


def test_a_name_is_what_it_is_where_it_is_imported_from(written):
    values = written("FIRST, SECOND = 1, 2\nOTHER = 3")
    text = f"from {values} import OTHER as A, SECOND as B\nclass Found:\n    def __init__(self, a=A, b=B): ..."
    found = outline.outline(f"{written(text)}.Found")
    assert default_settings(found) == {"a": 3, "b": 2}
    assert values not in sys.modules


INNER = """
from dataclasses import dataclass, field

@dataclass
class Inner:
    a: int = 1

    def __post_init__(self):
        self.a = CHANGE

    @property
    def own(self):
        return 7

@dataclass
class Found:
    inner: Inner = field(default_factory=Inner)
"""


@pytest.mark.parametrize(("change", "value"), [("self.a + 4", 5), ("self.own + 1", 8)])
def test_a_record_within_a_class_is_what_its_own_checks_make_of_it(written, change, value):
    module = written(INNER.replace("CHANGE", change))
    settings = default_settings(look_up(f"{module}.Found"))
    assert settings == {"inner": {"_target_": f"{module}.Inner", "a": value}}
    assert (module in sys.modules) == ("own" in change)  # the second needs more than is read


def test_a_class_whose_source_does_not_say_enough_is_imported(written):
    module = written("def made():\n    return 5\nclass Found:\n    def __init__(self, a=made(), b=2): ...")
    assert default_settings(look_up(f"{module}.Found")) == {"a": 5, "b": 2}
    assert module in sys.modules


def test_a_class_that_is_edited_has_its_new_default_at_the_next_start(tmp_path):
    package = tmp_path / "mpp"
    package.mkdir()
    (package / "__init__.py").touch()
    code = "from mpp import outline; from inspect import signature as s; print(s(outline.outline('mpp.mine.Found')))"
    (package / "outline.py").write_bytes(Path(outline.__file__).read_bytes())
    for value in (1, 2):
        (package / "mine.py").write_text(f"import torch\nclass Found:\n    def __init__(self, a={value}): ...\n")
        text = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"
        assert child(text, cwd=tmp_path).stdout.strip() == f"(a={value})"


# ---------------------------------------------------------------- and so are configurations


def drawn(count, seed):
    """Commands with drawn options, classes, settings and values, many of them wrong."""
    draw = random.Random(seed)
    values = ["abc", "5", "0.25", "-1", "null", "true", "[1,2]", "[a,b]", "{a: 1}", "''"]
    for _ in range(count):
        command = draw.choice(list(MISSPELT))
        cfg = compose(command, NEEDED.get(command, []))
        keys = [key for key in flattened(plain_values(mpp.config._without_hydra(cfg))) if "_dir" not in key]
        groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name in cfg]
        words = [f"{key}={draw.choice(values)}" for key in draw.sample(keys, min(len(keys), draw.randint(0, 4)))]
        for group in draw.sample(groups, min(len(groups), draw.randint(0, 2))):
            words.append(f"{group}={draw.choice(sorted((CONFIG_DIR / group).glob('*.yaml'))).stem}")
        if command == "train" and draw.random() < 0.4:
            words.append(f"optimizer._target_={draw.choice([t for t in targets() if t.startswith('torch.optim.')])}")
        yield command, [*NEEDED.get(command, []), *words]


def options():
    """Each option of each group, by a command that has it."""
    for path in sorted(CONFIG_DIR.glob("*/*.yaml")):
        command = {"tool": "masks", "source": "prepare"}.get(path.parent.name, "train")
        group = {"source": "data"}.get(path.parent.name, path.parent.name)
        yield command, [*(["output_dir=o"] if command == "train" else []), f"{group}={path.stem}"]


def check_configurations(given, monkeypatch):
    given = [list(case) for case in given]
    found, imported = said_without_importing("composed", given)
    monkeypatch.setattr("mpp.config.look_up", locate)
    monkeypatch.setattr("mpp.checks.look_up", locate)
    monkeypatch.setattr("mpp.settings.look_up", locate)
    for case, outlined in zip(given, found, strict=True):
        assert outlined == as_json(composed(*case)), case
    return imported


def test_drawn_configurations_are_those_that_importing_makes(monkeypatch):
    check_configurations(drawn(4, seed=0), monkeypatch)


@pytest.mark.slow
@pytest.mark.draws
def test_many_more_drawn_configurations(monkeypatch):
    check_configurations(drawn(60, seed=1), monkeypatch)


@pytest.mark.slow
def test_every_option_of_every_group_is_composed_as_by_importing_and_without_it(monkeypatch):
    given = [case for case in options() if case[1][-1] != "optimizer=adamw8bit"]
    assert not check_configurations(given, monkeypatch)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("command", "words"),
    [
        pytest.param(command, words, marks=() if (command, words) == ("train", MISSPELT["train"]) else pytest.mark.slow)
        for command in MISSPELT
        for words in (
            ["--help"],
            ["--cfg", "job", *NEEDED.get(command, [])],
            MISSPELT[command],
            WRONG_TYPE[command],
        )
    ],
)
def test_words_are_answered_without_importing_what_takes_long(tmp_path, command, words):
    answer = child(RUN, tmp_path / "names", command, *words, cwd=tmp_path)
    fine = words[0] in ("--help", "--cfg")
    assert answer.returncode == (0 if fine else 1), answer.stderr
    assert (answer.stdout if fine else answer.stderr).count("\n") >= 1
    assert "Traceback" not in answer.stderr
    assert not heavy(json.loads((tmp_path / "names").read_text()))
