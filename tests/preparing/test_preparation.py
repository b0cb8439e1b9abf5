import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.cache.format import Cache
from mpp.models.families.wan import WanEncoders
from tests.helpers import draw_photos, prepare


@pytest.fixture
def root(tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=4)
    return tmp_path


def entries(root):
    return {entry.key: entry for entry in Cache(root / "cache").entries()}


def test_prepare_makes_latents_masks_text_and_index(root, pipeline):
    summary = prepare(pipeline, root)
    assert (summary.encoded, summary.masks_written, summary.texts_encoded) == (4, 3, 3)
    cache, found = Cache(root / "cache"), entries(root)
    assert sorted(found) == ["p0", "p1", "p2", "p3"]
    assert found["p0"].shape == (16, 1, 8, 8)
    assert found["p1"].shape[2:] == (5, 11) or found["p1"].shape[3] > found["p1"].shape[2]
    assert found["p3"].mask is None
    for entry in found.values():
        assert torch.isfinite(cache.latents(entry)).all()
        assert cache.mask(entry).shape == (1, *entry.shape[1:])
        assert cache.preview_path(entry.key).is_file()
    assert cache.mask(found["p3"]).min() == 1  # without a mask everything is learned


def test_a_second_run_encodes_nothing_and_does_not_load_the_encoders(root, pipeline, monkeypatch):
    prepare(pipeline, root)
    monkeypatch.setattr(WanEncoders, "vae", lambda self: pytest.fail("VAE loaded"))
    monkeypatch.setattr(WanEncoders, "encoder", lambda *_: pytest.fail("text encoder loaded"))
    summary = prepare(pipeline, root)
    assert (summary.encoded, summary.current, summary.masks_written, summary.texts_encoded) == (0, 4, 0, 0)


def test_a_changed_mask_is_picked_up_without_encoding_again(root, pipeline, monkeypatch):
    prepare(pipeline, root)
    before = Cache(root / "cache").mask(entries(root)["p0"])
    Image.fromarray(np.full((64, 64), 128, np.uint8)).save(root / "masks" / "p0.png")
    monkeypatch.setattr(WanEncoders, "encode_pixels", lambda self, pixels: pytest.fail("encoded"))
    summary = prepare(pipeline, root)
    assert (summary.masks_written, summary.masks_current) == (1, 2)
    after = Cache(root / "cache").mask(entries(root)["p0"])
    assert not torch.equal(before, after)
    assert after.unique().tolist() == pytest.approx([128 / 255])


def test_new_and_deleted_masks_are_picked_up(root, pipeline):
    prepare(pipeline, root)
    (root / "masks" / "p0.png").rename(root / "masks" / "p3.png")
    Image.fromarray(np.zeros((48, 96), np.uint8)).save(root / "masks" / "p3.png")
    summary = prepare(pipeline, root)
    assert summary.encoded == 0
    assert entries(root)["p0"].mask is None
    assert entries(root)["p3"].mask == "folder"


def test_a_touched_but_equal_file_stays_current(root, pipeline):
    prepare(pipeline, root)
    for path in (root / "photos" / "p0.png", root / "masks" / "p0.png"):
        os.utime(path, (1, 1))
    summary = prepare(pipeline, root)
    assert (summary.encoded, summary.masks_written) == (0, 0)


def test_a_changed_image_is_encoded_again(root, pipeline):
    prepare(pipeline, root)
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(root / "photos" / "p0.png")
    summary = prepare(pipeline, root)
    assert summary.encoded == 1


def test_another_resolution_encodes_and_averages_masks_again(root, pipeline):
    prepare(pipeline, root)
    summary = prepare(pipeline, root, "data.resolution=96")
    assert (summary.encoded, summary.masks_written) == (4, 3)
    Cache(root / "cache").check_files(entries(root)["p0"])


def test_equal_captions_share_one_file(root, pipeline):
    for number in range(4):
        (root / "photos" / f"p{number}.txt").write_text("the same words")
    summary = prepare(pipeline, root)
    assert summary.texts_encoded == 1
    assert len(list((root / "cache" / "text").iterdir())) == 1


def test_images_without_caption_are_counted_and_get_the_empty_one(root, pipeline):
    (root / "photos" / "p1.txt").unlink()
    summary = prepare(pipeline, root)
    assert summary.no_caption == 1
    assert entries(root)["p1"].caption == ""
    assert any("1 images and videos without one" in line for line in summary.lines())


def test_mirrored_copies_are_mirrored_in_image_and_mask(root, pipeline):
    prepare(pipeline, root, "data.flip=true")
    cache, found = Cache(root / "cache"), entries(root)
    assert len(found) == 8
    torch.testing.assert_close(cache.mask(found["p0@flip"]), cache.mask(found["p0"]).flip(-1))
    plain = np.asarray(Image.open(cache.preview_path("p0"))).astype(int)
    mirrored = np.asarray(Image.open(cache.preview_path("p0@flip"))).astype(int)
    assert np.abs(plain[:, ::-1] - mirrored).mean() < 12  # JPEG
    assert not torch.equal(cache.latents(found["p0"]), cache.latents(found["p0@flip"]))


