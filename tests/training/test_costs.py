"""What is counted without weights is what is there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.counting import flops
from mpp.config import build
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.memory.counting import Meter, bytes_of
from mpp.memory.settings import Memory
from mpp.models.published import PUBLISHED
from mpp.training.costs import Costing
from mpp.training.measuring import Run
from mpp.training.step import Position
from tests.families import base, variants, wan_first
from tests.helpers import batch, config, loss_of, module

PRIOR = MaskedPriorLoss(1.0, 0.1, normalization="per_sample")
SHAPE = (16, 2, 8, 12)


def run_of(arch, loss=PRIOR, precision="32-true", **memory):
    return Run(arch, Adapter(rank=4, alpha=4), Memory(**memory), loss, torch.optim.AdamW, precision)


def drawn(count=2):
    masks = torch.ones(count, 1, *SHAPE[1:])
    masks[..., 6:] = 0
    return batch(masks)


def record(data):
    return type(data.conditioning)(data.conditioning.text[0])


@pytest.mark.parametrize("activations", ["keep", "checkpoint"])
def test_bytes_and_flops_are_those_of_a_real_step(architecture, activations):
    run, data = run_of(architecture, activations=activations), drawn()
    counted = Costing(run).count(SHAPE, len(data), record(data))
    built = module(architecture, PRIOR, memory=run.memory)
    frozen = [p for p in built.parameters() if not p.requires_grad]
    trained = [p for p in built.parameters() if p.requires_grad]
    assert counted.base == bytes_of([*frozen, *built.transformer.buffers()])
    assert counted.adapter == counted.gradients == sum(p.numel() * 4 for p in trained)
    meter = Meter()
    meter.known([*built.parameters(), *built.transformer.buffers(), data.conditioning.text])
    with meter:
        output = built.step(data, Position(0, 0))
        loss = built.loss.terms(output.sums).total
        loss.backward()
    latents = bytes_of([data.latents])  # which were there before; noise is drawn in the real step alone
    assert counted.step == pytest.approx(latents + max(meter.peaks.values()), rel=0.01)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert counted.optimizer == bytes_of(value for state in optimizer.state.values() for value in state.values())
    plain = flops(lambda: loss_of(module(architecture, MaskedPriorLoss(), memory=run.memory), data).backward())
    whole = flops(lambda: loss_of(module(architecture, PRIOR, memory=run.memory), data).backward())
    assert (counted.plain, counted.plain + counted.prior) == (plain, whole)


def test_offloaded_activations_leave_the_device(architecture):
    kept, recomputed, offloaded = (
        Costing(run_of(architecture, activations=name)).count(SHAPE, 2) for name in ("keep", "checkpoint", "offload")
    )
    assert kept.saved > recomputed.saved > offloaded.saved
    assert kept.peak > recomputed.peak > offloaded.peak
    assert kept.plain < recomputed.plain == offloaded.plain


def longer(folder, target, **numbers):
    """The configuration of a tiny pipeline with more blocks; no weights are there."""
    target.mkdir(parents=True)
    shutil.copytree(folder / "transformer", target / "transformer", ignore=lambda *_: ["*.safetensors"])
    file = target / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **numbers}))
    return target


LONGER = {
    "WAN 2.1 T2V": {"num_layers": 7},
    "FLUX.1 dev": {"num_layers": 5, "num_single_layers": 6},
    "HunyuanVideo T2V": {"num_layers": 5, "num_single_layers": 6},
    "Z-Image": {"n_layers": 6},
    "Qwen-Image": {"num_layers": 5},
    "LTX-2": {"num_layers": 5},
}


_MORE = [pytest.mark.slow, pytest.mark.draws]


def _longer():
    """Those of two lists of blocks, which are counted over and over, with `make draws`."""
    params = wan_first(of=lambda variant: variant.name in LONGER)
    return [p if len(LONGER[p.values[0].name]) == 1 else pytest.param(*p.values, id=p.id, marks=_MORE) for p in params]


@pytest.mark.parametrize("variant", _longer())
@pytest.mark.parametrize("activations", ["checkpoint", pytest.param("keep", marks=_MORE)])
def test_few_blocks_tell_of_many_exactly(variant, activations, built, tmp_path):
    folder = longer(built(variant), tmp_path / "long", **LONGER[variant.name])
    arch = base.architecture(variant, folder, "model.dtype=bfloat16")
    run = run_of(arch, precision="bf16-mixed", activations=activations, base="fp8")
    shape = arch.latents.shape(variant.frames, 64, 96)
    few, whole = Costing(run), Costing(run, whole=True)
    assert few.few
    assert not whole.few
    assert few.count(shape) == whole.count(shape)


def test_adapters_on_some_blocks_alone_are_counted_whole(built, tmp_path):
    variant = next(variant for variant in variants() if variant.name == "WAN 2.1 T2V")
    arch = base.architecture(variant, longer(built(variant), tmp_path / "long", num_layers=7))
    run = Run(arch, Adapter(targets=r"blocks\.[45]\..*to_q"), Memory(), PRIOR, torch.optim.AdamW)
    assert not Costing(run).few


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs/model").glob("*.yaml")))
def test_published_shapes_have_the_parameters_that_the_guide_has(name):
    arch = build(config("train", [f"model={name}", "data.cache_dir=x"]).model)
    if arch.pretrained not in PUBLISHED:
        if name not in ("tiny_wan", "toy"):  # which make their own
            with pytest.raises(ValueError, match="model.pretrained"):
                arch.skeleton(published=True)
        return
    said = re.search(rf"^\| `{name}` \| `.*?` \| (two of )?([\d.]+) B", Path("docs/quickstarts.md").read_text(), re.M)
    parameters = sum(p.numel() for p in arch.skeleton(published=True).parameters())
    assert said is None or round(parameters / (2 if said[1] else 1) / 1e9, 2) == float(said[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "size", "teacher", "ratio", "saved"),
    [(1, (480, 832), 0.042, 1.328, 0.63), (81, (480, 832), 1.678, 1.263, 13.1), (81, (720, 1280), 6.523, 1.245, 30.3)],
)
def test_wan_14b_comes_to_what_was_counted_by_hand(frames, size, teacher, ratio, saved):
    arch = build(config("train", ["model=wan_14b", "data.cache_dir=x"]).model)
    costs = Costing(run_of(arch, precision="bf16-mixed")).count(arch.latents.shape(frames, *size))
    assert costs.prior / 1e15 == pytest.approx(teacher, abs=5e-4)
    assert 1 + costs.prior / costs.plain == pytest.approx(ratio, abs=5e-3)
    assert costs.saved / 2**30 == pytest.approx(saved, rel=0.02)
    assert costs.base / 2**30 == pytest.approx(26.61, abs=0.1)
