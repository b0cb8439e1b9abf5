import shutil
from collections import Counter

import pytest
import torch

from mpp.batching.batch import Collate
from mpp.batching.datamodule import CachedSamples, LatentDataModule, split_entries
from mpp.batching.loader import BatchOrder, TrainLoader, ValidationLoader
from mpp.cache.format import Cache
from mpp.cache.index import Entry, Index
from tests import helpers

SHAPES = [(16, 1, 8, 8)] * 7 + [(16, 1, 4, 8)] * 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_is_seen_once_per_epoch_by_some_rank(batch_size, world):
    orders = [BatchOrder(SHAPES, batch_size, seed=0, rank=r, world_size=world) for r in range(world)]
    batches = [order.epoch_batches() for order in orders]
    assert {len(b) for b in batches} == {len(orders[0])}
    seen = Counter(index for rank in batches for batch in rank for index in batch)
    assert set(seen) == set(range(len(SHAPES)))
    repeats = sum(seen.values()) - len(SHAPES)
    assert repeats <= (world - 1) * batch_size
    for batch in (batch for rank in batches for batch in rank):
        assert len(batch) <= batch_size
        assert len({SHAPES[index] for index in batch}) == 1


@pytest.mark.parametrize("world", [2, 4, 8, 13])
def test_no_batch_is_repeated_more_often_than_filling_up_the_ranks_needs(world):
    ranks = [BatchOrder(SHAPES, 3, seed=0, rank=rank, world_size=world).epoch_batches() for rank in range(world)]
    counts = Counter(tuple(batch) for batches in ranks for batch in batches)
    assert len(counts) == 5
    assert max(counts.values()) - min(counts.values()) <= 1


def test_order_changes_with_epoch_and_seed_only():
    def epoch(seed, number):
        order = BatchOrder(SHAPES, 2, seed)
        order.set_epoch(number)
        return order.epoch_batches()

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)


def test_loader_goes_on_at_the_very_next_batch(prepared, architecture):
    def loader():
        data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), batch_size=1)
        data.setup()
        return data.train_dataloader()

    straight = loader()
    everything = []
    for epoch in range(3):
        straight.sampler.set_epoch(epoch)
        everything += [batch.keys for batch in straight]
    for stop in (1, 5, len(straight), len(straight) + 2):
        first = loader()
        seen = []
        for epoch in range(3):
            first.sampler.set_epoch(epoch)
            for batch in first:
                seen.append(batch.keys)
                if len(seen) == stop:
                    break
            if len(seen) == stop:
                break
        second = loader()
        second.load_state_dict(first.state_dict())
        while len(seen) < len(everything):
            if second.sampler.position >= len(second):
                second.sampler.set_epoch(second.sampler.epoch + 1)
            seen += [batch.keys for batch in second]
        assert seen == everything


def test_a_loader_that_was_read_to_its_end_waits_for_the_next_epoch(prepared, architecture):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), batch_size=1)
    data.setup()
    loader = data.train_dataloader()
    first, second = ([batch.keys for batch in loader] for _ in range(2))
    assert len(first) == 8
    assert second == []
    loader.sampler.set_epoch(1)
    assert sorted(batch.keys for batch in loader) == sorted(first)


def test_an_epoch_cut_short_does_not_shift_the_next_one():
    order = BatchOrder(SHAPES, 2, 0)
    order.position = 3
    order.set_epoch(1)
    assert len(list(order)) == len(order)