def test_masks_come_from_folder_then_masklabel_then_alpha(root, pipeline):
    photos = root / "photos"
    Image.fromarray(np.full((64, 64), 51, np.uint8)).save(photos / "p0-masklabel.png")  # folder wins
    Image.fromarray(np.full((48, 96), 102, np.uint8)).save(photos / "p3-masklabel.png")
    rgba = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    rgba[..., 3] = 153
    Image.fromarray(rgba).save(photos / "p4.png")
    opaque = rgba.copy()
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(photos / "p5.png")
    summary = prepare(pipeline, root)
    cache, found = Cache(root / "cache"), entries(root)
    assert {key: found[key].mask for key in ("p0", "p3", "p4", "p5")} == {
        "p0": "folder",
        "p3": "masklabel",
        "p4": "alpha",
        "p5": None,
    }
    assert cache.mask(found["p3"]).unique().tolist() == pytest.approx([0.4])
    assert cache.mask(found["p4"]).unique().tolist() == pytest.approx([0.6])
    assert summary.masks == {"folder": 3, "masklabel": 1, "alpha": 1, "none": 1}
    assert prepare(pipeline, root).masks_written == 0
    none = prepare(pipeline, root, "data.mask_sources=[]")
    assert none.masks == {"none": 6}


def test_masks_match_by_stem_whatever_their_format(root, pipeline):
    image = Image.open(root / "masks" / "p0.png")
    (root / "masks" / "p0.png").unlink()
    image.save(root / "masks" / "p0.webp", lossless=True)
    Image.new("L", (9, 9)).save(root / "masks" / "stranger.png")
    (root / "photos" / "p0.psd").touch()
    summary = prepare(pipeline, root)
    assert (
        "passed over: 1 .psd (p0.psd): no format that mpp reads; save images as PNG and videos as MP4"
        in summary.lines()
    )
    assert entries(root)["p0"].mask == "folder"
    assert summary.left_over.unused == ["stranger.png"]


def test_a_mask_folder_inside_the_image_folder_holds_no_images(root, pipeline):
    (root / "masks").rename(root / "photos" / "masks")
    summary = prepare(pipeline, root, f"data.mask_dir={root / 'photos' / 'masks'}")
    assert summary.encoded == 4


def test_a_validation_folder_is_marked(root, pipeline):
    draw_photos(root / "held", root / "held_masks", count=2)
    prepare(
        pipeline,
        root,
        f"data.val_image_dir={root / 'held'}",
        f"data.val_mask_dir={root / 'held_masks'}",
        "data.flip=true",
    )
    found = entries(root)
    assert sorted(key for key, entry in found.items() if entry.split == "val") == ["@val/p0", "@val/p1"]
    assert found["@val/p0"].mask == "folder"


def test_subfolders_are_searched_and_named(root, pipeline):
    (root / "photos" / "more").mkdir()
    shutil.copy(root / "photos" / "p0.png", root / "photos" / "more" / "p0.png")
    prepare(pipeline, root)
    assert "more/p0" in entries(root)


# ---------------------------------------------------------------- bad input


