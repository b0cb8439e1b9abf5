"""Masks of the main object: the ONNX file's own output as the witness of the network, plain loops for what follows."""

import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.masking.salient import Salient, medians, with_core
from tests.masking.files import levels, png16, read_video, run, save, write_video

PHOTOS = Path(__file__).with_name("photos")
NAMES = ["cat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("astronaut", "coffee"))]


def witness(name, size):
    """Probabilities by onnxruntime, of a photo's size."""
    with Image.open(PHOTOS / f"{name}_u2netp.png") as image:
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR)) / 255


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.fixture
def bright(monkeypatch):
    """In place of the network: what is bright is likely."""

    def chance(self, image):
        return np.asarray(image.convert("L").resize((320, 320), Image.Resampling.BOX), np.float32) / 255

    monkeypatch.setattr(Salient, "_chance", chance)


def box(shape, rows, columns, inside=255, outside=0):
    image = np.full((*shape, 3), outside, np.uint8)
    image[slice(*rows), slice(*columns)] = inside
    return image


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_are_those_of_the_onnx_file(name, tmp_path):
    shutil.copy(PHOTOS / f"{name}.jpg", tmp_path)
    run("salient", tmp_path / f"{name}.jpg", tmp_path / "out", "tool.softness=1")  # the mask is the probability then
    got = levels(tmp_path / "out" / f"{name}.png") / 255
    want = witness(name, got.shape[::-1])
    assert np.abs(got - want).max() < 0.03  # of weights in 16 bits; 0.014 measured
    assert np.abs(got - want).mean() < 0.002
    assert iou(got > 0.5, want > 0.5) > 0.995
    assert 0.2 < (got > 0.5).mean() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cat", "astronaut", "coffee"])
def test_black_and_white_masks_are_those_of_the_onnx_file(name, tmp_path):
    shutil.copy(PHOTOS / f"{name}.jpg", tmp_path)
    run("salient", tmp_path / f"{name}.jpg", tmp_path / "out", "tool.softness=0")
    got = levels(tmp_path / "out" / f"{name}.png")
    assert set(np.unique(got)) == {0, 255}
    assert iou(got > 0, witness(name, got.shape[::-1]) > 0.5) > 0.99


@pytest.mark.slow
def test_images_of_any_kind_give_one_mask(tmp_path):
    photo = Image.open(PHOTOS / "coffee.jpg")
    grey = np.asarray(photo.convert("L"))
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / "rgb.png")
    save(tmp_path / "in" / "grey.png", grey)
    png16(tmp_path / "in" / "deep.png", np.asarray(photo).astype(np.uint16) * 257)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "in" / "turned.png", exif=exif)
    opaque = np.full((*grey.shape, 1), 255, np.uint8)
    opaque[0, 0] = 90  # a soft corner is no cut-out
    save(tmp_path / "in" / "alpha.png", np.concatenate([np.asarray(photo), opaque], 2))
    summary = run("salient", tmp_path / "in", tmp_path / "out")
    assert (len(summary.written), summary.black) == (5, ())
    want = levels(tmp_path / "out" / "rgb.png")
    for name in ("deep", "turned", "alpha"):
        np.testing.assert_array_equal(levels(tmp_path / "out" / f"{name}.png"), want)
    assert iou(levels(tmp_path / "out" / "grey.png") > 127, want > 127) > 0.9


@pytest.mark.slow
def test_images_without_an_object_give_black_masks(tmp_path):
    dusk = np.linspace((20, 30, 90), (220, 160, 90), 200).astype(np.uint8)
    save(tmp_path / "in" / "dusk.png", np.repeat(dusk[:, None], 300, 1))
    for value in (0, 128, 255):
        save(tmp_path / "in" / f"flat{value}.png", np.full((90, 120, 3), value, np.uint8))
    summary = run("salient", tmp_path / "in", tmp_path / "out")
    assert len(summary.black) == 4
    assert summary.lines()[-1].startswith("4 are wholly black, as nothing was found; draw these masks: ")
    assert "flat128.png" in summary.lines()[-1]


