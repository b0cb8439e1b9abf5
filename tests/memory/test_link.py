"""The way of weights to a GPU, on a simulated one: whatever order its streams choose, results are the same."""

import gc
import logging
import random
import shutil
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpp.core.loss import MaskedPriorLoss
from mpp.memory import streaming
from mpp.memory.link import GpuLink, Link, Slot, check_link, layout_bytes
from mpp.memory.settings import Memory
from mpp.memory.streaming import Streaming
from mpp.training.lockstep import Lockstep
from tests.families import base, variants
from tests.helpers import loss_of, module, randomise_adapter, unchecked_error
from tests.memory.deeper import deepen
from tests.memory.simulated_gpu import Gpu, Stream

WIDTH = 6


class Block(nn.Module):
    """Frozen weights of several kinds, odd strides and no numbers at all among them, or none; and a trained layer."""

    def __init__(self, draw):
        super().__init__()
        inner = draw.randint(1, 40)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.up = self.down = None
        if draw.random() < 0.85:
            self.up = nn.Parameter(torch.randn(inner, WIDTH), requires_grad=False)
            self.down = nn.Parameter(torch.randn(inner, WIDTH).t(), requires_grad=False)
            self.register_buffer("scale", torch.tensor(draw.randint(1, 3)))
            self.register_buffer("shift", torch.randn(WIDTH, dtype=torch.float64).bfloat16())
            self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x):
        y = torch.tanh(self.adapter(x))
        if self.up is None:
            return y
        return torch.tanh(self.down @ torch.relu(self.up @ y.t())).t() * self.scale + self.shift + x


def transformers(seed):
    """One or two lists of blocks, of which several may be there at once."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups = [[Block(draw) for _ in range(draw.randint(3, 7))] for _ in range(draw.choice([1, 1, 2]))]
    return groups, draw.choice([2, 3, 4, None] if len(groups) > 1 else [2, 3, 4])


def forward(group, x, *, recompute, reentrant=False):
    for block in group:
        x = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
    return x


def teacher(group, x):
    with torch.no_grad():
        return forward(group, x, recompute=False)


def course(groups, seed, streams=None):
    """Results of drawn passes: a teacher's, a student's with its gradients, a validation's."""
    draw, results = random.Random(seed), []
    for _ in range(6):
        group, x = (
            draw.choice(groups),
            torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(draw.randint(0, 9))),
        )
        kind = draw.choice(["teacher", "student", "lockstep", "validation"])
        reentrant, aside = draw.random() < 0.5, draw.random() < 0.3
        with streams.elsewhere(really=aside) if streams else nullcontext():
            if kind == "student":
                y = forward(group, x.requires_grad_(), recompute=True, reentrant=reentrant)
            elif kind == "lockstep":
                with Lockstep(partial(teacher, group, x.clone()), nn.ModuleList(group), group, x.device) as lockstep:
                    y = forward(group, x.requires_grad_(), recompute=True, reentrant=reentrant)
                    results.append(lockstep.answer())
            if kind in ("student", "lockstep"):
                (y**2).sum().backward()
                results += [y.detach(), *(p.grad.clone() for block in group for p in block.adapter.parameters())]
            else:
                with torch.no_grad() if kind == "teacher" else torch.inference_mode():
                    results.append(forward(group, x, recompute=False).clone())
        if draw.random() < 0.2 and streams:
            streams.streaming.rest()
    return results


class Streams:
    """A simulated GPU with transformers on it."""

    def __init__(self, gpu, groups, resident):
        self.gpu, self.streaming = gpu, Streaming(groups, resident)

    @contextmanager
    def elsewhere(self, *, really):
        """On a stream of the user's own, which waits for the default one and is waited for."""
        other = Stream(self.gpu) if really else self.gpu.default
        other.wait_stream(self.gpu.default)
        with self.gpu.on(other):
            yield
        self.gpu.default.wait_stream(other)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(streaming, "link_to", GpuLink)
    return Gpu().install(monkeypatch)