def test_windows_tell_each_batch_the_masks_of_its_optimizer_step(prepared, architecture):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), batch_size=1)
    data.setup()
    order = BatchOrder([e.shape for e in data.train_entries], 1, 0)
    loader = TrainLoader(data.visits(), order, Collate(architecture), window=3)
    batches = list(loader)
    for start in range(0, len(batches), 3):
        group = batches[start : start + 3]
        for batch in group:
            assert len(batch.window) == len(group)
            assert all(torch.equal(a, b.mask) for a, b in zip(batch.window, group, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_what_the_cache_holds(prepared, architecture, workers):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), batch_size=2, num_workers=workers)
    data.setup()
    cache = Cache(prepared)
    entries = {entry.key: entry for entry in cache.entries()}
    count = 0
    for batch in data.train_dataloader():
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.latents[row], cache.latents(entries[key]))
            assert torch.equal(batch.mask[row], cache.mask(entries[key]))
            text = cache.conditioning(entries[key], architecture.conditioning).text
            assert torch.equal(batch.conditioning.text[row, : len(text)], text)
            count += 1
        assert torch.equal(batch.host_mask, batch.mask)
    assert count == len(entries)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_validation_counts_every_sample_once_whatever_the_number_of_ranks(prepared, architecture, world):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), val_fraction=0.6)
    data.setup()
    samples = CachedSamples(data.cache, data.val_entries, architecture)
    shapes = [entry.shape for entry in data.val_entries]
    ranks = [
        list(ValidationLoader(samples, shapes, 2, Collate(architecture), rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    counted = Counter(key for batches in ranks for batch in batches if batch.counted for key in batch.keys)
    assert counted == Counter(entry.key for entry in data.val_entries)


def entries(count):
    return [Entry(f"k{n}", "train", (16, 1, 8, 8), "t", "", None) for n in range(count)]


def test_a_validation_fraction_holds_out_by_name_at_least_one():
    train, val = split_entries(Index.of(entries(20)), 0.25, seed=0)
    assert (len(train), len(val)) == (15, 5)
    assert {e.key for e in train} | {e.key for e in val} == {e.key for e in entries(20)}
    assert len(split_entries(Index.of(entries(3)), 0.01, seed=0)[1]) == 1
    assert list(split_entries(Index.of(entries(20)), 0.25, seed=0)[1]) == list(val)
    more = {e.key for e in split_entries(Index.of(entries(24)), 0.25, seed=0)[1]}
    assert len({e.key for e in val} - more) <= 2  # adding images moves few


def test_mirrored_copies_of_held_out_images_are_not_trained_on():
    pairs = [
        e
        for n in range(8)
        for e in (entries(8)[n], Entry(f"k{n}@flip", "train", (16, 1, 8, 8), "t", "", None, flip=True))
    ]
    train, val = split_entries(Index.of(pairs), 0.25, seed=0)
    held = {e.key for e in val}
    assert len(held) == 2
    assert not any(e.flip for e in val)
    assert not any(e.key.removesuffix("@flip") in held for e in train)
    assert len(train) == 12


def test_a_validation_folder_wins_over_the_fraction():
    mixed = [*entries(4), Entry("@val/a", "val", (16, 1, 8, 8), "t", "", None)]
    train, val = split_entries(Index.of(mixed), 0.5, seed=0)
    assert [e.key for e in val] == ["@val/a"]
    assert len(train) == 4


# ---------------------------------------------------------------- bad input


def module(prepared, architecture, **settings):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), **settings)
    data.setup()
    return data


def test_a_batch_larger_than_the_set_is_refused(prepared, architecture):
    with pytest.raises(ValueError, match=r"data.batch_size=9 is larger than the training set of 8 samples"):
        module(prepared, architecture, batch_size=9)


def test_a_split_that_leaves_nothing_is_refused(prepared, architecture):
    with pytest.raises(ValueError, match="leaves no training sample"):
        module(prepared, architecture, val_fraction=0.99)


def test_missing_masks_are_refused_where_they_are_required(prepared, architecture):
    with pytest.raises(ValueError, match=r"have no mask; data.require_mask=true"):
        module(prepared, architecture, require_mask=True)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("num_workers", -1), ("val_fraction", 1.0), ("val_fraction", -0.1)]
)
def test_settings_out_of_range_are_refused(prepared, architecture, name, value):
    with pytest.raises(ValueError, match=f"data.{name}"):
        module(prepared, architecture, **{name: value})


def test_damage_is_found_before_training_starts(prepared, architecture, tmp_path):
    shutil.copytree(prepared, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    path = cache.latents_path(cache.entries()[-1].key)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged or cut short"):
        module(tmp_path / "cache", architecture)


def test_a_cache_of_another_vae_is_refused(prepared, tmp_path):
    from mpp.models.tiny import tiny_wan

    other = helpers.architecture(tiny_wan(str(tmp_path / "other"), seed=3))
    with pytest.raises(ValueError, match="made with another vae"):
        module(prepared, other)
