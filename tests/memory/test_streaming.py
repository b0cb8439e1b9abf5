"""Blocks come when they run, what is learned is bitwise the same, and what would be wrong is seen."""

import random
from dataclasses import replace

import pytest
import torch

from mpp.lora.adapters import Adapter, adapter_state
from mpp.memory import streaming
from mpp.memory.bases import QUANTISED
from mpp.memory.streaming import Streaming, _Block
from mpp.models.contract import draw_sigma
from mpp.models.streamed import streamable
from tests.families import REPRESENTATIVES, variants, wan_first
from tests.families.base import architecture
from tests.helpers import batch, four_masks
from tests.memory.deeper import deeper
from tests.memory.poison import Poison
from tests.memory.streamed import (
    PLAIN,
    PRIOR,
    RESIDENT,
    adapted,
    check,
    data_of,
    learned,
    pair,
    partly,
    same,
    step_of,
    streaming_of,
)  # fmt: skip

NAMED = {variant.name: variant for variant in variants()}
WAN, BOTH = NAMED["WAN 2.1 T2V"], NAMED["WAN 2.2 A14B T2V both"]
LOCKSTEP, OFFLOAD = replace(RESIDENT, teacher="lockstep"), replace(RESIDENT, activations="offload")
_MORE = [pytest.mark.slow, pytest.mark.draws]


def _each():
    """All variants: WAN by default, with `make test-all` one of each kind, with `make draws` the others."""
    kept = {*REPRESENTATIVES, "FLUX.2 dev", "HunyuanVideo 1.5 T2V", "Kandinsky 5 T2V Lite"}
    return [p if p.values[0].name in kept else pytest.param(*p.values, id=p.id, marks=_MORE) for p in wan_first()]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch):
    """The device's memory is not the CPU's."""
    monkeypatch.setattr(streaming, "link_to", lambda device: Poison())


@pytest.fixture
def deep(built, tmp_path):
    """From a variant to its architecture with more blocks than its builder gives it."""
    return lambda variant, seed, blocks=(3, 5): deeper(variant, built(variant), tmp_path / "deep", seed, blocks)


@pytest.fixture(scope="module")
def wan(built, tmp_path_factory):
    """A WAN of four blocks, a batch, and its module with all weights there."""
    arch = deeper(WAN, built(WAN), tmp_path_factory.mktemp("streaming") / "deep", 7, (4, 4))
    return arch, data_of(arch, WAN, 5), adapted(arch)


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize("variant", _each())
def test_loss_and_gradients_are_bitwise_those_of_resident_weights(variant, deep):
    draw = random.Random(variant.name)
    arch = deep(variant, draw.randint(0, 999))
    check(arch, data_of(arch, variant, draw.randint(0, 999)), draw, low=draw.random() < 0.5)


@pytest.mark.parametrize("variant", [pytest.param(*p.values, id=p.id, marks=_MORE) for p in wan_first()])
def test_they_are_on_a_quantised_base(variant, deep):
    draw = random.Random(variant.name)
    arch = deep(variant, draw.randint(0, 999))
    for base in QUANTISED:
        check(arch, data_of(arch, variant, draw.randint(0, 999)), draw, low=draw.random() < 0.5, base=base)


@pytest.mark.slow
@pytest.mark.parametrize("base", QUANTISED)
def test_they_are_on_each_quantised_base(base, wan):
    arch, data, _ = wan
    whole, built = pair(arch, random.Random(base), base=base)
    same(learned(built, data, PRIOR, LOCKSTEP), learned(whole, data, PRIOR, RESIDENT))


@pytest.mark.slow
def test_they_are_on_a_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    from tests.models.test_fp8_file import BY_NAME, arch_of
    from tests.models.test_gguf_file import write

    write(BY_NAME[WAN.name].single_file()[1], tmp_path / "model.gguf")
    arch, memory = arch_of(WAN.name, tmp_path / "model.gguf"), replace(RESIDENT, base="gguf")
    whole, built = adapted(arch, memory), adapted(arch, replace(memory, resident=2))
    data = batch(four_masks())
    same(learned(built, data, PRIOR, LOCKSTEP), learned(whole, data, PRIOR, RESIDENT))
    assert streaming_of(built).loads.total() > 0


