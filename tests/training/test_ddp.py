"""Two processes against one: the same draws, the same gradient."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import sys, json
import torch
torch.set_num_threads(1)
from mpp.core import draws
draws.order = lambda count, *_: list(range(count))
from tests.helpers import train
pipeline, cache, out, *overrides = json.loads(sys.argv[1])
train(pipeline, cache, out, *overrides)
"""


def run(arguments):
    import json

    script = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    return subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def launch(arguments, ranks):
    import json

    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "--no-python",
    ]
    command += [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["global", "per_sample"])
def test_two_ranks_and_accumulation_have_the_gradient_of_one_big_batch(pipeline, prepared, tmp_path, normalization):
    cache = tmp_path / "cache"
    shutil.copytree(prepared, cache)
    lines = (cache / "index.jsonl").read_text().splitlines()
    (cache / "index.jsonl").write_text("".join(line + "\n" for line in lines if "[16, 1, 8, 8]" in line))
    base = [
        "loss=continuous", f"loss.normalization={normalization}", "trainer.max_steps=2",
        "trainer.gradient_clip_val=null", "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1",
        "callbacks.ema.decay=0.5",
    ]  # fmt: skip
    big = run([pipeline, str(cache), str(tmp_path / "big"), *base, "data.batch_size=4"])
    assert big.returncode == 0, big.stderr[-2000:]
    parts = launch(
        [pipeline, str(cache), str(tmp_path / "parts"), *base, "data.batch_size=1", "trainer.strategy=ddp",
         "trainer.devices=2", "trainer.accumulate_grad_batches=2"], 2,
    )  # fmt: skip
    assert parts.returncode == 0, parts.stderr[-2000:]
    for file in ("lora.safetensors", "lora_ema.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("big", "parts"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-7)