def test_an_empty_folder_is_refused(root, pipeline):
    (root / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        prepare(pipeline, root, f"data.image_dir={root / 'none'}")
    with pytest.raises(ValueError, match="is no folder"):
        prepare(pipeline, root, f"data.image_dir={root / 'nowhere'}")


def test_two_images_with_one_stem_are_refused(root, pipeline):
    Image.new("RGB", (64, 64)).save(root / "photos" / "p0.jpg")
    with pytest.raises(ValueError, match=r"two images share one stem: .*p0\.jpg, .*p0\.png"):
        prepare(pipeline, root)


@pytest.mark.parametrize("what", ["aspect", "truncated", "text"])
def test_bad_files_stop_before_anything_is_encoded_or_are_skipped_by_name(root, pipeline, what, monkeypatch):
    if what == "aspect":
        Image.new("L", (64, 50)).save(root / "masks" / "p2.png")
    elif what == "truncated":
        data = (root / "photos" / "p2.png").read_bytes()
        (root / "photos" / "p2.png").write_bytes(data[: len(data) // 2])
    else:
        (root / "photos" / "p2.png").write_text("no image")
    with monkeypatch.context() as patch:
        patch.setattr(WanEncoders, "encode_text", lambda self, captions: pytest.fail("encoded"))
        patch.setattr(WanEncoders, "encode_pixels", lambda self, pixels: pytest.fail("encoded"))
        with pytest.raises(ValueError, match=r"p2\.png") as error:
            prepare(pipeline, root)
    assert "data.on_error=skip" in str(error.value)
    summary = prepare(pipeline, root, "data.on_error=skip")
    assert len(summary.skipped) == 1
    assert "p2.png" in summary.skipped[0]
    assert sorted(entries(root)) == ["p0", "p1", "p3"]


def test_all_problems_are_named_at_once(root, pipeline):
    for number in (0, 2):
        (root / "photos" / f"p{number}.png").write_text("no image")
    with pytest.raises(ValueError, match=r"(?s)p0\.png.*p2\.png"):
        prepare(pipeline, root)


def test_missing_masks_are_refused_where_they_are_required(root, pipeline):
    with pytest.raises(ValueError, match=r"p3\.png: no mask, and data.require_mask=true"):
        prepare(pipeline, root, "data.require_mask=true")


def test_captions_in_another_encoding_are_named(root, pipeline):
    (root / "photos" / "p0.txt").write_bytes("käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p0\.txt is not UTF-8"):
        prepare(pipeline, root)


def test_nan_latents_are_refused_by_name(root, pipeline, monkeypatch):
    good = WanEncoders.encode_pixels
    monkeypatch.setattr(WanEncoders, "encode_pixels", lambda self, pixels: good(self, pixels) * float("nan"))
    with pytest.raises(ValueError, match=r"p0\.png: the VAE gave NaN"):
        prepare(pipeline, root)


def test_a_cache_of_another_vae_is_refused_and_left_alone(root, pipeline, tmp_path_factory):
    from mpp.models.tiny import tiny_wan

    prepare(pipeline, root)
    files = {path: path.read_bytes() for path in (root / "cache").rglob("*") if path.is_file()}
    other = tiny_wan(str(tmp_path_factory.mktemp("other") / "wan"), seed=1)
    with pytest.raises(ValueError, match="made with another vae"):
        prepare(other, root)
    assert {path: path.read_bytes() for path in (root / "cache").rglob("*") if path.is_file()} == files


def test_prepare_resumes_after_being_killed(root, pipeline, monkeypatch):
    good, calls = WanEncoders.encode_pixels, []

    def dies(self, pixels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return good(self, pixels)

    monkeypatch.setattr(WanEncoders, "encode_pixels", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(pipeline, root)
    with pytest.raises(ValueError, match="not finished"):
        Cache(root / "cache").entries()
    monkeypatch.setattr(WanEncoders, "encode_pixels", good)
    summary = prepare(pipeline, root)
    assert (summary.encoded, summary.current) == (2, 2)


def test_a_half_written_latents_file_is_made_again(root, pipeline):
    prepare(pipeline, root)
    path = Cache(root / "cache").latents_path("p0")
    path.write_bytes(path.read_bytes()[:100])
    assert prepare(pipeline, root).encoded == 1
    Cache(root / "cache").latents(entries(root)["p0"])


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_no_half_file(root, pipeline):
    # A real limit of the kernel on file size, in a process of its own: writes of latents fail part way.
    script = f"""
import resource, signal
from pathlib import Path
from tests.helpers import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Path({str(root)!r})
prepare({pipeline!r}, root)
before = sorted(p for p in (root / "cache").rglob("*"))
import numpy as np
from PIL import Image
Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "photos" / "p0.png")
old = (root / "cache" / "latents" / "p0.safetensors").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
try:
    prepare({pipeline!r}, root, "data.on_error=skip")
except OSError as error:
    print(error)
print(old == (root / "cache" / "latents" / "p0.safetensors").read_bytes())
gone = set(before) - set((root / "cache").rglob("*"))
new = {{path for path in (root / "cache").rglob("*") if "unsynced" not in path.parts}}  # which is a note to look again
print([path.name for path in gone], new <= set(before))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    message, *rest = run.stdout.splitlines()[-3:]
    assert f"[Errno {errno.ENOSPC}] no space left to write" in message
    assert rest == ["True", "['index.jsonl'] True"]  # it would vouch for a set that is half made anew


def test_cache_says_what_it_was_made_with(root, pipeline):
    prepare(pipeline, root)
    content = json.loads((root / "cache" / "cache.json").read_text())
    assert content["format"] == 3
    assert content["family"] == "wan"
    assert content["vae"]


@pytest.mark.slow
def test_embeddings_that_come_out_not_finite_are_refused_with_their_image(root, pipeline, monkeypatch):
    draws, encode = random.Random(19), WanEncoders.encode_text
    monkeypatch.setattr("mpp.preparing.texts._BATCH", 2)
    for turn in range(4):
        names = [f"p{number}" for number in range(4)]
        for name in names:
            (root / "photos" / f"{name}.txt").write_text(f"{turn} of {name}")
        wrong = draws.choice(names)

        def overflows(self, prompts, said=f"{turn} of {wrong}"):
            records = encode(self, prompts)
            for prompt, record in zip(prompts, records, strict=True):
                if prompt.text == said:
                    record.text[0, draws.randrange(record.text.shape[1])] = draws.choice([math.nan, math.inf])
            return records

        monkeypatch.setattr(WanEncoders, "encode_text", overflows)
        with pytest.raises(ValueError, match=rf"{wrong}\.png: the embeddings of its caption '{turn} of {wrong}' came"):
            prepare(pipeline, root)
        monkeypatch.setattr(WanEncoders, "encode_text", encode)
        assert prepare(pipeline, root).texts_encoded >= 1  # what was not written is made, the rest was kept