@pytest.mark.slow
def test_a_clip_that_stands_still_has_the_mask_of_its_image(tmp_path):
    photo = np.asarray(Image.open(PHOTOS / "cat.jpg"))[:168]
    save(tmp_path / "in" / "still.png", photo)
    write_video(tmp_path / "in" / "clip.mkv", [photo] * 3, form="bgr0", layout="rgb24")
    run("salient", tmp_path / "in", tmp_path / "out")
    for frame in read_video(tmp_path / "out" / "clip.mkv")[0]:
        np.testing.assert_array_equal(frame, levels(tmp_path / "out" / "still.png"))


# ---------------------------------------------------------------- from probabilities to masks


def test_masks_rise_over_the_edge_and_are_black_and_white_beside_it(bright, tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 320).round().astype(np.uint8)[None], 320, 0)
    save(tmp_path / "in" / "ramp.png", ramp)
    draws = np.random.default_rng(1)
    for number in range(5):
        threshold = draws.uniform(0.2, 0.8)
        softness = draws.uniform(0, 2 * min(threshold, 1 - threshold))
        words = [f"tool.threshold={threshold}", f"tool.softness={softness}"]
        run("salient", tmp_path / "in", tmp_path / str(number), *words)
        got = levels(tmp_path / str(number) / "ramp.png")[0]
        for level, mask in zip(ramp[0] / 255, got, strict=True):
            low, high = threshold - softness / 2, threshold + softness / 2
            want = 0 if level < low else 255 if level > high else 255 * (level - low) / (high - low)
            assert abs(mask - want) <= 1


def test_what_is_nowhere_likely_is_no_object(bright, tmp_path):
    image = box((160, 200), (20, 70), (20, 80)) + box((160, 200), (100, 140), (110, 170), inside=110)
    save(tmp_path / "in" / "two.png", image)
    save(tmp_path / "in" / "none.png", box((60, 60), (20, 40), (20, 40), inside=110))
    summary = run("salient", tmp_path / "in", tmp_path / "out")
    got = levels(tmp_path / "out" / "two.png")
    assert got[45, 50] == 255
    assert not got[90:].any()
    assert not levels(tmp_path / "out" / "none.png").any()
    assert [path.name for path in summary.black] == ["none.png"]


def flooded(chance, low, threshold):
    """The same by a plain flood fill from the likely pixels."""
    kept = np.zeros_like(chance)
    waiting = deque(zip(*np.nonzero(chance >= threshold), strict=True))
    while waiting:
        row, column = waiting.popleft()
        if kept[row, column] or chance[row, column] < low:
            continue
        kept[row, column] = chance[row, column]
        near = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        waiting += [(r, c) for r, c in near if 0 <= r < chance.shape[0] and 0 <= c < chance.shape[1]]
    return kept


def test_parts_without_a_core_go_and_others_stay_whole():
    draws = np.random.default_rng(2)
    for _ in range(30):
        chance = draws.uniform(0.01, 1, draws.integers(1, 25, 2)) ** 2
        low, threshold = sorted(draws.uniform(0.1, 0.9, 2))
        np.testing.assert_array_equal(with_core(chance, low, threshold), flooded(chance, low, threshold))


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (500, 2), (17, 9)])
def test_masks_have_the_size_of_their_image(bright, tmp_path, shape):
    save(tmp_path / "in" / "a.png", np.full((*shape, 3), 255, np.uint8))
    run("salient", tmp_path / "in", tmp_path / "out")
    got = levels(tmp_path / "out" / "a.png")
    assert got.shape == shape
    assert (got == 255).all()


