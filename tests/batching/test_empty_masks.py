"""Samples with wholly black masks are said, left out or refused, as `data.on_empty_mask` says."""

import random
import shutil

import pytest
import torch
from PIL import Image

from mpp.batching.datamodule import LatentDataModule
from mpp.batching.empty_masks import EmptyMasks, without_empty_masks
from mpp.batching.preservation import Preservation
from tests import helpers
from tests.reporting.drawn import Drawn


def drawn_set(draw, root):
    """A cache with some black masks, and by split the keys of all samples and of those with black masks."""
    given = draw.choice([0, 1])
    drawn = Drawn(root, given=given)
    keys, black = {"train": set(), "val": set()}, {"train": set(), "val": set()}
    for number in range(draw.randint(2, 9)):
        split = "train" if number < 2 else draw.choice(["train", "val"])
        key, frames = f"s{number}", given + draw.randint(1, 3)
        kind = "light" if number == 0 else draw.choice(["black", "nearly", "light", "none"])
        mask = torch.zeros(frames, 6, 8)
        mask[:given] = 1  # what the model is given belongs to no mask
        if kind == "light":
            mask[draw.randrange(given, frames), draw.randrange(6), draw.randrange(8)] = draw.uniform(1 / 255, 1)
        if kind == "nearly":
            mask[given:] = 0.4 / 255  # would be saved as black
        drawn.add(key, mask=None if kind == "none" else mask, cells=(frames, 6, 8), image=None, split=split)
        keys[split].add(key)
        if kind in ("black", "nearly"):
            black[split].add(key)
    return drawn.write(), given, keys, black


def test_exactly_the_samples_with_black_masks_are_left_out_or_named(tmp_path):
    draw, some = random.Random(0), 0
    for number in range(25):
        cache, given, keys, black = drawn_set(draw, tmp_path / str(number))
        train, val = (cache.entries().of_split(split) for split in ("train", "val"))
        gone = black["train"] | black["val"]
        some += bool(gone)
        for word in ("warn", "skip"):
            *left, found = without_empty_masks(cache, train, val, word, given)
            assert set(found.keys) == gone
            assert found.looked_at == len([entry for entry in (*train, *val) if entry.mask])
            kept = {split: keys[split] - (black[split] if word == "skip" else set()) for split in keys}
            assert {"train": {e.key for e in left[0]}, "val": {e.key for e in left[1]}} == kept
        if gone:
            with pytest.raises(
                ValueError, match=rf"{len(gone)} of .* masks are wholly black .*on_empty_mask=error; draw"
            ):
                without_empty_masks(cache, train, val, "error", given)
        else:
            assert without_empty_masks(cache, train, val, "error", given)[2] == EmptyMasks((), found.looked_at)
    assert some > 12


def test_leaving_all_out_is_refused(tmp_path):
    cache = Drawn(tmp_path).add("a", mask=torch.zeros(4, 4), image=None).write()
    train, val = (cache.entries().of_split(split) for split in ("train", "val"))
    with pytest.raises(ValueError, match="leaves no training sample; are the masks inverted"):
        without_empty_masks(cache, train, val, "skip", 0)


@pytest.fixture(scope="module")
def with_black(tmp_path_factory, pipeline):
    """Four images, p1 with a black mask, p3 without one."""
    root = tmp_path_factory.mktemp("black")
    helpers.draw_photos(root / "photos", root / "masks", 4)
    Image.new("L", (96, 48)).save(root / "masks" / "p1.png")
    said = "\n".join(helpers.prepare(pipeline, root).lines())
    assert "1 of 3 masks are wholly black (p1): training learns nothing there, or under a floor" in said
    return root / "cache"


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (["loss=masked"], "all of it is learned, background included, and at full weight, where no other sample"),
        (["loss=threshold"], "nothing is learned from it, and all of it keeps the base model's prediction"),
        (["loss=masked", "loss.mask_min_weight=0"], "nothing is learned from it; draw them"),
    ],
)
def test_the_start_says_what_the_loss_makes_of_black_masks(pipeline, with_black, tmp_path, caplog, loss, words):
    helpers.train(pipeline, with_black, tmp_path, "trainer.max_steps=1", *loss)
    (line,) = [record.getMessage() for record in caplog.records if "wholly black" in record.getMessage()]
    assert line.startswith(f"1 of 3 masks are wholly black (p1): {words}")
    assert line.endswith("or leave them out by data.on_empty_mask=skip")


def test_what_is_left_out_is_never_visited_and_preservation_samples_do_not_count(architecture, with_black, tmp_path):
    settings = {"architecture": architecture, "cache_dir": str(with_black)}
    data = LatentDataModule(**settings, on_empty_mask="skip", batch_size=1)
    data.setup()
    assert {key for batch in data.train_dataloader() for key in batch.keys} == {"p0", "p2", "p3"}
    other = shutil.copytree(with_black, tmp_path / "other")  # whose masks do not matter
    preserved = Preservation(rate=0.5, cache_dir=str(other))
    mixed = LatentDataModule(**settings, preservation=preserved, on_empty_mask="skip")
    mixed.setup()
    assert (mixed.empty_masks.keys, len(mixed.pool)) == (("p1",), 4)
    with pytest.raises(ValueError, match="data.batch_size=4 is larger than the training set of 3 samples"):
        LatentDataModule(**settings, on_empty_mask="skip", batch_size=4).setup()
    with pytest.raises(ValueError, match=r"1 of 3 masks are wholly black \(p1\), and data.on_empty_mask=error"):
        LatentDataModule(**settings, on_empty_mask="error").setup()


def test_another_word_is_refused_with_those_there_are(architecture):
    said = helpers.unchecked_error(LatentDataModule, architecture=architecture, cache_dir="x", on_empty_mask="drop")
    assert said == "ValueError: data.on_empty_mask must be warn, skip, error, got 'drop'"
