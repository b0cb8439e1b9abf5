"""Repeats, mask dropout and captions by visit."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mpp.batching.datamodule import LatentDataModule
from mpp.batching.visits import Changes, Numbering, TrainSamples, Visit
from mpp.cache.format import Cache
from mpp.cache.index import Entry, Index
from mpp.core import draws
from mpp.models.contract import Prompt


@pytest.fixture
def data(architecture, prepared):
    module = LatentDataModule(architecture=architecture, cache_dir=str(prepared))
    module.setup()
    return module


def visits(data, **changes):
    return TrainSamples(
        data.cache, data.train_entries, data.architecture, Changes(**changes), repeats=data.train_entries.repeats
    )


def test_each_sample_is_visited_as_often_as_it_repeats_and_each_visit_has_a_key_of_its_own():
    numbering = Numbering([1, 3, 2], pool=2)
    assert numbering.count == 6
    assert [numbering.locate(n) for n in range(6)] == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (2, 0, 0), (2, 0, 1)]
    assert [numbering.locate(n) for n in range(6, 11)] == [
        (None, 0, 0), (None, 1, 0), (None, 0, 1), (None, 1, 1), (None, 0, 2),
    ]  # fmt: skip


def test_repeats_are_in_the_epoch_and_have_noise_of_their_own(architecture, prepared, tmp_path):
    data = LatentDataModule(architecture=architecture, cache_dir=str(prepared), batch_size=3)
    data.setup()
    data.train_entries = Index.of([replace(e, repeats=1 + (e.key == "p1") * 2) for e in data.train_entries])
    loader = data.train_dataloader()
    keys = Counter(key for batch in loader for key in batch.keys)
    assert keys == Counter({**{f"p{n}": 1 for n in range(8)}, "p1#1": 1, "p1#2": 1})
    assert not torch.equal(draws.noise((4,), 0, 0, "p1"), draws.noise((4,), 0, 0, "p1#1"))


@pytest.mark.slow
def test_mask_dropout_takes_the_mask_of_its_share_of_the_visits_by_a_draw_of_its_own(data):
    samples, plain = visits(data, unmasked_probability=0.3), visits(data)
    masked = [row for row, entry in enumerate(data.train_entries) if entry.mask is not None]
    dropped = 0
    for epoch in range(150):
        for row in masked:
            with_dropout, without = samples[Visit(row, epoch)], plain[Visit(row, epoch)]
            full = bool((with_dropout.mask == 1).all())
            dropped += full
            assert full or torch.equal(with_dropout.mask, without.mask)
            assert torch.equal(with_dropout.latents, without.latents)
            assert with_dropout.key == without.key  # noise and sigma stay the same
    count = 150 * len(masked)
    assert abs(dropped / count - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    again = [bool((samples[Visit(masked[0], epoch)].mask == 1).all()) for epoch in range(20)]
    assert again == [bool((samples[Visit(masked[0], epoch)].mask == 1).all()) for epoch in range(20)]
    assert 0 < sum(again) < 20


def entry(key="p", **settings):
    return Entry(key, "train", (16, 1, 8, 8), "t", "a, b, c", None, **settings)


def test_each_visit_draws_one_of_the_captions_as_likely():
    changes, varied = Changes(), entry(variants=("b, a, c", "c, a, b"))
    drawn = Counter(changes.caption(varied, epoch, "p") for epoch in range(3000))
    assert set(drawn) == {"a, b, c", "b, a, c", "c, a, b"}
    assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in drawn.values())
    assert changes.caption(entry(), 5, "p") == "a, b, c"


def test_caption_dropout_empties_its_share():
    changes = Changes(caption_dropout=0.25)
    empty = sum(changes.caption(entry(), epoch, "p") == "" for epoch in range(4000))
    assert abs(empty / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_dropout_of_mask_and_caption_are_independent():
    changes = Changes(unmasked_probability=0.5, caption_dropout=0.5)
    both = Counter((changes.unmasked(e, "p"), changes.caption(entry(), e, "p") == "") for e in range(4000))
    assert all(abs(n - 1000) < 4 * (4000 * 3 / 16) ** 0.5 for n in both.values())


@pytest.mark.parametrize("name", ["unmasked_probability", "caption_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range_are_refused(name, share):
    with pytest.raises(ValueError, match=f"data.{name} must be between 0 and 1"):
        Changes(**{name: share})


def test_caption_dropout_needs_the_empty_caption(architecture, prepared):
    module = LatentDataModule(architecture=architecture, cache_dir=str(prepared), caption_dropout=0.1)
    with pytest.raises(ValueError, match="no embeddings of the empty caption; .*data.empty_caption=true"):
        module.setup()


def test_a_dropped_caption_is_the_empty_captions_embedding(architecture, pipeline, tmp_path):
    from tests import helpers

    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", 2)
    helpers.prepare(pipeline, tmp_path, "data.empty_caption=true")
    cache = Cache(tmp_path / "cache")
    module = LatentDataModule(architecture=architecture, cache_dir=str(cache.folder), caption_dropout=1.0)
    module.setup()
    sample = visits(module, caption_dropout=1.0)[Visit(0, 0)]
    (empty,) = architecture.load_encoders("cpu").encode_text([Prompt("")])
    assert torch.equal(sample.conditioning.text, empty.text)
    assert not torch.equal(visits(module)[Visit(0, 0)].conditioning.text, empty.text)