@pytest.mark.slow
@pytest.mark.parametrize("resident", [2, 3, 4])
def test_gradients_of_several_batches_add_up(resident, wan):
    arch, data, whole = wan
    _, built = pair(arch, None, resident, whole)
    for loss, memory in ((PLAIN, OFFLOAD), (PRIOR, LOCKSTEP), (PRIOR, RESIDENT)):
        for epochs in ((0, 1), (1,)):
            same(learned(built, data, loss, memory, epochs=epochs), learned(whole, data, loss, RESIDENT, epochs=epochs))


@pytest.mark.parametrize("inference", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_validation_is_the_same_and_leaves_nothing_behind_that_training_would_meet(wan, inference):
    arch, data, whole = wan
    found, (_, built) = [], pair(arch, random.Random(1), whole=whole)
    for module, memory in ((whole, RESIDENT), (built, LOCKSTEP)):
        with torch.inference_mode(inference):
            outputs = [output.sums.stacked() for output in step_of(module, PLAIN, memory).measure(data, 3, [0.2, 0.9])]
        found.append({**learned(module, data, PRIOR, memory), **{f"val {n}": o for n, o in enumerate(outputs)}})
    same(found[1], found[0])


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(4)])
def test_what_an_optimizer_makes_of_it_is_the_same_and_never_comes_back_old(wan, seed):
    arch, data, _ = wan
    draw, found = random.Random(seed), []
    kind = draw.choice(["lora", "dora", "lokr"])
    for memory in (RESIDENT, replace(RESIDENT, resident=draw.randint(2, 3))):
        built = adapted(arch, memory, adapter=Adapter(kind=kind, rank=4, alpha=4))
        moved = streaming_of(built)
        optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=0.01)
        before = {name: tensor.clone() for name, tensor in adapter_state(built.transformer).items()}
        for epochs in ((0, 1), (2,), (3,)):
            learned(built, data, PRIOR, LOCKSTEP if moved else RESIDENT, epochs=epochs)
            optimizer.step()
            if moved and draw.random() < 0.5:
                moved.rest()
        after = adapter_state(built.transformer)
        assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
        found.append({f"transformer.{name}": tensor for name, tensor in after.items()})
    same(found[1], found[0])
    kept = {tensor.untyped_storage().data_ptr() for block in moved._blocks.values() for tensor in block.kept}
    slots = {slot.memory.untyped_storage().data_ptr() for slot in moved._there}
    trained = {p.untyped_storage().data_ptr() for p in built.parameters() if p.requires_grad}
    assert kept
    assert trained.isdisjoint(kept | slots)


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("resident", [pytest.param(n, marks=pytest.mark.slow) for n in ("all", 2, 3, 4)])
def test_experts_change_places_whichever_of_them_a_batch_needs(resident, deep):
    arch = deep(BOTH, 4, (4, 4))
    data, (whole, built) = data_of(arch, BOTH, 2), pair(arch, None, resident)
    shape = tuple(data.latents.shape[1:])
    sides = {}
    for epoch in range(200):
        high = (draw_sigma(arch, data.keys, shape, 0, epoch) >= arch.boundaries[0]).tolist()
        sides.setdefault(tuple(high), epoch)
    epochs = random.Random(resident).sample(sorted(sides.values()), len(sides))
    assert len(epochs) == 4  # both low, both high, one of each
    ways = [LOCKSTEP, RESIDENT, replace(LOCKSTEP, activations="offload"), LOCKSTEP]
    for memory, rows, epoch in zip(ways, ([0], [0, 1], [0, 1], [1]), epochs, strict=True):
        part = partly(data, rows)
        wanted = learned(whole, part, PRIOR, RESIDENT, epochs=[epoch])
        same(learned(built, part, PRIOR, memory, epochs=[epoch]), wanted)


# ---------------------------------------------------------------- what would be wrong is seen


def fetch_nothing(moved, monkeypatch):
    skipped, fetch = list(moved._blocks.values())[2], Streaming._fetch

    def skipping(self, block, running=None):
        fetch(self, block, running)
        if block is skipped:
            block.hold(self._link.waiting(block.kept))

    monkeypatch.setattr(Streaming, "_fetch", skipping)


def wait_for_nothing(moved, monkeypatch):
    monkeypatch.setattr(type(moved._link), "wait", lambda link, slot: None)


