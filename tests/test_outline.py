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
from omegaconf import OmegaConf

import mpp.checks
import mpp.config
import mpp.settings
from mpp import outline
from mpp.config import CONFIG_DIR, compose
from mpp.settings import locate, look_up

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
RUN = """
import atexit, json, runpy, sys
names, sys.argv = sys.argv[1], sys.argv[2:]
atexit.register(lambda: open(names, "w").write(json.dumps(sorted(sys.modules))))
runpy.run_module(f"mpp.{sys.argv[0]}", run_name="__main__", alter_sys=True)
"""
DESCRIBE = """
import json, sys
from tests.outlined import described
from mpp.outline import outline
print(json.dumps({target: described(outline(target)) for target in json.load(sys.stdin)}))
print(json.dumps(sorted(sys.modules)))
"""
COMPOSE = """
import json, sys
from omegaconf import OmegaConf
from mpp.checks import problems
from mpp.config import compose
for command, words in json.load(sys.stdin):
    cfg = compose(command, words)
    print(json.dumps([OmegaConf.to_yaml(cfg), problems(cfg)]))
"""


def child(code, *words, text="", cwd=REPOSITORY):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{REPOSITORY / 'src'}:{REPOSITORY}"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300, check=False
    )


def imported(modules):
    return {name.partition(".")[0] for name in modules} & HEAVY


# ---------------------------------------------------------------- outlines are what the classes are


@cache
def targets():
    """All classes and functions that configurations name, all of torch's optimizers and schedules, and roles."""
    texts = [path.read_text() for path in sorted(CONFIG_DIR.rglob("*.yaml"))]
    named = {target for text in texts for target in re.findall(r"^ *_target_: (\S+)", text, re.MULTILINE)}
    for room, base in ((torch.optim, torch.optim.Optimizer), (torch.optim.lr_scheduler,) * 2):
        base = getattr(base, "LRScheduler", base)
        named |= {f"{room.__name__}.{n}" for n, kind in vars(room).items() if isinstance(kind, type) and issubclass(kind, base)}
    named |= {"mpp.core.flow.LinearShift", "mpp.core.flow.EmpiricalShift", *mpp.checks.ROLES.values()}
    return sorted(target for target in named if not target.startswith("bitsandbytes."))  # which needs a GPU


def test_an_outline_is_what_the_imported_class_is():
    from tests.outlined import described

    said = child(DESCRIBE, text=json.dumps(targets()))
    assert said.returncode == 0, said.stderr
    outlines, modules = map(json.loads, said.stdout.splitlines())
    assert len(outlines) > 70
    assert not imported(modules)
    for target, found in outlines.items():
        real = json.loads(json.dumps(described(locate(target))))
        if not target.startswith("mpp."):  # torch completes some docstrings, of which nothing is said, and hides rooms
            found["reasons"] = real["reasons"]
            found["bases"][0] = real["bases"][0] if real["bases"][1:] == found["bases"][1:] else found["bases"][0]
        if isinstance(real["hints"], str):  # names that torch imports for type checkers alone
            found["hints"] = real["hints"]
        assert found == real, target
