import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mpp.masking.alpha import ToAlpha
from mpp.media.images import read_image
from tests.masking.files import levels, png16, random_mask, read_png16, read_video, run, save, write_video


def rgba(seed, shape=(9, 13), top=256, dtype=np.uint8, channels=4):
    return np.random.default_rng(seed).integers(0, top, (*shape, channels), dtype=dtype)


# ---------------------------------------------------------------- from_alpha


def test_alpha_becomes_a_mask_exactly(tmp_path):
    array = rgba(0)
    save(tmp_path / "in" / "a.png", array)
    save(tmp_path / "in" / "sub" / "b.webp", array, lossless=True, exact=True)
    run("from_alpha", tmp_path / "in", tmp_path / "out")
    for name in ("a.png", "sub/b.png"):
        np.testing.assert_array_equal(levels(tmp_path / "out" / name), array[..., 3])


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bits_of_alpha_stay_16(tmp_path, channels):
    array = rgba(1, top=65536, dtype=np.uint16, channels=channels)
    png16(tmp_path / "in" / "a.png", array)
    run("from_alpha", tmp_path / "in", tmp_path / "out")
    got = levels(tmp_path / "out" / "a.png")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, array[..., -1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_as_pillow_turns_shallow_ones(tmp_path, orientation):
    array = rgba(2, top=256, dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "in" / "shallow.png", array, exif=exif)
    deep = png16(tmp_path / "in" / "deep.png", array.astype(np.uint16) * 257)
    with Image.open(tmp_path / "in" / "shallow.png") as image:
        chunk = image.info["exif"].removeprefix(b"Exif\0\0")
    data = deep.read_bytes()
    body = b"eXIf" + chunk
    deep.write_bytes(data[:33] + struct.pack(">I", len(chunk)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:])
    run("from_alpha", tmp_path / "in", tmp_path / "out")
    shallow = levels(tmp_path / "out" / "shallow.png")
    assert shallow.shape == ((9, 13) if orientation < 5 else (13, 9))
    np.testing.assert_array_equal(levels(tmp_path / "out" / "deep.png"), shallow.astype(np.uint16) * 257)


def test_images_without_alpha_fail_or_are_white(tmp_path):
    save(tmp_path / "in" / "a.png", rgba(0))
    save(tmp_path / "in" / "b.jpg", rgba(0)[..., :3])
    with pytest.raises(ValueError, match=r"b\.jpg has no alpha channel; set tool.missing=white"):
        run("from_alpha", tmp_path / "in", tmp_path / "out")
    run("from_alpha", tmp_path / "in", tmp_path / "out", "tool.missing=white")
    assert (levels(tmp_path / "out" / "b.png") == 255).all()
    assert levels(tmp_path / "out" / "b.png").shape == (9, 13)


def test_alpha_of_a_video_becomes_a_mask_video(tmp_path):
    frames = [rgba(seed, (10, 12)) for seed in range(3)]
    write_video(tmp_path / "in" / "v.mkv", frames, form="bgra", layout="rgba")
    run("from_alpha", tmp_path / "in", tmp_path / "out")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    for frame, want in zip(got, frames, strict=True):
        np.testing.assert_array_equal(frame, want[..., 3])


# ---------------------------------------------------------------- to_alpha


@pytest.mark.parametrize("form", ["png", "bmp", "webp", "jpg", "grey"])
def test_colours_stay_exact_also_where_alpha_is_0(tmp_path, form):
    colours, mask = rgba(3, channels=3), random_mask(4)
    mask[:4] = 0
    path = save(
        tmp_path / "in" / f"p.{'png' if form == 'grey' else form}",
        colours[..., 0] if form == "grey" else colours,
        **({"lossless": True} if form == "webp" else {}),
    )
    save(tmp_path / "masks" / "p.png", mask)
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got = levels(tmp_path / "out" / "p.png")
    with Image.open(path) as image:
        np.testing.assert_array_equal(got[..., :3], np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(got[..., 3], mask)


def test_there_and_back_is_the_mask(tmp_path):
    save(tmp_path / "in" / "p.png", rgba(5, channels=3))
    save(tmp_path / "masks" / "p.png", random_mask(6))
    run("to_alpha", tmp_path / "in", tmp_path / "rgba", f"tool.masks={tmp_path / 'masks'}")
    run("from_alpha", tmp_path / "rgba", tmp_path / "back")
    np.testing.assert_array_equal(levels(tmp_path / "back" / "p.png"), random_mask(6))
    np.testing.assert_allclose(read_image(tmp_path / "rgba" / "p.png").alpha, random_mask(6) / 255, atol=1e-7)


@pytest.mark.parametrize("deep", ["image", "mask", "both"])
def test_16_bits_of_either_make_16_bits(tmp_path, deep):
    colours, mask = rgba(7, channels=3), random_mask(8)
    if deep in ("image", "both"):
        colours = rgba(7, top=65536, dtype=np.uint16, channels=3)
        png16(tmp_path / "in" / "p.png", colours)
    else:
        save(tmp_path / "in" / "p.png", colours)
    if deep in ("mask", "both"):
        mask = random_mask(8, top=65536, dtype=np.uint16)
    save(tmp_path / "masks" / "p.png", mask)
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got, text = read_png16(tmp_path / "out" / "p.png")
    np.testing.assert_array_equal(got[..., :3], colours if deep != "mask" else colours.astype(np.uint16) * 257)
    np.testing.assert_array_equal(got[..., 3], mask if deep != "image" else mask.astype(np.uint16) * 257)
    assert '"tool": "ToAlpha"' in text["mpp"]
    with Image.open(tmp_path / "out" / "p.png") as image:  # Pillow reads it, in 8 bits
        np.testing.assert_array_equal(np.asarray(image)[..., :3], got[..., :3] >> 8)
    assert len(run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}").kept) == 1


@pytest.mark.parametrize("deep", [False, True])
def test_colour_profiles_are_kept(tmp_path, deep):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path / "in" / "p.png", rgba(0, channels=3), icc_profile=profile)
    save(
        tmp_path / "masks" / "p.png", random_mask(1, top=65536 if deep else 256, dtype=np.uint16 if deep else np.uint8)
    )
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    with Image.open(tmp_path / "out" / "p.png") as image:
        assert image.info["icc_profile"] == profile


def test_turned_photos_get_upright_alpha(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    colours, mask = rgba(9, channels=3), random_mask(10, (13, 9))
    save(tmp_path / "in" / "p.png", colours, exif=exif)
    save(tmp_path / "masks" / "p.png", mask)
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got = levels(tmp_path / "out" / "p.png")
    np.testing.assert_array_equal(got, np.dstack([np.rot90(colours, -1), mask]))
    assert read_image(tmp_path / "out" / "p.png").rgb.size == (9, 13)  # and is not turned again


def test_sizes_must_agree_or_be_made_to(tmp_path):
    save(tmp_path / "in" / "p.png", rgba(0, (20, 30), channels=3))
    save(tmp_path / "masks" / "p.png", np.full((10, 15), 255, np.uint8))
    with pytest.raises(ValueError, match="sizes differ, 15x10 and 30x20"):
        run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}", "tool.resize=true")
    assert (levels(tmp_path / "out" / "p.png")[..., 3] == 255).all()


def test_images_without_a_mask_fail_or_become_opaque(tmp_path):
    for name in ("p", "q"):
        save(tmp_path / "in" / f"{name}.png", rgba(0, channels=3))
    save(tmp_path / "masks" / "p.png", random_mask(1))
    with pytest.raises(ValueError, match=r"q\.png has nothing of its name in tool.masks"):
        run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}", "tool.missing=white")
    assert (levels(tmp_path / "out" / "q.png")[..., 3] == 255).all()