def leave_too_early(moved, monkeypatch):
    fetch = Streaming._fetch

    def leaving(self, block, running=None):
        fetch(self, block, running)
        if running is not None:
            self._leave(running.slot)

    monkeypatch.setattr(Streaming, "_fetch", leaving)


def fetch_into_the_running_ones_slot(moved, monkeypatch):
    fetch = Streaming._fetch

    def onto(self, block, running=None):
        if running is None or running.slot not in self._passing or block.home:
            return fetch(self, block, running)
        self._passing.sort(key=lambda slot: slot is not running.slot)
        return fetch(self, block)

    monkeypatch.setattr(Streaming, "_fetch", onto)


@pytest.mark.parametrize("broken", [fetch_nothing, wait_for_nothing, leave_too_early, fetch_into_the_running_ones_slot])
def test_the_gate_catches(broken, wan, monkeypatch):
    arch, data, whole = wan
    _, built = pair(arch, None, 2, whole)
    broken(streaming_of(built), monkeypatch)
    wanted = learned(whole, data, PLAIN, RESIDENT)
    with pytest.raises(AssertionError, match="are others"):
        same(learned(built, data, PLAIN, RESIDENT), wanted)


def test_fetching_in_the_wrong_direction_is_only_slow(wan, monkeypatch):
    arch, data, whole = wan
    (_, built), late = pair(arch, None, 2, whole), []
    coming, fetch = _Block.coming, Streaming._fetch

    def counting(self, block, running=None):
        late[-1] += running is None
        fetch(self, block, running)

    monkeypatch.setattr(Streaming, "_fetch", counting)
    for known in (True, False):
        right = lambda block, *, backward, known=known: coming(block, backward=backward and known)  # noqa: E731
        monkeypatch.setattr(_Block, "coming", right)
        late.append(0)
        same(learned(built, data, PLAIN, RESIDENT), learned(whole, data, PLAIN, RESIDENT))
    assert late == [1, 2]  # the first block of all; backward, the two that were not there from the forward pass


def everywhere(arch):
    """An adapter on all linear layers of all blocks, so that each of them has something to compute again."""
    skeleton = arch.skeleton()
    blocks = tuple(f"{name}." for name, _ in arch.blocks(skeleton))
    layers = [
        name for name, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith(blocks)
    ]
    parts = [f"{part}." for part in arch.folders if part]
    return Adapter(
        rank=2, alpha=2, targets=[name.removeprefix(next(filter(name.startswith, parts), "")) for name in layers]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HunyuanVideo T2V", "HunyuanVideo 1.5 T2V"])
def test_the_gate_catches_a_block_that_is_not_computed_again(name, deep, monkeypatch):
    arch, adapter = deep(NAMED[name], 1), Adapter(rank=2, alpha=2, targets=r"context_embedder\..*(to_q|to_k|linear_2)")
    data, made = data_of(arch, NAMED[name], 3), {"adapter": adapter}
    wanted = learned(adapted(arch, **made), data, PLAIN, RESIDENT)
    streamed = replace(RESIDENT, resident=random.Random(name).choice((2, 3)))
    same(learned(adapted(arch, streamed, **made), data, PLAIN, RESIDENT), wanted)
    monkeypatch.setattr(type(arch), "kept", ())
    with pytest.raises(AssertionError, match="are others"):
        same(learned(adapted(arch, streamed, **made), data, PLAIN, RESIDENT), wanted)


@pytest.mark.parametrize("variant", _each())
def test_the_blocks_that_may_wait_are_those_that_are_computed_again(variant, built):
    arch = architecture(variant, built(variant))
    module, again = adapted(arch, adapter=everywhere(arch)), set()
    for name, block in arch.blocks(module.transformer):
        backward = lambda *_, name=name: again.add(name) if torch._C._current_graph_task_id() != -1 else None  # noqa: E731
        block.register_forward_pre_hook(backward)
    data = data_of(arch, variant, 1)
    for epoch in range(8 if arch.boundaries else 1):
        learned(module, data, PLAIN, RESIDENT, epochs=[epoch])
    may_wait = {block for group in streamable(arch, module.transformer) for block in group}
    assert again == {name for name, block in arch.blocks(module.transformer) if block in may_wait}
