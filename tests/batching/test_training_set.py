"""Whether a run that goes on finds the samples that it began with."""

import json
import random
from dataclasses import replace

import pytest
import torch

from mpp.batching import training_set
from mpp.batching.training_set import TrainingSet
from mpp.cache.index import Entry, Index


class Latents:
    """A cache that holds nothing but latents, drawn by key."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def latents(self, entry):
        return torch.full(entry.shape, len(entry.key) + self.shift)


def draw_entries(draw):
    keys = draw.sample([f"{folder}{n}" for folder in ("", "evening/", "ä ") for n in range(40)], draw.randint(3, 30))
    return [
        Entry(key, "train", (2, 1, draw.choice([2, 4]), 2), "t", f"caption {n % 3}", draw.choice([None, "folder"]),
              repeats=draw.choice([1, 1, 3]))
        for n, key in enumerate(sorted(keys))
    ]  # fmt: skip


def recorded(entries, pool=(), cache=None):
    """As it comes back from a checkpoint."""
    made = TrainingSet.of(cache or Latents(), Index.of(entries), [(cache, entry) for entry in pool])
    return TrainingSet.from_record(json.loads(json.dumps(made.record())))


@pytest.mark.parametrize("seed", range(40))
def test_samples_that_are_gone_new_or_changed_are_named(seed):
    draw = random.Random(seed)
    entries = draw_entries(draw)
    was = recorded(entries)
    assert was.check(recorded(entries)) == []
    gone = draw.sample(entries, draw.choice([0, 1, 2]))
    kept = [entry for entry in entries if entry not in gone]
    changed = draw.sample(kept, min(len(kept), draw.choice([0, 1])))
    new = [replace(entries[0], key=f"new{n}") for n in range(draw.choice([0, 1, 2]))]
    now = [replace(e, shape=(2, 1, 6, 2)) if e in changed and draw.random() < 0.5 else
           replace(e, repeats=7) if e in changed else e for e in kept] + new  # fmt: skip
    if not (gone or changed or new):
        return
    with pytest.raises(ValueError, match=f"{len(entries)} then, {len(now)} now") as error:
        was.check(recorded(now))
    for word, found in (("gone", gone), ("new", new), ("of another shape or number of repeats", changed)):
        said = str(error.value).partition(f"; {word}: ")[2].partition(";")[0].partition(")")[0]
        assert (said.split(", ") if said else []) == [entry.key for entry in entries + new if entry in found]


def test_long_lists_end_in_a_count_and_large_sets_are_not_named(monkeypatch):
    entries = [Entry(f"k{n:02}", "train", (1, 1, 2, 2), "t", "c", None) for n in range(20)]
    with pytest.raises(ValueError, match=r"gone: k01, k02, k03, k04, k05 and 14 more\)"):
        recorded(entries).check(recorded(entries[:1]))
    monkeypatch.setattr(training_set, "NAMED", 10)
    with pytest.raises(ValueError, match=r"\(20 then, 19 now\)"):
        recorded(entries).check(recorded(entries[1:]))


def test_another_order_pool_or_content_is_refused_and_other_captions_are_said():
    entries = draw_entries(random.Random(0))
    was = recorded(entries, pool=entries[:2])
    with pytest.raises(ValueError, match="the samples are not those"):
        was.check(recorded(entries[::-1], pool=entries[:2]))
    with pytest.raises(ValueError, match="the samples are not those"):
        was.check(recorded(entries, pool=entries[:3]))
    with pytest.raises(ValueError, match=f"other latents: {entries[0].key}"):
        was.check(recorded(entries, pool=entries[:2], cache=Latents(0.5)))
    edited = [replace(entries[0], caption="another"), *entries[1:]]
    assert was.check(recorded(edited, pool=entries[:2])) == [
        "captions, or which samples have a mask, are not what they were"
    ]
