"""Masks that look wrong are counted by one rule, whoever asks."""

import random
import re

import pytest
import torch
from PIL import Image

from mpp.cache.index import Index
from mpp.cache.mask_facts import MaskDoubts, black_under
from mpp.core.loss import MaskedPriorLoss
from mpp.reporting.findings import find
from mpp.reporting.rows import look_at
from tests import helpers
from tests.reporting.drawn import Drawn

PLAIN = MaskedPriorLoss()


def drawn_mask(draw):
    """A mask and what is wrong with it, by plain counting of cells."""
    height, width = draw.randint(8, 24), draw.randint(8, 24)
    kind = draw.choice(["fine", "empty", "tiny", "inverted"])
    mask = torch.zeros(height, width)
    if kind == "tiny":
        mask[draw.randrange(height), draw.randrange(width)] = draw.uniform(0.1, 1)
    if kind in ("fine", "inverted"):
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
        mask = 1 - mask if kind == "inverted" else mask
    return mask, kind


def test_inverted_empty_and_tiny_masks_are_counted_as_the_report_does(tmp_path):
    draw = random.Random(0)
    for number in range(6):
        drawn, wrong = Drawn(tmp_path / str(number)), {"inverted": [], "empty": [], "tiny": [], "fine": []}
        for name in range(draw.randint(1, 8)):
            mask, kind = drawn_mask(draw)
            drawn.add(f"s{name}", mask=mask)
            wrong[kind].append(f"s{name}")
        cache = drawn.write()
        found = MaskDoubts.of(cache, cache.entries(), PLAIN)
        assert {name: list(getattr(found, name)) for name in ("inverted", "empty", "tiny")} == {
            name: wrong[name] for name in ("inverted", "empty", "tiny")
        }
        rows = [look_at(cache, entry, PLAIN, cache.identity()) for entry in cache.entries()]
        page = {one.kind: [rows[n].entry.key for n in one.samples] for one in find(rows, PLAIN, cache.notes())}
        assert {name: keys for name, keys in wrong.items() if keys and name != "fine"} == {
            name: page[name] for name in ("inverted", "empty", "tiny") if name in page
        }


def test_clips_and_mirrored_copies_count_as_one_and_at_most_some_are_looked_at(tmp_path):
    drawn = Drawn(tmp_path)
    for name in ("a", "a@flip"):
        drawn.add(name, mask=torch.zeros(8, 8), flip=name != "a")
    for start in range(3):
        drawn.add(f"v@{start}", mask=torch.zeros(1, 8, 8), source="v")
    drawn.add("bare", mask=None)
    cache = drawn.write()
    assert MaskDoubts.of(cache, cache.entries(), PLAIN) == MaskDoubts(2, empty=("a", "v"))
    assert MaskDoubts.of(cache, cache.entries(), PLAIN, most=1).looked_at == 1
    assert MaskDoubts.of(cache, Index.of([]), PLAIN) == MaskDoubts()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing is learned from it"),
        ({"prior_weight": 1.0}, "nothing is learned from it, and all of it keeps the base model's prediction"),
        ({"prior_weight": 1.0, "prior_threshold": 0.1, "mask_min_weight": 0.05}, "nothing is learned from it, and all"),
        ({"mask_min_weight": 0.05}, r"all of it is learned, .* at full weight, where no other .*=0.05 leaves"),
        ({"mask_min_weight": 0.05, "normalization": "per_sample"}, r"all of it is learned, .* at full weight: "),
    ],
)
def test_what_a_black_mask_comes_to_is_what_the_loss_makes_of_it(settings, words):
    """The witness is the loss of a batch: its gradient towards the target, and towards the prior."""
    loss = MaskedPriorLoss(**settings)
    said = black_under(loss)
    assert re.match(words, said)
    pred = torch.randn(1, 2, 1, 4, 4, requires_grad=True)
    target, prior, mask = torch.randn(1, 2, 1, 4, 4), torch.randn(1, 2, 1, 4, 4), torch.zeros(1, 1, 1, 4, 4)
    terms = loss(pred, target, mask, prior if loss.prior_weight else None)
    assert (terms.target.item() > 0) == ("all of it is learned" in said)
    assert (terms.prior.item() > 0) == ("keeps the base" in said)
    if terms.target.item() > 0:
        assert terms.target.item() == pytest.approx(((pred - target) ** 2).mean().item(), rel=1e-5)


def test_preparing_names_masks_that_look_wrong(tmp_path, pipeline):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for name, box in {"black": None, "fine": (16, 16, 48, 48), "dot": (30, 30, 34, 34)}.items():
        Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "photos" / f"{name}.png")
        mask = Image.new("L", (64, 64))
        if box:
            mask.paste(255, box)
        mask.save(tmp_path / "masks" / f"{name}.png")
    said = "\n".join(helpers.prepare(pipeline, tmp_path).lines())
    assert "1 of 3 masks are wholly black (black): training learns nothing there, or under a floor" in said
    assert "1 of 3 masks are tiny (dot): " in said
    assert "inverted" not in said
