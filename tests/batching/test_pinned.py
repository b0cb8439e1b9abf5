"""What of a batch lies in page-locked memory, by a stand-in: without a GPU there is none."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

import mpp.models.families
from mpp.batching.batch import Batch
from mpp.core.loss import MaskedPriorLoss
from mpp.models.conditioning import Conditioning

FAMILIES = sorted(path.stem for path in Path(mpp.models.families.__file__).parent.glob("[!_]*.py"))


def records():
    """Every family's record with all of its fields."""
    for name in FAMILIES:
        import_module(f"mpp.models.families.{name}")
    for kind in Conditioning.__subclasses__():
        several = [field.name for field in fields(kind) if "tuple" in str(field.type)]
        yield kind(**{f.name: (torch.ones(1, 2),) * 2 if f.name in several else torch.ones(1, 2) for f in fields(kind)})


@pytest.fixture
def pinned(monkeypatch):
    """Tensors that were pinned."""
    found = []

    def pin(tensor, *_):
        found.append(tensor.clone())
        return found[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return found


def held(tensors, found):
    return all(any(tensor is one for one in found) for tensor in tensors)


def test_every_tensor_of_every_familys_batch_is_pinned(pinned):
    kinds = set()
    for record in records():
        mask = torch.ones(1, 1, 1, 2, 2)
        batch = pin_memory(Batch(("a",), torch.zeros(1, 4, 1, 2, 2), mask, record, host_mask=mask))
        conditioning = batch.conditioning.tensors()
        assert conditioning.keys() == record.tensors().keys()
        assert held([batch.latents, batch.mask, batch.host_mask, *conditioning.values()], pinned), type(record)
        assert batch.host_mask is batch.mask  # one copy
        kinds.add(type(record))
    assert len(kinds) >= len(FAMILIES) - 2  # the toy and WAN share theirs


def test_a_batch_without_a_mask_of_its_own_for_the_host_stays_without(pinned):
    mask, record = torch.ones(1, 1, 1, 2, 2), next(records())
    assert Batch(("a",), torch.zeros(1, 4, 1, 2, 2), mask, record).pin_memory().host_mask is None
    assert pinned


def test_weights_go_to_a_gpu_from_pinned_memory_and_elsewhere_from_where_they_are(pinned, monkeypatch):
    weights, sent = MaskedPriorLoss(1.0).weights(torch.rand(2, 1, 1, 4, 4)), []
    weights.to("cpu")
    assert pinned == []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: sent.append(tensor) or tensor)
    weights.to(torch.device("cuda", 0))
    assert len(sent) == 3
    assert held(sent, pinned)
