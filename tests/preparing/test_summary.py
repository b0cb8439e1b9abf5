"""What is cut of images and enlarged of them is said, for drawn sizes; the witness counts pixels of the source."""

import random
import re
import textwrap

import pytest
from PIL import Image

import mpp.prepare
from mpp.cache.format import Cache
from mpp.core.loss import MaskedPriorLoss
from mpp.reporting.findings import find
from mpp.reporting.rows import look_at
from tests import helpers
from tests.helpers import config


def prepare(root, *overrides):
    settings = ["model=toy", "data.resolution=24", "device=cpu", f"data.image_dir={root / 'photos'}"]
    return mpp.prepare.run(config("prepare", [*settings, f"data.cache_dir={root / 'cache'}", *overrides]))


def draw_images(root, draw, count):
    """Images of drawn shapes; their sizes by key."""
    (root / "photos").mkdir(parents=True)
    sizes = {}
    for number in range(count):
        size = draw.choice([(24, 24), (draw.randint(4, 90), draw.randint(4, 90)), (draw.randint(60, 200), 20)])
        sizes[f"p{number:02d}"] = size
        Image.new("RGB", size).save(root / "photos" / f"p{number:02d}.png")
    return sizes


def witness(root, sizes):
    """By key the share of pixels that the bucket leaves out, and how far those that are left are enlarged."""
    found = {}
    for entry in Cache(root / "cache").entries():
        width, height = sizes[entry.origin]
        across, down = entry.shape[3] * 2, entry.shape[2] * 2
        factor = max(across / width, down / height)
        found[entry.origin] = 1 - (across / factor) * (down / factor) / (width * height), factor
    return found


def ranked(values, form, most=20):
    order = sorted(values, key=lambda key: (-values[key], key))
    shown = [f"{key} ({form.format(values[key])})" for key in order[:most]]
    return ", ".join([*shown, *([f"and {len(order) - most} more"] if len(order) > most else [])])


def line(summary, name):
    return next((text for text in summary.lines() if text.startswith(f"{name}: ")), "")


@pytest.mark.parametrize("seed", [0, 1])
def test_what_buckets_cut_and_enlarge_is_said_with_names(tmp_path, seed):
    sizes = draw_images(tmp_path, random.Random(seed), 40)
    flip = "data.flip=true" if seed else "data.flip=false"
    said = prepare(tmp_path, flip)
    facts = witness(tmp_path, sizes)
    for summary in (said, prepare(tmp_path, flip)):  # the second encodes nothing, and says the same
        cropped = {key: share for key, (share, _) in facts.items()}
        much = {key: share for key, share in cropped.items() if share > 0.2}
        mean = sum(cropped.values()) / len(cropped)
        assert line(summary, "cropped") == (
            f"cropped: buckets leave out {mean:.1%} of the images' area on average, {max(cropped.values()):.0%} at "
            f"most; above 20%: {ranked(much, '{:.0%}')}; a higher data.max_aspect keeps more"
        )
        small = {key: factor for key, (_, factor) in facts.items() if factor > 1}
        assert line(summary, "enlarged") == (
            f"enlarged: {len(small)} images and videos are smaller than their bucket: {ranked(small, '{:.2f} times')}"
        )


def test_images_of_their_buckets_size_are_neither_cropped_nor_enlarged(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "photos" / "a.png")
    assert not re.search("cropped|enlarged", "\n".join(prepare(tmp_path).lines()))


def test_the_report_names_what_is_cropped_above_a_fifth(tmp_path):
    sizes = draw_images(tmp_path, random.Random(3), 25)
    prepare(tmp_path)
    cache, loss = Cache(tmp_path / "cache"), MaskedPriorLoss()
    rows = [look_at(cache, entry, loss, cache.identity()) for entry in cache.entries()]
    (finding,) = [one for one in find(rows, loss, cache.notes()) if one.kind == "cropped"]
    much = {key: share for key, (share, _) in witness(tmp_path, sizes).items() if share > 0.2}
    assert {rows[number].entry.key for number in finding.samples} == set(much)
    notes = {rows[number].entry.key: note for number, note in zip(finding.samples, finding.notes, strict=True)}
    assert notes == {key: f"{share:.0%} of the image" for key, share in much.items()}


def test_long_lists_of_what_was_left_out_end_in_a_number(tmp_path):
    draw = random.Random(4)
    draw_images(tmp_path, draw, 30)
    broken = draw.sample(range(30), 23)
    for number in broken:
        (tmp_path / "photos" / f"p{number:02d}.png").write_text("no image")
    lines = prepare(tmp_path, "data.on_error=skip").lines()
    assert "23 skipped" in lines[0]
    said = [text for text in lines if text.startswith("skipped: ")]
    assert len(said) == 21
    assert said[-1] == "skipped: and 3 more"
    assert len(Cache(tmp_path / "cache").notes().skipped) == 23


def test_words_that_the_text_encoder_does_not_read_are_said_with_their_files(tmp_path, pipeline):
    draw = random.Random(6)
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", 8)
    unread = {}
    for number in range(8):
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 12))) for _ in range(draw.randint(3, 16))]
        caption = " ".join(words)
        (tmp_path / "photos" / f"p{number}.txt").write_text(caption)
        # 64 tokens: the end, one for the beginning, and 62 letters; a word that they do not hold whole is not read
        while len(" ".join(words)) > 62:
            words.pop()
        if rest := caption[len(" ".join(words)) :].strip():
            unread[f"p{number}"] = rest
    assert 1 < len(unread) < 8
    for _ in range(2):  # the second run encodes nothing
        said = line(helpers.prepare(pipeline, tmp_path), "cut captions")
        assert said.startswith(f"cut captions: {len(unread)} are longer than what the text encoder reads; not read: p")
        assert re.findall(r"(p\d+) \('([^']*)'\)", said) == [
            (key, textwrap.shorten(unread[key], 60, placeholder=" ...")) for key in sorted(unread)
        ]
    cache, loss = Cache(tmp_path / "cache"), MaskedPriorLoss()
    rows = [look_at(cache, entry, loss, cache.identity()) for entry in cache.entries()]
    (finding,) = [one for one in find(rows, loss, cache.notes()) if one.kind == "cut_caption"]
    notes = {rows[number].entry.key: note for number, note in zip(finding.samples, finding.notes, strict=True)}
    assert notes == {key: f"not read: {text}" for key, text in unread.items()}
