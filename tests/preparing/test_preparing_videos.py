"""Videos with masks that move, through prepare into a cache."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import mpp.cache.fingerprints
from mpp.batching.datamodule import LatentDataModule
from mpp.cache.format import Cache
from mpp.models.families.wan import WanEncoders
from tests import helpers
from tests.media import videos

SLOW = pytest.mark.slow
LOSSLESS = {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"crf": "0"}}
GREY = {"codec": "ffv1", "pix_fmt": "gray"}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    return tmp_path


@pytest.fixture
def seen(monkeypatch):
    """What the VAE was given, by order of encoding."""
    found = []
    encode = WanEncoders.encode_pixels

    def spy(self, pixels):
        found.extend(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(WanEncoders, "encode_pixels", spy)
    return found


def clip(root, name="walk", *, count=20, size=(96, 64), rate=16, mask="video", **settings):
    """A lossless video of a moving square, and its mask."""
    path = videos.write_video(
        root / "photos" / f"{name}.mkv", videos.number_frames(count, size), rate=rate, **LOSSLESS, **settings
    )
    masks = videos.square_masks(count, size)
    if mask == "video":  # its own clock does not matter
        videos.write_video(root / "masks" / f"{name}.mkv", masks, rate=5, **GREY)
    elif mask == "folder":
        videos.write_frames(root / "masks" / name, masks)
    elif mask == "still":
        Image.fromarray(masks[0]).save(root / "masks" / f"{name}.png")
    return path


def prepare(pipeline, root, *overrides):
    return helpers.prepare(pipeline, root, "data.resolution=79", "data.clips.frames=[5,9,17]", *overrides)


def entries(root):
    return {entry.key: entry for entry in Cache(root / "cache").entries()}


def cells_of(pixels, stride=4, side=8):
    """Share of each latent cell that the bright square covers, from the pixels alone, in plain loops."""
    red = (pixels[0] > 0.3) & (pixels[1] < 0) & (pixels[2] < 0)  # (250, 60, 30)
    frames, height, width = red.shape
    groups = [[0]] + [list(range(1 + g, 1 + g + stride)) for g in range(0, frames - 1, stride)]
    found = np.zeros((len(groups), height // side, width // side))
    for g, group in enumerate(groups):
        for y in range(height):
            for x in range(width):
                found[g, y // side, x // side] += sum(bool(red[f, y, x]) for f in group) / (side * side * len(group))
    return found


# ---------------------------------------------------------------- the mask lies where the square is


@pytest.mark.parametrize(
    "rates", [(30, 16), *(pytest.param(rates, marks=SLOW) for rates in ((16, 16), (24, 16), (12, 16), (25, 10)))]
)
@pytest.mark.parametrize("flip", [False, pytest.param(True, marks=SLOW)])
def test_a_moving_mask_covers_exactly_the_cells_in_which_the_square_is(root, pipeline, seen, rates, flip):
    source, target = rates
    clip(root, count=50, rate=source)
    prepare(pipeline, root, f"data.clips.fps={target}", f"data.flip={flip}")
    cache = Cache(root / "cache")
    rows = sorted(entries(root).values(), key=lambda entry: entry.flip)
    assert [entry.shape[1:] for entry in rows] == [(5, 8, 12)] * (1 + flip)
    for entry, pixels in zip(rows, seen, strict=True):
        expected = cells_of(pixels)
        assert expected.max() == 1
        assert (expected == 0).mean() > 0.5
        np.testing.assert_allclose(cache.mask(entry)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "size", [(71, 127), *(pytest.param(size, marks=SLOW) for size in ((192, 128), (96, 64), (130, 70), (64, 64)))]
)
def test_the_mask_stays_on_the_square_through_scaling_and_cropping(root, pipeline, seen, size):
    clip(root, count=12, size=size, rate=16)
    prepare(pipeline, root)
    cache = Cache(root / "cache")
    (entry,) = entries(root).values()
    expected, mask = cells_of(seen[0]), cache.mask(entry)[0].numpy()
    assert entry.shape[1] == 3
    assert expected.sum() > 2
    # Resampling blurs a pixel at the square's edges; inside and outside there is no doubt.
    assert np.abs(mask - expected).max() < 0.13
    assert (expected[mask == 0] < 0.13).all()
    assert (expected[mask == 1] > 0.87).all()
    assert abs(mask.sum() - expected.sum()) < 0.08 * expected.sum()


@pytest.mark.parametrize("rates", [(30, 16), *(pytest.param(rates, marks=SLOW) for rates in ((16, 16), (12, 16)))])
def test_clip_frames_are_the_source_frames_on_screen_at_their_time(root, pipeline, seen, rates):
    source, target = rates
    clip(root, count=40, rate=source, size=(96, 64))
    prepare(pipeline, root, f"data.clips.fps={target}")
    for pixels in seen:
        shown = [
            videos.read_number(Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()))
            for frame in pixels.transpose(0, 1)
        ]
        assert shown == [k * source // target for k in range(17)]


@pytest.mark.slow
def test_a_mask_is_pooled_over_the_frames_of_each_latent_frame(root, pipeline):
    """One white frame in an otherwise black mask video counts a quarter in its group, and the first frame in full."""
    for white, group, share in ((0, 0, 1.0), (1, 1, 0.25), (4, 1, 0.25), (5, 2, 0.25), (8, 2, 0.25)):
        masks = [np.full((64, 96), 255 * (number == white), np.uint8) for number in range(9)]
        videos.write_video(root / "photos" / "walk.mkv", videos.number_frames(9), rate=16, **LOSSLESS)
        videos.write_video(root / "masks" / "walk.mkv", masks, **GREY)
        prepare(pipeline, root)
        (entry,) = entries(root).values()
        means = Cache(root / "cache").mask(entry).mean((0, 2, 3))
        assert means.tolist() == pytest.approx([share * (g == group) for g in range(3)], abs=1e-6)


# ---------------------------------------------------------------- kinds of masks


@pytest.mark.slow
def test_a_folder_of_frame_masks_is_the_same_as_their_video(root, pipeline):
    clip(root, "a")
    clip(root, "b", mask="folder")
    prepare(pipeline, root)
    a, b = entries(root).values()
    cache = Cache(root / "cache")
    assert (a.source, b.source, b.mask) == ("a", "b", "folder")
    assert torch.equal(cache.mask(a), cache.mask(b))


@pytest.mark.slow
def test_a_still_mask_holds_for_all_frames_and_a_missing_one_learns_everything(root, pipeline):
    clip(root, "a", mask="still")
    clip(root, "b", mask=None)
    prepare(pipeline, root)
    cache = Cache(root / "cache")
    a, b = entries(root).values()
    mask = cache.mask(a)
    assert mask.shape == (1, 5, 8, 12)
    assert 0 < mask.mean() < 0.5
    assert all(torch.equal(mask[:, 0], mask[:, frame]) for frame in range(5))
    assert b.mask is None
    assert (cache.mask(b) == 1).all()


@pytest.mark.slow
def test_an_inverted_mask_learns_where_the_file_is_black(root, pipeline):
    clip(root, "a")
    prepare(pipeline, root)
    cache = Cache(root / "cache")
    plain = cache.mask(next(iter(entries(root).values())))
    summary = prepare(pipeline, root, "data.invert_mask=true")
    assert (summary.masks_written, summary.encoded) == (1, 0)
    assert torch.allclose(cache.mask(next(iter(entries(root).values()))), 1 - plain, atol=1e-6)


@pytest.mark.slow
def test_the_alpha_channel_of_a_video_is_its_mask_and_its_colours_are_kept(root, pipeline, seen):
    frames, masks = videos.number_frames(20), videos.square_masks(20)
    alpha = [np.dstack([frame, mask]) for frame, mask in zip(frames, masks, strict=True)]
    videos.write_video(root / "photos" / "walk.mkv", alpha, rate=16, codec="ffv1", pix_fmt="bgra")
    prepare(pipeline, root)
    (entry,) = entries(root).values()
    assert entry.mask == "alpha"
    np.testing.assert_allclose(Cache(root / "cache").mask(entry)[0].numpy(), cells_of(seen[0]), atol=1e-6)
    shown = ((seen[0][:, 3] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(shown, frames[3])  # also where it is transparent


@pytest.mark.parametrize("kind", ["video", "folder"])
def test_a_mask_of_another_number_of_frames_is_refused_with_both_counts(root, pipeline, kind):
    clip(root, mask=None)
    masks = videos.square_masks(13)
    if kind == "video":
        videos.write_video(root / "masks" / "walk.mkv", masks, **GREY)
    else:
        videos.write_frames(root / "masks" / "walk", masks)
    with pytest.raises(ValueError, match=r"walk.*13 frames.*walk\.mkv.*20|walk\.mkv.*20.*walk.*13"):
        prepare(pipeline, root)


def test_a_moving_mask_of_another_shape_is_refused(root, pipeline):
    clip(root, mask=None)
    videos.write_video(root / "masks" / "walk.mkv", videos.square_masks(20, (96, 80)), **GREY)
    with pytest.raises(ValueError, match="the mask is 96x80, its image 96x64"):
        prepare(pipeline, root)


def test_a_moving_mask_for_an_image_is_refused(root, pipeline):
    Image.new("RGB", (96, 64)).save(root / "photos" / "still.png")
    videos.write_video(root / "masks" / "still.mkv", videos.square_masks(20), **GREY)
    with pytest.raises(ValueError, match="still"):
        prepare(pipeline, root)


# ---------------------------------------------------------------- samples


@pytest.mark.slow
def test_clips_are_named_by_start_and_length_and_keep_together(root, pipeline, architecture):
    for name in "abcd":
        clip(root, name, count=40, mask=None)
    prepare(pipeline, root, "data.clips.extract=all", "data.flip=true")
    rows = entries(root)
    assert [key for key in rows if key.startswith("a")] == [
        "a@00000-017", "a@00000-017@flip", "a@00017-017", "a@00017-017@flip", "a@00034-005", "a@00034-005@flip",
    ]  # fmt: skip
    assert {row.origin for row in rows.values()} == set("abcd")
    data = LatentDataModule(architecture=architecture, cache_dir=str(root / "cache"), val_fraction=0.25)
    data.setup()
    held = {entry.origin for entry in data.val_entries}
    assert len(held) == 1
    assert held.isdisjoint(entry.origin for entry in data.train_entries)
    assert len(data.val_entries) == 3


def test_images_and_videos_share_a_run_in_batches_of_one_shape(root, pipeline, architecture):
    clip(root, "a", count=20)
    clip(root, "b", count=10)
    clip(root, "c", count=20, size=(64, 96))
    helpers.draw_photos(root / "more", root / "morem", 4)
    for folder, target in (("more", "photos"), ("morem", "masks")):
        for path in (root / folder).iterdir():
            path.rename(root / target / path.name)
    summary = prepare(pipeline, root)
    assert summary.buckets == Counter(
        {(96, 64, 17): 1, (96, 64, 9): 1, (64, 96, 17): 1, (64, 80, 1): 2, (96, 64, 1): 2}
    )
    assert "samples: 7, 3 of them clips of 3 videos" in "\n".join(summary.lines())
    _, module = helpers.train(
        pipeline, root / "cache", root / "out", "trainer.max_steps=-1", "trainer.max_epochs=1", "data.batch_size=4"
    )
    assert module.samples_seen == 7


@pytest.mark.slow
def test_previews_show_key_frames(root, pipeline):
    clip(root, count=40)
    prepare(pipeline, root, "data.clips.frames=[37]")
    (entry,) = entries(root).values()
    cache = Cache(root / "cache")
    assert entry.shape[1] == 10
    names = {0: f"{entry.key}.jpg", **{n: f"{entry.key}.frame{n}.jpg" for n in (1, 3, 4, 5, 6, 8, 9)}}
    assert {path.name for path in (cache.folder / "previews").iterdir()} == set(names.values())
    for latent, name in names.items():
        number = videos.read_number(Image.open(cache.folder / "previews" / name))
        assert number == 0 if latent == 0 else number in range(1 + 4 * (latent - 1), 1 + 4 * latent)


# ---------------------------------------------------------------- what is current


@pytest.mark.slow
def test_a_second_run_neither_decodes_nor_encodes(root, pipeline, monkeypatch):
    clip(root)
    clip(root, "b", mask="folder")
    prepare(pipeline, root)
    monkeypatch.setattr(WanEncoders, "vae", lambda self: pytest.fail("VAE loaded"))
    monkeypatch.setattr(mpp.cache.fingerprints, "read_timeline", lambda path: pytest.fail("decoded"))
    summary = prepare(pipeline, root)
    assert (summary.encoded, summary.current, summary.masks_written, summary.masks_current) == (0, 2, 0, 2)


@pytest.mark.parametrize("mask", ["video", pytest.param("folder", marks=SLOW)])
def test_an_edited_moving_mask_is_written_without_encoding(root, pipeline, monkeypatch, mask):
    clip(root, mask=mask)
    prepare(pipeline, root)
    cache, (entry,) = Cache(root / "cache"), entries(root).values()
    before = cache.mask(entry)
    if mask == "video":
        videos.write_video(root / "masks" / "walk.mkv", [255 - m for m in videos.square_masks(20)], **GREY)
    else:
        for path in (root / "masks" / "walk").iterdir():
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    monkeypatch.setattr(WanEncoders, "vae", lambda self: pytest.fail("VAE loaded"))
    summary = prepare(pipeline, root)
    assert (summary.masks_written, summary.encoded) == (1, 0)
    assert torch.allclose(cache.mask(entry), 1 - before, atol=1e-6)


@pytest.mark.slow
def test_other_clips_of_a_video_are_encoded_again(root, pipeline):
    clip(root, count=40)
    prepare(pipeline, root)
    summary = prepare(pipeline, root, "data.clips.fps=8")
    assert summary.encoded == 1
    summary = prepare(pipeline, root, "data.clips.fps=8", "data.clips.extract=uniform", "data.clips.count=2")
    assert (summary.encoded, summary.current) == (1, 1)
    assert len(entries(root)) == 2


# ---------------------------------------------------------------- bad input


@pytest.mark.slow
def test_videos_that_cannot_be_used_stop_before_encoding_or_are_skipped_by_name(root, pipeline, seen):
    clip(root, "good")
    clip(root, "short", count=3)
    videos.damage(clip(root, "torn", count=30), 12)
    (root / "photos" / "empty.mp4").write_bytes(b"")
    (root / "photos" / "text.mp4").write_text("no video")
    videos.write_sound(root / "photos" / "sound.mp4")
    with pytest.raises(ValueError, match=r"(?s)empty\.mp4.*short\.mkv.*sound\.mp4.*text\.mp4.*torn\.mkv"):
        prepare(pipeline, root)
    assert seen == []
    summary = prepare(pipeline, root, "data.on_error=skip")
    assert len(summary.skipped) == 5
    assert list(entries(root)) == ["good@00000-017"]
    assert Cache(root / "cache").notes().skipped == tuple(summary.skipped)


def test_lengths_off_the_grid_are_refused_with_those_next_to_them(root, pipeline):
    clip(root)
    with pytest.raises(ValueError, match="instead of 16 use 13 or 17"):
        prepare(pipeline, root, "data.clips.frames=[5,16]")


def test_a_model_of_images_takes_no_videos(root, tmp_path):
    clip(root)
    cfg = helpers.config(
        "prepare",
        ["model=toy", f"data.image_dir={root / 'photos'}", f"data.cache_dir={root / 'cache'}", "data.resolution=16"],
    )
    from mpp.config import build
    from mpp.preparing.preparation import Preparation

    with pytest.raises(ValueError, match=r"walk\.mkv: this model learns single images"):
        Preparation(build(cfg.data), build(cfg.model), "cpu").run()


def test_frame_masks_that_cannot_be_read_stop_before_encoding_or_are_skipped(root, pipeline, seen):
    clip(root, "good")
    clip(root, "torn", mask="folder")
    Image.new("RGB", (96, 64), (255, 0, 0)).save(root / "masks" / "torn" / "frame9.png")
    with pytest.raises(ValueError, match=r"frame9\.png"):
        prepare(pipeline, root)
    assert seen == []
    summary = prepare(pipeline, root, "data.on_error=skip")
    assert len(summary.skipped) == 1
    assert list(entries(root)) == ["good@00000-017"]


def test_what_file_managers_leave_in_a_folder_of_frames_changes_nothing(root, pipeline):
    clip(root, mask="folder")
    prepare(pipeline, root)
    (root / "masks" / "walk" / ".DS_Store").write_bytes(b"x")
    (root / "masks" / "walk" / "notes.txt").write_text("x")
    assert prepare(pipeline, root).masks_written == 0


@pytest.mark.slow
def test_an_index_does_not_outlive_the_samples_that_it_names(root, pipeline, monkeypatch):
    """Killed between latents and masks of other clips: latents and mask would show different moments."""
    clip(root, count=40)
    prepare(pipeline, root, "data.clips.fps=16")
    from mpp.preparing.preparation import Preparation

    monkeypatch.setattr(Preparation, "_write_masks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(pipeline, root, "data.clips.fps=8")
    with pytest.raises(ValueError, match="is not finished"):
        Cache(root / "cache").entries()
    monkeypatch.undo()
    assert prepare(pipeline, root, "data.clips.fps=8").masks_written == 1
    assert len(entries(root)) == 1


def test_an_image_that_is_called_like_a_clip_is_refused(root, pipeline):
    clip(root)
    Image.new("RGB", (96, 64)).save(root / "photos" / "walk@00000-017.png")
    with pytest.raises(
        ValueError, match=r"walk@00000-017\.png.* both make the sample walk@00000-017; rename one|walk\.mkv.* both make"
    ):
        prepare(pipeline, root)


def test_starts_without_chosen_clips_are_refused(root, pipeline):
    clip(root)
    with pytest.raises(ValueError, match=r"data.clips.starts=\[3\] is for data.clips.extract=chosen, got head"):
        prepare(pipeline, root, "data.clips.starts=[3]")