def raced(gpu, seed):
    """What went wrong in a drawn course, whose results are those of resident weights."""
    groups, resident = transformers(seed)
    with gpu:
        streams = Streams(gpu, groups, resident)
        found = course(groups, seed, streams)
        streams.streaming.rest()
        del groups, streams
        gc.collect()
    assert not gpu.regions  # all is given back, and no longer pinned
    want = course(transformers(seed)[0], seed)
    if not gpu.races:
        assert len(found) == len(want)
        assert all(map(torch.equal, found, want))
    return gpu.races


@pytest.mark.parametrize("seed", range(12))
def test_in_whatever_order_the_gpu_works_results_are_those_of_resident_weights(gpu, seed):
    assert raced(gpu, seed) == []
    assert gpu.copied


@pytest.mark.slow  # the same, drawn more often
@pytest.mark.parametrize("seed", range(100, 150))
def test_in_whatever_order_the_gpu_works_results_are_those_of_resident_weights_often(gpu, seed):
    assert raced(gpu, seed) == []


def no_wait(monkeypatch):
    monkeypatch.setattr(GpuLink, "wait", lambda *_: None)


def copy_at_once(monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda *_: None)


def into_the_running_slot(monkeypatch):
    def fetch(self, block, running=None):
        if running is not None and running.home is None and block.home is None:
            self._passing.sort(key=lambda slot: slot is not running.slot)
        whole(self, block)

    whole = Streaming._fetch
    monkeypatch.setattr(Streaming, "_fetch", fetch)


def behind_the_default_stream(monkeypatch):
    current = torch.cuda.current_stream(None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)


FAULTS = (copy_at_once, into_the_running_slot, behind_the_default_stream)


@pytest.mark.parametrize("fault", [no_wait, *(pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS)])
def test_a_link_that_does_not_wait_is_found(gpu, monkeypatch, fault):
    fault(monkeypatch)
    found = 0
    for seed in range(5):
        gpu.races.clear()
        found += bool(raced(gpu, seed))
    assert found > 1


class Ended(Exception):  # noqa: N818
    """Of a pass."""


def after_a_pass_that_ended(gpu, seed):
    """What went wrong where a pass fails on its way, and the device is to be free for others."""
    groups, resident = transformers(seed)

    def end(*_):
        raise Ended

    with gpu:
        streams, group = Streams(gpu, groups, resident), groups[0]
        random.Random(seed).choice(group[:-1]).register_forward_hook(end)
        with pytest.raises(Ended):
            teacher(group, torch.randn(3, WIDTH))
        streams.streaming.rest()
        del groups, group, streams
        gc.collect()
    assert not gpu.regions
    return gpu.races


def test_memory_has_no_other_owner_before_what_is_on_its_way_has_come(gpu, monkeypatch):
    assert not [fault for seed in range(6) for fault in after_a_pass_that_ended(gpu, seed)]

    def free(self, slot):
        slot.memory = slot.arrived = None

    monkeypatch.setattr(GpuLink, "free", free)
    monkeypatch.setattr(Stream, "synchronize", lambda _: None)
    assert {fault for seed in range(6) for fault in after_a_pass_that_ended(gpu, seed)} == {
        "a slot's memory has another owner while a copy writes it", "memory is unpinned while a copy reads it"
    }  # fmt: skip


@pytest.mark.parametrize("fails_at", [0, 2])
def test_what_cannot_be_pinned_is_said_once_and_comes_all_the_same(monkeypatch, caplog, fails_at):
    monkeypatch.setattr(streaming, "link_to", GpuLink)
    gpu = Gpu(fails_at=fails_at).install(monkeypatch)
    told, ones = [], torch.ones

    def computed(*size, **settings):
        told.append(size)
        raise RuntimeError("CUDA error: out of memory")  # as CUDA says of what comes after one that nobody asked for

    monkeypatch.setattr(torch, "ones", computed)
    with caplog.at_level(logging.WARNING, logger="mpp"):
        assert raced(gpu, 3) == []
    monkeypatch.setattr(torch, "ones", ones)
    (record,) = caplog.records
    assert "could not be pinned beyond 0.0 GiB (CUDA error 1)" in record.message
    assert len(told) == 1
    assert bool(gpu.copied) == bool(fails_at)