def test_a_video_with_a_mask_video_gets_alpha_without_loss(tmp_path):
    frames = [rgba(seed, (10, 12), channels=3) for seed in range(3)]
    masks = [random_mask(seed, (10, 12)) for seed in range(3)]
    write_video(tmp_path / "in" / "v.mkv", frames, form="bgr0", layout="rgb24")
    write_video(tmp_path / "masks" / "v.mkv", masks)
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got, _ = read_video(tmp_path / "out" / "v.mkv", "rgba")
    for frame, colours, mask in zip(got, frames, masks, strict=True):
        np.testing.assert_array_equal(frame, np.dstack([colours, mask]))


@pytest.mark.parametrize("path", ["out.jpg", "out.png", "out.MP4"])
def test_results_are_no_jpegs(tmp_path, path):
    save(tmp_path / "in" / "p.png", rgba(0, channels=3))
    save(tmp_path / "masks" / "p.png", random_mask(1))
    with pytest.raises(ValueError, match=rf"{path} must be a folder; results are written as .png and .mkv"):
        run("to_alpha", tmp_path / "in", tmp_path / path, f"tool.masks={tmp_path / 'masks'}")


def test_to_alpha_needs_masks():
    with pytest.raises(ValueError, match="tool.masks=... is missing"):
        ToAlpha()


