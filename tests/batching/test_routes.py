"""Batches of samples that share images' shapes and, with experts, the expert."""

import itertools

import pytest
import torch

from mpp.batching.loader import BatchOrder
from mpp.cache.index import Entry
from mpp.core.flow import SigmaLaw


def entry(key, shape=(16, 3, 4, 4), **images):
    return Entry(key, "train", shape, "t", "c", None, images=images)


def test_samples_with_other_images_never_share_a_batch():
    entries = [
        entry("a"),
        entry("b", image=(16, 1, 4, 4)),
        entry("c", image=(16, 1, 4, 4)),
        entry("d", image=(16, 1, 8, 4)),
        entry("e"),
    ]
    order = BatchOrder([e.signature() for e in entries], 4, seed=0)
    batches = sorted(sorted(entries[i].key for i in batch) for batch in order.epoch_batches())
    assert batches == [["a", "e"], ["b", "c"], ["d"]]


def test_given_frames_are_no_part_of_what_is_shared():
    assert entry("a").signature(1) == (16, 2, 4, 4)
    assert entry("a", x=(3, 1)).signature(1) == (16, 2, 4, 4, ("x", 3, 1))


def law(index, epoch):
    (sigma,) = SigmaLaw().draw([f"s{index}"], 7, epoch, 16).tolist()
    return int(sigma >= 0.6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 5, 16])
def test_each_batch_is_one_experts_and_an_epoch_has_each_sample_once_in_equally_many_batches(samples, size):
    order = BatchOrder([(16, 1, 4, 4)] * samples, size, seed=0, routes=2, route=law)
    for epoch in range(20):
        order.set_epoch(epoch)
        batches = order.epoch_batches()
        assert len(batches) == len(order)
        assert sorted(i for batch in batches for i in batch) == list(range(samples))
        routes = [{law(i, epoch) for i in batch} for batch in batches]
        assert all(len(found) == 1 for found in routes)
        swaps = sum(a != b for a, b in itertools.pairwise(routes))
        assert swaps <= 1  # weights of 28 GB move at most once in an epoch


def test_a_batch_that_is_divided_for_the_number_is_divided_evenly():
    order = BatchOrder([(16, 1, 4, 4)] * 16, 8, seed=0, routes=2, route=lambda *_: 0)
    assert sorted(len(batch) for batch in order.epoch_batches()) == [4, 4, 8]


def test_the_expert_at_the_end_of_an_epoch_goes_on_in_the_next():
    order = BatchOrder([(16, 1, 4, 4)] * 16, 2, seed=0, routes=2, route=law)
    ends = []
    for epoch in range(4):
        order.set_epoch(epoch)
        batches = order.epoch_batches()
        ends.append((law(batches[0][0], epoch), law(batches[-1][0], epoch)))
    assert [last for _, last in ends[:-1]] == [first for first, _ in ends[1:]]


def test_one_expert_changes_nothing():
    shapes = [(16, 1, 4, 4)] * 7 + [(16, 1, 2, 8)] * 3
    plain = BatchOrder(shapes, 2, seed=3)
    routed = BatchOrder(shapes, 2, seed=3, routes=1, route=lambda *_: pytest.fail("asked"))
    assert plain.epoch_batches() == routed.epoch_batches()


def test_the_draw_is_the_quantile_of_the_samples_own_uniform():
    from mpp.core import draws

    chosen = SigmaLaw("logit_normal", shift=3.0)
    got = chosen.draw(["a", "b"], 5, 2, 16)
    want = [float(chosen.quantile(draws.uniform(5, 2, key)[None], 16)) for key in ("a", "b")]
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert got.dtype == torch.float32