def test_one_copy_brings_a_block(gpu):
    groups, _ = transformers(5)
    (group, *_), draw = groups, random.Random(5)
    tensors = [t.detach() for block in group for t in (*block.parameters(), *block.buffers())]
    draw.shuffle(tensors)
    with gpu:
        link = GpuLink(torch.device("cpu"))
        kept, slot = link.keep(tensors), Slot(layout_bytes(tensors) + draw.randint(0, 999))
        there = link.fetch(kept, slot)
    assert all(map(torch.equal, there, tensors))
    assert gpu.copied == [layout_bytes(tensors)]
    assert {t.untyped_storage().data_ptr() for t in there if t.numel()} == {slot.memory.data_ptr()}


# ---------------------------------------------------------------- other devices


def test_weights_come_to_a_device_that_is_no_gpu_of_cuda_too():
    weights, link = [torch.ones(3), torch.ones(2, dtype=torch.int8)], Link(torch.device("meta"))
    kept = link.keep(weights)
    with torch.inference_mode():
        there = link.fetch(kept, Slot(0))
    assert [(t.shape, t.dtype, t.is_meta, t.is_inference()) for t in there] == [
        (t.shape, t.dtype, True, False) for t in weights
    ]
    assert all(map(torch.equal, link.waiting(kept), weights))
    on_the_cpu = Link(torch.device("cpu")).fetch(kept, Slot(0))
    assert all(a is b for a, b in zip(on_the_cpu, kept, strict=True))


def test_fewer_resident_blocks_are_refused_where_they_would_save_nothing():
    for resident, device in (("all", "mps"), ("all", "cuda"), (4, "cuda"), (4, "cpu")):
        check_link(resident, torch.device(device))
    error = unchecked_error(check_link, 4, torch.device("mps"))
    assert "memory.resident=4 is for CUDA GPUs" in error
    assert "on this device (mps) set memory.resident=all" in error


# ---------------------------------------------------------------- a real transformer


@pytest.mark.slow  # some seconds
@pytest.mark.parametrize("seed", range(8))
def test_a_real_transformer_learns_on_a_gpu_what_it_learns_with_resident_weights(gpu, built, tmp_path, seed):
    draw = random.Random(seed)
    weights, activations = draw.choice(["bf16", "fp8", "nf4"]), draw.choice(["checkpoint", "offload"])
    memory = Memory(weights, activations, draw.choice([2, 3]), draw.choice(["apart", "lockstep"]))
    variant = next(variant for variant in variants() if variant.name == "WAN 2.1 T2V")
    folder = tmp_path / "model"
    shutil.copytree(built(variant), folder)
    arch = base.architecture(variant, folder)
    deepen(arch, folder, seed)
    data = base.batch(arch, variant, arch.load_encoders("cpu"), ["a red box", "a box by the sea"])
    with gpu:
        found = learnt(arch, data, memory)
        gc.collect()
    assert gpu.races == []
    assert gpu.copied
    want = learnt(arch, data, Memory(weights, resident="all"))
    assert len(found) == len(want) > 20
    assert all((a is b) or torch.equal(a, b) for a, b in zip(found, want, strict=True))


def learnt(arch, data, memory):
    made = module(arch, MaskedPriorLoss(1.0, 0.1, normalization="per_sample"), memory=memory)
    randomise_adapter(made.transformer)
    for _ in range(2):
        total = loss_of(made, data)
        total.backward()
    return [total.detach(), *(p.grad for p in made.parameters() if p.requires_grad)]
