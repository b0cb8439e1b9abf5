"""While samples are generated, nobody but a block asks for the block's weights, which may wait on another device."""

import shutil
from collections import Counter

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mpp.memory import streaming
from mpp.models.experts import parts_of
from mpp.models.streamed import stream
from tests.families import REPRESENTATIVES, wan_first
from tests.families.base import architecture
from tests.helpers import module, randomise_adapter
from tests.memory.deeper import deepen
from tests.memory.poison import Poison
from tests.models.test_contract import conditioning_for, generation_of

MORE = [pytest.mark.slow, pytest.mark.draws]
VARIANTS = [
    case if case.values[0].name in REPRESENTATIVES else pytest.param(*case.values, id=case.id, marks=MORE)
    for case in wan_first()
]
SAME_EVERYWHERE = {"shape", "dtype", "requires_grad", "ndim", "numel", "size", "dim", "is_floating_point"}


class Asked(TorchFunctionMode):
    """Counts what is asked of weights that wait, but for what is the same on every device."""

    def __init__(self, moved):
        super().__init__()
        self.moved, self.counts = moved, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        attribute = function.__name__ == "__get__"  # of a property such as Tensor.device
        name = function.__self__.__name__ if attribute else function.__name__
        waiting = {id(t) for block in self.moved._blocks.values() if block.slot is None for t in block.weights}
        given = [one for group in (*args, *(kwargs or {}).values()) for one in _flat(group)]
        if name not in SAME_EVERYWHERE and any(id(one) in waiting for one in given):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _flat(group):
    return group if isinstance(group, list | tuple) else [group]


@pytest.fixture
def unasked(monkeypatch):
    """What is not there is no number; and what brings it is not counted as asking."""
    enter = streaming.Streaming._enter

    def quiet(self, *given):
        with torch._C.DisableTorchFunction():
            return enter(self, *given)

    monkeypatch.setattr(streaming.Streaming, "_enter", quiet)
    monkeypatch.setattr(streaming, "link_to", lambda _: Poison())


@pytest.mark.usefixtures("unasked")
def test_who_asks_for_a_weight_that_waits_is_counted():
    blocks = [nn.Linear(4, 4).requires_grad_(False) for _ in range(4)]
    moved, x = streaming.Streaming([blocks], 2), torch.ones(1, 4)
    with torch.no_grad(), Asked(moved) as asked:
        for block in blocks:
            x = block(x)
    assert not asked.counts
    with Asked(moved) as asked:
        assert blocks[0].weight.shape == (4, 4)
        assert blocks[0].weight.device.type == "cpu"
        nn.functional.linear(x, blocks[1].weight)
    assert asked.counts == {"device": 1, "linear": 1}


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_those_of_weights_that_stay_and_ask_nothing_of_those_that_wait(variant, built, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(built(variant), folder)
    deepen(architecture(variant, folder), folder, 3)
    arch = architecture(variant, folder)
    arch.offload = False
    encoders, generation = arch.load_encoders("cpu"), generation_of(arch, variant)
    record = arch.collate([conditioning_for(arch, variant, encoders, "a red box", generation)])
    transformer = module(arch).transformer.eval().requires_grad_(False)
    randomise_adapter(transformer)
    wanted = arch.generate(transformer, encoders, record, None, generation)
    moved = stream(arch, transformer, 2)
    with Asked(moved) as asked:
        found = arch.generate(transformer, encoders, record, None, generation)
        for _, part in parts_of(transformer):
            assert part.device.type == "cpu"  # diffusers' pipelines compute where this says
    assert wanted.std() > 0
    assert torch.equal(found, wanted)
    assert sum(moved.loads.values()) > generation.steps
    assert not asked.counts