# ---------------------------------------------------------------- preview


def test_white_is_shown_as_learned_and_black_as_preserved(tmp_path):
    colours = rgba(0, (10, 20), channels=3)
    mask = np.zeros((10, 20), np.uint8)
    mask[:, 10:] = 255
    save(tmp_path / "in" / "p.png", colours)
    save(tmp_path / "masks" / "p.png", mask)
    run("preview", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got = levels(tmp_path / "out" / "p.png")
    grey = np.asarray(Image.fromarray(colours).convert("L")).astype(float)[..., None]
    assert np.abs(got[:, 10:] - (grey[:, 10:] + (213, 94, 0)) / 2).max() <= 0.5
    hatched = np.abs(got[:, :10] - (grey[:, :10] + (150, 205, 245)) / 2).max(2) <= 0.5
    plain = np.abs(got[:, :10] - (grey[:, :10] + (0, 114, 178)) / 2).max(2) <= 0.5
    assert (hatched ^ plain).all()
    assert 0.2 < hatched.mean() < 0.5


def test_wide_previews_stand_above_a_legend(tmp_path):
    save(tmp_path / "in" / "p.png", rgba(0, (100, 320), channels=3))
    save(tmp_path / "masks" / "p.png", np.full((100, 320), 255, np.uint8))
    run("preview", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got = levels(tmp_path / "out" / "p.png").astype(int)
    assert got.shape[1] == 320
    assert 110 < got.shape[0] < 140
    below = got[100:]
    assert (below[..., 0] - below[..., 2]).max() > 90  # learned
    assert (below[..., 2] - below[..., 0]).max() > 80  # preserved


def test_previews_are_small_and_take_masks_of_any_size_of_the_same_shape(tmp_path):
    save(tmp_path / "in" / "p.png", rgba(0, (100, 200), channels=3))
    save(tmp_path / "masks" / "p.png", np.full((10, 20), 255, np.uint8))
    masks = f"tool.masks={tmp_path / 'masks'}"
    run("preview", tmp_path / "in", tmp_path / "out", masks, "tool.side=64")
    assert levels(tmp_path / "out" / "p.png").shape == (32, 64, 3)
    save(tmp_path / "masks" / "p.png", np.full((20, 20), 255, np.uint8))
    with pytest.raises(ValueError, match="another aspect ratio"):
        run("preview", tmp_path / "in", tmp_path / "out2", masks)


def test_making_masks_can_show_them_at_once(tmp_path):
    save(tmp_path / "in" / "sub" / "p.png", rgba(0))
    summary = run("from_alpha", tmp_path / "in", tmp_path / "out", f"preview={tmp_path / 'look'}")
    assert len(summary.written) == 1
    first = levels(tmp_path / "look" / "sub" / "p.png")
    run("preview", tmp_path / "in", tmp_path / "look2", f"tool.masks={tmp_path / 'out'}")
    np.testing.assert_array_equal(first, levels(tmp_path / "look2" / "sub" / "p.png"))
    (tmp_path / "look" / "sub" / "p.png").unlink()  # and again where the masks are there already
    assert len(run("from_alpha", tmp_path / "in", tmp_path / "out", f"preview={tmp_path / 'look'}").kept) == 1
    np.testing.assert_array_equal(levels(tmp_path / "look" / "sub" / "p.png"), first)


def test_previews_never_replace_other_files(tmp_path):
    save(tmp_path / "in" / "p.png", rgba(0))
    save(tmp_path / "look" / "p.png", rgba(1))
    with pytest.raises(ValueError, match=r"look/p\.png is there already and is no preview"):
        run("from_alpha", tmp_path / "in", tmp_path / "out", f"preview={tmp_path / 'look'}")
    np.testing.assert_array_equal(levels(tmp_path / "look" / "p.png"), rgba(1))


def test_previews_of_mask_tools_say_how(tmp_path):
    save(tmp_path / "in" / "p.png", random_mask(0))
    with pytest.raises(ValueError, match="look at others with tool=preview input=PICTURES tool.masks=.*out"):
        run("invert", tmp_path / "in", tmp_path / "out", f"preview={tmp_path / 'look'}")