def test_a_cut_out_is_its_own_mask(bright, tmp_path):
    draws = np.random.default_rng(3)
    rgba = draws.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    save(tmp_path / "in" / "cut.png", rgba)
    frames = [np.dstack([rgba[..., :3], np.full((40, 50), 255, np.uint8)]), rgba]  # the first one is opaque
    write_video(tmp_path / "in" / "clip.mkv", frames, form="bgra", layout="rgba")
    run("salient", tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(levels(tmp_path / "out" / "cut.png"), rgba[..., 3])
    got, _ = read_video(tmp_path / "out" / "clip.mkv")
    np.testing.assert_array_equal(got[1], rgba[..., 3])
    assert (got[0] == 255).all()


# ---------------------------------------------------------------- over time


def test_each_frame_is_the_median_of_those_around_it():
    draws = np.random.default_rng(4)
    for _ in range(20):
        frames = draws.random((draws.integers(1, 12), 3, 4)).astype(np.float32)
        window = 2 * int(draws.integers(0, 4)) + 1
        got = list(medians(iter(frames), window))
        assert len(got) == len(frames)
        for number, frame in enumerate(got):
            reach = min(window // 2, number, len(frames) - 1 - number)
            for at in np.ndindex(3, 4):
                around = sorted(frames[n][at] for n in range(number - reach, number + reach + 1))
                assert frame[at] == around[reach]


def test_edges_that_pass_are_not_moved():
    rows, columns = np.mgrid[:40, :60]
    draws = np.random.default_rng(5)
    for _ in range(5):
        speed, angle = draws.uniform(0.5, 6), draws.uniform(0, 2 * np.pi)
        way = np.cos(angle) * columns + np.sin(angle) * rows
        frames = [1 / (1 + np.exp(way - 20 - speed * n)) for n in range(12)]  # falls or rises everywhere
        for before, after in zip(frames, medians(iter(frames), 5), strict=True):
            np.testing.assert_array_equal(before, after)


def test_what_flickers_goes_and_moving_objects_stay(bright, tmp_path):
    clean = [box((64, 96), (20, 44), (8 + 2 * n, 60 + 2 * n)) for n in range(12)]
    faulty = [frame.copy() for frame in clean]
    faulty[4][:], faulty[8][50:60, 80:90] = 0, 255  # the object is missing once, another one there once
    for name, frames in (("clean", clean), ("faulty", faulty)):
        write_video(tmp_path / "in" / f"{name}.mkv", frames, form="bgr0", layout="rgb24")
    run("salient", tmp_path / "in", tmp_path / "out", "tool.softness=0")
    (want, _), (got, _) = (read_video(tmp_path / "out" / f"{name}.mkv") for name in ("clean", "faulty"))
    for number, (first, second) in enumerate(zip(want, got, strict=True)):
        assert iou(first > 0, clean[number][..., 0] > 0) > 0.95
        assert iou(first > 0, second > 0) > 0.9
        assert not second[48:].any()
    run("salient", tmp_path / "in", tmp_path / "each", "tool.softness=0", "tool.smooth=1")
    each, _ = read_video(tmp_path / "each" / "faulty.mkv")
    assert not each[4].any()
    assert each[8][55, 85]


def test_frames_of_a_folder_are_smoothed_as_a_clip(bright, tmp_path):
    frames = [box((32, 32), (8, 24), (8, 24))] * 5
    frames[2] = np.zeros_like(frames[0])
    for number, frame in enumerate(frames):
        save(tmp_path / "in" / "clip" / f"{number}.png", frame)
    run("salient", tmp_path / "in", tmp_path / "out", "frame_folders=true")
    assert levels(tmp_path / "out" / "clip" / "2.png")[16, 16] == 255
    run("salient", tmp_path / "in", tmp_path / "alone")
    assert not levels(tmp_path / "alone" / "clip" / "2.png").any()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "tool.threshold must be between 0 and 1, both excluded, got 0.0"),
        ({"threshold": 1.0}, "got 1.0"),
        ({"threshold": float("nan")}, "got nan"),
        ({"softness": -0.1}, "tool.softness must be between 0 and 1 with tool.threshold=0.5, .*got -0.1"),
        ({"threshold": 0.9}, "tool.softness must be between 0 and 0.2 with tool.threshold=0.9, .*got 0.8"),
        ({"smooth": 4}, "tool.smooth must be 1, 3, 5 or another odd number of frames, got 4"),
        ({"smooth": 0}, "got 0"),
        ({"smooth": -1}, "got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Salient(**settings)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device=xpu:77 cannot be used: "):
        Salient(device="xpu:77").prepare([])
