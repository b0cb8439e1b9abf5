"""While a quantised base is loaded, no more of it is in memory than the quantised model and one block."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from mpp.memory.bases import QUANTISED

BLOCKS, DIM, HIDDEN = 6, 1024, 8960

# Anonymous memory, which is what no file gives back: sampled at each moment that a thread gets.
CODE = """
import json, sys, threading, time
from mpp.config import build
from mpp.lora.stack import load_base
from mpp.models.families.wan import Wan
import bitsandbytes, torch

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

arch = Wan(pretrained=sys.argv[1])
torch.ones(100, 100) @ torch.ones(100, 100)
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
transformer = load_base(arch, sys.argv[2])
done = True
thread.join()
tensors = [*transformer.parameters(), *transformer.buffers()]
held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
print(json.dumps([held, most - before]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer in float32, as WAN's are published, of a size that matters."""
    root = tmp_path_factory.mktemp("big")
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=DIM // 8, ffn_dim=HIDDEN, num_layers=BLOCKS, text_dim=64, freq_dim=64
    ).save_pretrained(root / "transformer", max_shard_size="100MB")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTISED)
def test_loading_takes_the_quantised_model_and_one_block(folder, base):
    run = [sys.executable, "-c", CODE, str(folder), base]
    heap = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed goes back, as large tensors do
    ended = subprocess.run(run, check=True, capture_output=True, text=True, env=heap)
    held, most = json.loads(ended.stdout.splitlines()[-1])
    numbers = BLOCKS * (8 * DIM * DIM + 2 * DIM * HIDDEN)  # of the blocks' linear layers
    least = numbers * (0.5 + 4 / 64) if base == "nf4" else numbers
    assert least < held < least + 40e6  # embedders, norms and modulation in bfloat16, scales
    block = 2 * numbers / BLOCKS  # in bfloat16
    slack = 40e6  # of the allocator, and of one layer in float32 by parts
    assert held - slack < most < held + block + slack
    assert most < 2 * numbers  # what the whole would be in bfloat16


@pytest.mark.slow
def test_a_base_without_safetensors_is_refused_with_the_way(folder, tmp_path):
    from mpp.lora.stack import load_base
    from mpp.models.families.wan import Wan

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.safetensors in transformer.*memory\.base=bf16"):
        load_base(Wan(pretrained=str(tmp_path)), "fp8")


@pytest.mark.slow
def test_a_base_with_missing_or_other_tensors_is_refused(architecture, tmp_path):
    from safetensors.torch import load_file

    from mpp.lora.stack import load_base
    from mpp.models.families.wan import Wan

    source = f"{architecture.pretrained}/transformer"
    state = load_file(f"{source}/diffusion_pytorch_model.safetensors")
    target = tmp_path / "transformer"
    target.mkdir()
    shutil.copy(f"{source}/config.json", target)
    for change, word in ((("drop", 1), "lacks 1 tensors"), (("add", 1), "has 1 others, such as stray")):
        changed = dict(state)
        if change[0] == "drop":
            changed.pop("blocks.0.attn1.to_q.weight")
        else:
            changed["stray"] = torch.zeros(1)
        save_file(changed, target / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=word):
            load_base(Wan(pretrained=str(tmp_path)), "int8")
