import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from upath import UPath

import mpp.media.decoding
from mpp.media.decoding import OpenVideo
from mpp.media.videos import Timeline, check_counts, read_alpha_frames, read_frames, read_mask_frames, read_timeline
from tests.media import videos

X264 = "log-level=none:keyint=12:scenecut=0"
CODECS = {  # file: encoder, pixels, options
    "h264.mp4": ("libx264", "yuv420p", {"g": "12"}),
    "h264.mkv": ("libx264", "yuv420p", {"g": "12"}),
    "h264.avi": ("libx264", "yuv420p", {"g": "12"}),
    "h264.ts": ("libx264", "yuv420p", {"g": "12"}),
    "h264.flv": ("libx264", "yuv420p", {"g": "12", "preset": "ultrafast", "threads": "1"}),  # the same bytes always
    "open_gop.mp4": ("libx264", "yuv420p", {"x264-params": f"{X264}:open-gop=1:bframes=3"}),
    "refreshed.mp4": ("libx264", "yuv420p", {"x264-params": f"{X264}:intra-refresh=1:bframes=0"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12:bframes=3"}),
    "hevc10.mkv": ("libx265", "yuv420p10le", {"x265-params": "log-level=none:keyint=12"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "12"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "ffv1.mkv": ("ffv1", "bgr0", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "animation.mov": ("qtrle", "rgb24", {}),
    "wmv.wmv": ("wmv2", "yuv420p", {}),
}
COUNT = 40
KEYED = sorted(CODECS.keys() - {"refreshed.mp4", "h264.avi", "animation.mov"})
CLOCKWISE = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # a phone held upright


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One video of each kind, with numbered frames."""
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, pixels, options) in CODECS.items():
        videos.write_video(folder / name, videos.number_frames(COUNT), codec=codec, pix_fmt=pixels, options=options)
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of the frames that were decoded."""
    found = []
    check = OpenVideo._check

    def spy(self, frame, number):
        found.append(number)
        check(self, frame, number)

    monkeypatch.setattr(OpenVideo, "_check", spy)
    return found


def lossless(path, frames, **settings):
    return videos.write_video(path, frames, codec="png", pix_fmt="rgb24", **settings)


def every(path):
    timeline = read_timeline(path)
    return list(read_frames(path, timeline, range(timeline.count)))


# ---------------------------------------------------------------- frames and their times


@pytest.mark.parametrize("name", CODECS)
def test_every_frame_is_read_in_order_with_its_time(written, name):
    timeline = read_timeline(written / name)
    assert (timeline.size, timeline.count) == ((96, 64), COUNT)
    np.testing.assert_allclose(timeline.times, np.arange(COUNT) / 24, atol=1e-3)  # some containers count milliseconds
    assert timeline.duration == pytest.approx(COUNT / 24, abs=2e-3)
    assert not timeline.transparent
    images = read_frames(written / name, timeline, range(COUNT))
    assert [videos.read_number(image) for image in images] == list(range(COUNT))


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_the_same_wherever_reading_begins(written, name):
    timeline = read_timeline(written / name)
    want = [np.asarray(image) for image in read_frames(written / name, timeline, range(COUNT))]
    for first in (0, 1, 11, 12, 13, 25, 35, 36, 39):
        last = min(first + 3, COUNT - 1)
        got = list(read_frames(written / name, timeline, [first, last]))
        np.testing.assert_array_equal(got[0], want[first])
        np.testing.assert_array_equal(got[1], want[last])


@pytest.mark.parametrize("name", KEYED)
def test_late_frames_are_read_from_the_key_frame_before_them(written, name, decoded):
    timeline = read_timeline(written / name)
    decoded.clear()
    (image,) = read_frames(written / name, timeline, [30])
    assert videos.read_number(image) == 30
    if name == "open_gop.mp4":  # where what is left out is missed, the file is read from its start
        assert decoded.count(30) == 1
        return
    assert decoded[0] > 0
    assert len(decoded) < 13 + 8  # one group of images, and what the decoder holds back


def test_decoding_stops_after_the_last_frame(written, decoded):
    path = written / "ffv1.mkv"
    timeline = read_timeline(path)
    decoded.clear()
    assert len(list(read_frames(path, timeline, [2, 5]))) == 2
    assert decoded == [0, 1, 2, 3, 4, 5]


def test_a_frame_that_repeats_is_one_object(written):
    path = written / "h264.mp4"
    images = list(read_frames(path, read_timeline(path), [3, 3, 4, 9, 9, 9]))
    assert [videos.read_number(image) for image in images] == [3, 3, 4, 9, 9, 9]
    assert images[0] is images[1]
    assert images[3] is images[4] is images[5]
    assert list(read_frames(path, read_timeline(path), [])) == []


def test_numbers_that_are_not_there_or_not_in_order_are_refused(written):
    path = written / "h264.mp4"
    timeline = read_timeline(path)
    for numbers in ([-1], [COUNT], [0, COUNT]):
        with pytest.raises(ValueError, match=f"h264.mp4 has frames 0 to {COUNT - 1}"):
            list(read_frames(path, timeline, numbers))
    with pytest.raises(ValueError, match="ascending"):
        list(read_frames(path, timeline, [4, 3]))


def test_a_timeline_survives_json(written, tmp_path):
    paths = [written / "h264.mkv", videos.write_frames(tmp_path / "walk", videos.number_frames(3))]
    for path in paths:
        timeline = read_timeline(path)
        assert Timeline.from_json(json.loads(json.dumps(timeline.to_json()))) == timeline
    content = timeline.to_json()
    for wrong in ({}, [], content | {"extra": 1}, {k: v for k, v in content.items() if k != "keys"}):
        with pytest.raises(ValueError, match="no timeline"):
            Timeline.from_json(wrong)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_that_come_at_uneven_times_keep_them(tmp_path, suffix):
    times = [0, 40, 50, 200, 210, 700, 740, 1000]
    unit = Fraction(1, 1000)
    path = videos.write_video(tmp_path / f"v.{suffix}", videos.number_frames(8), times=times, unit=unit)
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, np.array(times) / 1000, atol=1e-6)
    assert timeline.duration > 1
    assert videos.read_number(next(read_frames(path, timeline, [5]))) == 5


def test_frames_that_an_avi_leaves_out_stay_on_screen(tmp_path):
    times = [0, 1, 2, 5, 6, 10, 11]
    frames = videos.number_frames(7)
    path = videos.write_video(tmp_path / "v.avi", frames, codec="mpeg4", times=times, unit=Fraction(1, 24))
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, np.array(times) / 24, atol=1e-6)
    assert timeline.duration == pytest.approx(0.5)


def test_a_video_of_one_frame_has_a_length(tmp_path):
    timeline = read_timeline(videos.write_video(tmp_path / "v.mp4", videos.number_frames(1), rate=10))
    assert (timeline.count, timeline.times) == (1, (0.0,))
    assert timeline.duration == pytest.approx(0.1)


def test_times_that_run_backwards_are_refused(tmp_path):
    order = [0, 1, 2, 3, 6, 5, 7, 8]
    path = videos.mix(tmp_path / "v.mkv", [videos.number_frames(8)], order)
    with pytest.raises(ValueError, match=r"v.mkv: the timestamp of frame 5 is missing or not after the one before"):
        read_timeline(path)


def test_a_pause_of_many_minutes_is_refused(tmp_path):
    times = [0, 1000, 2000, 1_000_000]
    path = videos.write_video(tmp_path / "v.mkv", videos.number_frames(4), times=times)
    with pytest.raises(ValueError, match="v.mkv: frame 2 stays for 998 s"):
        read_timeline(path)


def test_videos_are_read_from_object_storage(written):
    remote = UPath("memory://bucket/clips/h264.mp4")
    remote.parent.mkdir(parents=True, exist_ok=True)
    remote.write_bytes((written / "h264.mp4").read_bytes())
    timeline = read_timeline(remote)
    assert timeline == read_timeline(written / "h264.mp4")
    got = read_frames(remote, timeline, [7, 30])
    assert [videos.read_number(image) for image in got] == [7, 30]
    with pytest.raises(ValueError, match=r"memory://bucket/clips/none.mp4 cannot be read"):
        read_timeline(remote.parent / "none.mp4")


# ---------------------------------------------------------------- as they are meant to be seen


def corners():
    """Red top left, green top right, blue bottom left."""
    pixels = np.full((40, 80, 3), 128, np.uint8)
    pixels[:10, :10], pixels[:10, -10:], pixels[-10:, :10] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return pixels


def test_a_phone_video_is_turned_upright(tmp_path):
    path = lossless(tmp_path / "v.mov", [corners()] * 3, matrix=CLOCKWISE)
    timeline = read_timeline(path)
    assert timeline.size == (40, 80)
    (image,) = read_frames(path, timeline, [1])
    assert image.getpixel((35, 4)) == (255, 0, 0)  # turned clockwise, top left comes to the right
    assert image.getpixel((35, 75)) == (0, 255, 0)
    assert image.getpixel((4, 4)) == (0, 0, 255)


@pytest.mark.parametrize(("a", "b"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
@pytest.mark.parametrize("mirror", [1, -1])
def test_each_display_matrix_moves_pixels_as_it_says(tmp_path, a, b, mirror):
    c, d = -mirror * b, mirror * a
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    moved = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(6) for x in range(8)}
    left, top = min(x for x, _ in moved), min(y for _, y in moved)
    shape = (6, 8, 3) if a else (8, 6, 3)
    want = np.zeros(shape, np.uint8)
    for (x, y), value in moved.items():
        want[y - top, x - left] = value
    matrix = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    (image,) = every(lossless(tmp_path / "v.mov", [pixels], matrix=matrix))
    np.testing.assert_array_equal(image, want)


@pytest.mark.parametrize("angle", [2, 10, 45, 60, 100])
def test_a_video_turned_by_an_odd_angle_is_refused(tmp_path, angle):
    cosine, sine = (round(65536 * f(math.radians(angle))) for f in (math.cos, math.sin))
    slanted = [cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30]
    path = lossless(tmp_path / "v.mov", [corners()], matrix=slanted)
    with pytest.raises(ValueError, match=r"v.mov: frame 0 is to be turned by an odd angle"):
        read_timeline(path)


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(4, 3), (128, 64)), (Fraction(1, 2), (96, 128))])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_become_square(tmp_path, aspect, size, suffix):
    path = videos.write_video(tmp_path / f"v.{suffix}", videos.number_frames(3), pixel_aspect=aspect)
    assert read_timeline(path).size == size
    images = every(path)
    assert {image.size for image in images} == {size}
    assert [videos.read_number(image) for image in images] == [0, 1, 2]


def test_absurd_pixel_shapes_are_refused(tmp_path):
    path = videos.write_video(tmp_path / "v.mp4", videos.number_frames(2), pixel_aspect=Fraction(50, 1))
    with pytest.raises(ValueError, match="v.mp4 claims a pixel aspect ratio of 50"):
        read_timeline(path)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("v.mp4", "libx264", "yuv444p"), ("v.webm", "libvpx-vp9", "yuv420p"), ("v.mkv", "ffv1", "yuv420p")],
)
def test_odd_sizes_keep_their_last_row_and_column(tmp_path, name, codec, pixels):
    frame = np.full((63, 97, 3), (20, 160, 40), np.uint8)
    (image,) = every(videos.write_video(tmp_path / name, [frame], codec=codec, pix_fmt=pixels))
    assert image.size == (97, 63)
    assert np.abs(np.asarray(image).astype(int) - frame).max() <= 6


def test_colours_come_by_the_matrix_that_the_stream_names(tmp_path):
    planes = np.empty((96, 64), np.uint8)  # 64x64, 4:2:0: pure red by BT.709, which BT.601 takes for a darker one
    planes[:64], planes[64:80], planes[80:] = 63, 102, 240
    for name, tags in (("hd.mp4", {"colorspace": 1, "color_primaries": 1, "color_trc": 1}), ("sd.mp4", {})):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("libx264", rate=24, options={"crf": "1", "x264-params": "log-level=none"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for tag, value in tags.items():
                setattr(stream.codec_context, tag, value)
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.colorspace = tags.get("colorspace", 2)
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))

    def rgb(red, blue):
        """Limited range to RGB, with the weights of red and blue in the brightness."""
        y, u, v = (63 - 16) / 219, (102 - 128) / 224, (240 - 128) / 224
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        g = (y - red * r - blue * b) / (1 - red - blue)
        return [255 * min(max(value, 0), 1) for value in (r, g, b)]

    for name, weights in (("hd.mp4", (0.2126, 0.0722)), ("sd.mp4", (0.299, 0.114))):
        (image,) = every(tmp_path / name)
        np.testing.assert_allclose(image.getpixel((20, 20)), rgb(*weights), atol=3)


@pytest.mark.parametrize(("transfer", "word"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(tmp_path, transfer, word):
    tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
    path = videos.write_video(tmp_path / "v.mp4", videos.number_frames(2), tags=tags)
    with pytest.raises(ValueError, match=rf"v.mp4: frame 0 has high dynamic range \({word}\)"):
        read_timeline(path)


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.mpg", "mpeg2video")])
def test_interlaced_frames_are_refused(tmp_path, name, codec):
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1:log-level=none"}
    options = options if codec == "libx264" else {"flags": "+ildct+ilme"}
    path = videos.write_video(tmp_path / name, videos.number_frames(5), codec=codec, options=options)
    with pytest.raises(ValueError, match=rf"{name}: frame 0 is interlaced.*deinterlace"):
        read_timeline(path)


# ---------------------------------------------------------------- alpha and masks

ALPHA = [
    ("v.mov", "qtrle", "argb", 0),
    ("v.mov", "prores_ks", "yuva444p10le", 4),
    ("v.mkv", "ffv1", "bgra", 0),
    ("v.webm", "libvpx-vp9", "yuva420p", 4),
]


def half_transparent(count=4):
    frames = np.zeros((count, 64, 96, 4), np.uint8)
    frames[...] = (200, 100, 50, 255)
    frames[:, :, :48, 3] = 0
    frames[2:, :32, :, 3] = 255
    return list(frames)


@pytest.mark.parametrize(("name", "codec", "pixels", "error"), ALPHA)
def test_alpha_is_read_apart_from_the_colours_under_it(tmp_path, name, codec, pixels, error):
    frames = half_transparent()
    path = videos.write_video(tmp_path / name, frames, codec=codec, pix_fmt=pixels)
    timeline = read_timeline(path)
    assert timeline.transparent
    for image in read_frames(path, timeline, range(4)):
        assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= error
    for number, alpha in enumerate(read_alpha_frames(path, timeline, range(4))):
        assert alpha.dtype == np.float32
        inner = np.abs(alpha - frames[number][..., 3] / 255)
        inner[28:36], inner[:, 44:52] = 0, 0  # edges, which codecs blur
        assert inner.max() <= error / 255
    with pytest.raises(ValueError, match=rf"{name}: this mask has a transparent alpha"):
        list(read_mask_frames(path, timeline, [0]))


def test_opaque_alpha_counts_as_none(tmp_path):
    frames = [frame | np.array([0, 0, 0, 255], np.uint8) for frame in half_transparent()]
    path = videos.write_video(tmp_path / "v.mkv", frames, codec="ffv1", pix_fmt="bgra")
    timeline = read_timeline(path)
    assert not timeline.transparent
    assert all((alpha == 1).all() for alpha in read_alpha_frames(path, timeline, range(4)))
    grey = [np.full((64, 96, 4), 255, np.uint8)] * 2
    path = videos.write_video(tmp_path / "m.mkv", grey, codec="ffv1", pix_fmt="bgra")
    (mask,) = read_mask_frames(path, read_timeline(path), [0])
    assert (mask == 1).all()
    plain = lossless(tmp_path / "v.mov", videos.number_frames(2))
    assert all((alpha == 1).all() for alpha in read_alpha_frames(plain, read_timeline(plain), [0, 1]))


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "error"),
    [
        ("m.mkv", "ffv1", "gray", 0),
        ("m.mkv", "ffv1", "gray16le", 0),
        ("m.mkv", "ffv1", "yuv420p", 0),
        ("m.avi", "rawvideo", "gray", 0),
        ("m.avi", "rawvideo", "monow", 0),
        ("m.mov", "qtrle", "gray", 0),
        ("m.mp4", "libx264", "yuv420p", 2),
        ("m.mp4", "libx264", "yuvj420p", 3),
        ("m.mkv", "libx265", "yuv420p10le", 1),
        ("m.webm", "libvpx-vp9", "yuv420p", 3),
        ("m.avi", "mjpeg", "yuvj420p", 3),
    ],
)
def test_black_and_white_masks_are_zero_and_one_in_every_range(tmp_path, name, codec, pixels, error):
    masks = np.zeros((3, 64, 96), np.uint8)
    masks[:, :, 48:] = 255
    path = videos.write_video(tmp_path / name, list(masks), codec=codec, pix_fmt=pixels)
    got = list(read_mask_frames(path, read_timeline(path), [0, 2]))
    assert len(got) == 2
    for mask in got:
        assert mask.shape == (64, 96)
        assert mask.dtype == np.float32
        assert mask[:, :40].max() <= error / 255
        assert mask[:, 56:].min() >= 1 - error / 255


def test_grey_levels_of_a_mask_video_keep_their_values(tmp_path):
    ramp = np.tile(np.arange(0, 240, 15, dtype=np.uint8).repeat(4), (16, 1))
    path = videos.write_video(tmp_path / "m.mkv", [ramp], codec="ffv1", pix_fmt="gray")
    (mask,) = read_mask_frames(path, read_timeline(path), [0])
    np.testing.assert_allclose(mask, ramp / 255, atol=1e-6)
    path = videos.write_video(tmp_path / "m.mp4", [ramp], options={"crf": "4"})
    (mask,) = read_mask_frames(path, read_timeline(path), [0])
    np.testing.assert_allclose(mask, ramp / 255, atol=5 / 255)


def test_mask_videos_with_colours_are_refused(tmp_path):
    path = videos.write_video(tmp_path / "m.mp4", videos.number_frames(3))  # with a red square
    with pytest.raises(ValueError, match=r"m.mp4: this mask has colours"):
        list(read_mask_frames(path, read_timeline(path), [0]))


def test_masks_are_turned_as_their_own_file_says(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[:10, :10] = 255
    path = videos.write_video(tmp_path / "m.mov", [mask] * 2, codec="png", pix_fmt="gray", matrix=CLOCKWISE)
    (got,) = read_mask_frames(path, read_timeline(path), [1])
    assert got.shape == (80, 40)
    assert got[:10, 30:].min() == 1
    assert got.sum() == 100


def test_one_image_is_the_mask_of_every_frame(tmp_path):
    Image.fromarray(videos.square_masks(1)[0]).save(tmp_path / "m.png")
    got = list(read_mask_frames(tmp_path / "m.png", None, [0, 5, 9]))
    assert len(got) == 3
    assert got[0] is got[2]
    assert got[0].max() == 1


def test_a_mask_needs_one_frame_for_each_frame_of_its_video(tmp_path):
    def timeline(count):
        return Timeline((8, 8), count, None, None)

    check_counts(timeline(5), timeline(5), "walk.mp4", "masks/walk.mp4")
    with pytest.raises(ValueError, match=r"walk.mp4 has 48 frames, its mask masks/walk.mp4 has 47"):
        check_counts(timeline(48), timeline(47), "walk.mp4", "masks/walk.mp4")


# ---------------------------------------------------------------- folders of frames


def test_a_folder_of_frames_is_read_by_the_numbers_in_its_names(tmp_path):
    folder = videos.write_frames(tmp_path / "walk", videos.number_frames(12), name="shot2_{:d}.png")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_text("x")
    timeline = read_timeline(folder)
    assert (timeline.count, timeline.times, timeline.duration) == (12, None, None)
    images = list(read_frames(folder, timeline, [0, 2, 2, 9, 10, 11]))
    assert [videos.read_number(image) for image in images] == [0, 2, 2, 9, 10, 11]
    assert images[1] is images[2]


def test_a_folder_of_masks(tmp_path):
    masks = videos.square_masks(3)
    folder = videos.write_frames(tmp_path / "walk", masks)
    got = list(read_mask_frames(folder, read_timeline(folder), [0, 2]))
    np.testing.assert_array_equal(got[1], masks[2] / np.float32(255))


def test_a_folder_of_transparent_frames(tmp_path):
    folder = videos.write_frames(tmp_path / "walk", half_transparent())
    timeline = read_timeline(folder)
    assert timeline.transparent
    for number, alpha in enumerate(read_alpha_frames(folder, timeline, range(4))):
        np.testing.assert_array_equal(alpha, half_transparent()[number][..., 3] / np.float32(255))
    assert next(read_frames(folder, timeline, [0])).getpixel((0, 0)) == (200, 100, 50)


def test_folders_that_cannot_be_a_clip_are_refused(tmp_path):
    frames = videos.number_frames(3)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no frames"):
        read_timeline(tmp_path / "none")
    mixed = videos.write_frames(tmp_path / "mixed", [*frames, np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"mixed: frame3.png is 32x32, those before are 96x64"):
        read_timeline(mixed)
    twice = videos.write_frames(tmp_path / "twice", frames)
    Image.fromarray(frames[0]).save(twice / "frame01.jpg")
    with pytest.raises(ValueError, match="frame01.jpg and .*frame1.png are the same frame by number"):
        read_timeline(twice)
    broken = videos.write_frames(tmp_path / "broken", frames)
    (broken / "frame1.png").write_bytes((broken / "frame1.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"frame1.png"):
        read_timeline(broken)


def test_a_folder_that_changed_is_refused(tmp_path):
    folder = videos.write_frames(tmp_path / "walk", videos.square_masks(4))
    timeline = read_timeline(folder)
    (folder / "frame2.png").unlink()
    with pytest.raises(ValueError, match="frame2.png"):
        list(read_frames(folder, timeline, range(4)))
    Image.new("L", (32, 32)).save(folder / "frame2.png")
    with pytest.raises(ValueError, match="frame2.png is 32x32"):
        list(read_frames(folder, timeline, range(4)))
    with pytest.raises(ValueError, match="frame2.png is 32x32"):
        list(read_mask_frames(folder, timeline, range(4)))


# ---------------------------------------------------------------- bad files

NO_VIDEO = {
    "text": b"hello\n" * 1000,
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nh264.mp4\n#EXT-X-ENDLIST\n",
    "list": b"ffconcat version 1.0\nfile h264.mp4\n",
    "zeros": bytes(5000),
    "head": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41",
    "ebml": b"\x1a\x45\xdf\xa3\x80",
    "riff": b"RIFF\x04\x00\x00\x00AVI ",
    "flv": b"FLV\x01\x05\x00\x00\x00\x09\x00\x00\x00\x00",
    "sync": b"\x47" + bytes(187),
}


@pytest.mark.parametrize("what", NO_VIDEO)
def test_files_that_are_no_videos_are_refused_by_name(tmp_path, written, what):
    path = tmp_path / "walk.mp4"
    path.write_bytes(NO_VIDEO[what])
    (tmp_path / "h264.mp4").write_bytes((written / "h264.mp4").read_bytes())
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_timeline(path)


def test_empty_and_missing_files_and_images_are_refused(tmp_path):
    path = tmp_path / "walk.mp4"
    with pytest.raises(ValueError, match=r"walk.mp4 cannot be read \(it is not there\)"):
        read_timeline(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="walk.mp4 is empty"):
        read_timeline(path)
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    (tmp_path / "p.png").rename(path)
    with pytest.raises(ValueError, match="walk.mp4: not a readable video"):
        read_timeline(path)


@pytest.mark.parametrize("name", ["s.mp4", "s.mkv", "s.mov"])
def test_a_file_with_sound_alone_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no video stream"):
        read_timeline(videos.write_sound(tmp_path / name))


def test_a_cover_image_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    videos.write_sound(path, cover=videos.number_frame(1))
    with pytest.raises(ValueError, match="song.mp4 has no video stream"):
        read_timeline(path)


CUT = [name for name in sorted(CODECS) if not name.endswith((".mpg", "open_gop.mp4", "refreshed.mp4"))]


@pytest.mark.parametrize("name", CUT)
def test_truncated_files_are_refused(written, tmp_path, name):
    content = (written / name).read_bytes()
    path = tmp_path / name
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        path.write_bytes(content[: int(len(content) * share) | 1])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_timeline(path)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov"])
def test_truncated_files_with_their_head_in_front_are_refused(tmp_path, movflags):
    path = tmp_path / "v.mp4"
    videos.write_video(path, videos.number_frames(30), options={"g": "8"}, container={"movflags": movflags})
    assert read_timeline(path).count == 30
    content = path.read_bytes()
    for share in (0.35, 0.6, 0.8, 0.97):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=r"v.mp4(:| is) .*(truncated|damaged|no frames)"):
            read_timeline(path)


def test_a_fragment_that_ffmpeg_would_skip_is_noticed(tmp_path):
    path = tmp_path / "v.mp4"
    frames, movflags = videos.number_frames(24), "frag_keyframe+empty_moov"
    videos.write_video(path, frames, options={"g": "8"}, container={"movflags": movflags})
    content = path.read_bytes()
    for name in (b"moof", b"traf", b"trun", b"tfhd", b"mdat"):
        assert content.count(name) == 3
        at = content.index(name, content.index(name) + 4)
        path.write_bytes(content[:at] + b"x" + content[at + 1 :])
        with pytest.raises(ValueError, match=r"v.mp4 is damaged at byte"):
            read_timeline(path)


def test_the_rest_of_a_cut_fragment_is_noticed(tmp_path):
    path = tmp_path / "v.mp4"
    movflags = "frag_keyframe+empty_moov"
    videos.write_video(path, videos.number_frames(24), options={"g": "8"}, container={"movflags": movflags})
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"moof") + 2])
    with pytest.raises(ValueError, match=r"v.mp4 is damaged at byte"):
        read_timeline(path)


def test_a_block_that_became_another_element_is_noticed(written, tmp_path):
    path = tmp_path / "v.webm"
    content = (written / "vp9.webm").read_bytes()
    at = videos.packets(written / "vp9.webm")[20][0]
    block = content.rindex(b"\xa3", 0, at + 1)
    for name in (b"\xab", b"\xa7", b"\xe7"):  # previous size, position, timestamp
        path.write_bytes(content[:block] + name + content[block + 1 :])
        with pytest.raises(ValueError, match=r"v.webm is damaged at byte"):
            read_timeline(path)


def test_a_frame_that_an_avi_gives_to_another_stream_is_missed(written, tmp_path):
    path = tmp_path / "v.avi"
    content = (written / "mjpeg.avi").read_bytes()
    at = content.index(b"00dc", content.index(b"movi") + 20_000)
    path.write_bytes(content[:at] + b"01dc" + content[at + 4 :])
    with pytest.raises(ValueError, match=rf"v.avi is truncated: {COUNT} frames by its head, \d+ found"):
        read_timeline(path)


def test_an_avi_without_its_length_is_counted_by_its_head(written, tmp_path):
    path = tmp_path / "v.avi"
    content = bytearray((written / "mjpeg.avi").read_bytes())
    content[4:8] = bytes(4)
    path.write_bytes(content)
    assert read_timeline(path).count == COUNT
    path.write_bytes(content[: content.rindex(b"00dc", 0, len(content) // 2)])
    with pytest.raises(ValueError, match=rf"v.avi is truncated: {COUNT} frames by its head, \d+ found"):
        read_timeline(path)


DAMAGED = sorted(CODECS.keys() - {"mpeg2.mpg", "wmv.wmv", "refreshed.mp4"})  # of some, packets are not found by place


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("packet", [20, COUNT - 1])
def test_a_damaged_frame_is_an_error_that_names_it(written, tmp_path, name, packet):
    path = tmp_path / name
    path.write_bytes((written / name).read_bytes())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_timeline(videos.damage(path, packet))
    said = re.search(r"frame (\d+)", str(caught.value))
    if name.endswith((".mkv", ".webm", ".flv", ".ts")):  # their structure is found to be damaged before
        assert said or re.search(r"damaged( at byte| between bytes|: it has frames of tracks)", str(caught.value))
    else:
        assert abs(int(said[1]) - packet) <= 4  # packets are not in the order of frames


def test_a_frame_that_the_decoder_patched_up_is_refused(tmp_path):
    path = videos.write_video(tmp_path / "v.avi", videos.number_frames(30), codec="mpeg4")
    content = path.read_bytes()
    said = []
    for seed in range(12):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"v.avi: (frame \d+ is damaged|damaged or truncated near frame)"
        ) as caught:
            read_timeline(videos.damage(path, 20, spared=16, seed=seed))
        said.append(str(caught.value))
    assert any("frame 20 is damaged" in text for text in said), said


@pytest.mark.parametrize(
    ("name", "spared"), [("prores.mov", 100), ("mjpeg.avi", 700), ("mpeg4.avi", 20), ("vp8.webm", 4)]
)
def test_noise_inside_a_frame_is_noticed(written, tmp_path, name, spared):
    path = tmp_path / name
    for seed in range(10):
        path.write_bytes((written / name).read_bytes())
        with pytest.raises(ValueError, match=rf"{name}"):
            read_timeline(videos.damage(path, 20, spared, seed))


def test_every_changed_byte_of_a_png_frame_is_found(tmp_path):
    path = lossless(tmp_path / "v.mov", videos.number_frames(12))
    content = path.read_bytes()
    start, length = videos.packets(path)[7]
    for at in [*range(start, start + length - 16, length // 20), start + length - 14, start + length - 2]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"v.mov: damaged or truncated near frame 7"):
            read_timeline(path)


def test_a_lost_packet_of_a_transport_stream_is_noticed(written, tmp_path):
    content = (written / "h264.ts").read_bytes()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    image = [n for n, packet in enumerate(packets) if packet[1] & 0x1F == 1 and packet[2] == 0]  # 0x100
    path = tmp_path / "v.ts"
    for lost in image[10:20]:
        path.write_bytes(b"".join(packets[:lost] + packets[lost + 1 :]))
        with pytest.raises(ValueError, match=r"v.ts: "):
            read_timeline(path)


def test_every_changed_byte_of_a_file_with_checksums_is_found(tmp_path):
    path = videos.write_video(tmp_path / "v.mkv", videos.number_frames(6), codec="libx265")
    content = path.read_bytes()
    first = content.index(b"\x1f\x43\xb6\x75")
    for at in range(first, len(content), 37):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"v.mkv"):
            read_timeline(path)


def test_frames_that_the_demuxer_skips_are_missed(tmp_path):
    # The bits for lacing in one block's flags: FFmpeg cannot parse the block and goes on with the next cluster.
    path = videos.write_video(tmp_path / "v.webm", videos.number_frames(30), codec="libvpx-vp9")
    content = bytearray(path.read_bytes())
    at = videos.packets(path)[10][0]
    assert content[at - 1] in (0, 1, 0x81) or content[at] == 0x81
    block = content.index(b"\x81", at - 2)
    content[block + 3] |= 0x06
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"v.webm"):
        read_timeline(path)


def test_a_frame_that_the_decoder_drops_is_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")  # quiet
    path = tmp_path / "v.mp4"
    options = {"svtav1-params": "preset=12"}
    videos.write_video(path, videos.number_frames(COUNT), codec="libsvtav1", options=options)
    content = path.read_bytes()
    said = []
    for seed in range(8):
        path.write_bytes(content)
        videos.damage(path, COUNT - 1, seed=seed)
        with pytest.raises(ValueError, match=r"v.mp4") as caught:
            read_timeline(path)
        said.append(str(caught.value))
    # PyAV drops errors of the last frames, so some of these only show in what is missing
    assert any("frame 39 is damaged" in text for text in said), said


def test_frames_of_another_size_within_a_video_are_refused(tmp_path):
    path = videos.mix(tmp_path / "v.mkv", [videos.number_frames(6), videos.number_frames(6, (128, 64))])
    with pytest.raises(ValueError, match=r"v.mkv: frame 6 is 128x64, those before are 96x64"):
        read_timeline(path)


def test_a_video_that_changed_after_it_was_checked_is_refused(written, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes((written / "h264.mp4").read_bytes())
    timeline = read_timeline(path)
    videos.write_video(path, videos.number_frames(10))
    for numbers in (range(20), [30]):
        with pytest.raises(ValueError, match=r"v.mp4 is no longer the video that it was"):
            list(read_frames(path, timeline, numbers))
    videos.write_video(path, videos.number_frames(40, (64, 64)))
    with pytest.raises(ValueError, match=r"v.mp4 is no longer the video that it was"):
        list(read_frames(path, timeline, [1]))


@pytest.mark.parametrize(("dropped", "numbers"), [(26, [30]), (32, [30, 35])])
def test_frames_that_vanish_behind_a_key_frame_are_noticed(written, monkeypatch, dropped, numbers):
    path = written / "ffv1.mkv"
    timeline = read_timeline(path)
    want = list(read_frames(path, timeline, numbers))
    passes = []
    original = OpenVideo.frames

    def frames(self):
        passes.append(self._begin)
        for frame in original(self):
            if self._begin is None or frame.pts != timeline.timestamp(dropped):
                yield frame

    monkeypatch.setattr(OpenVideo, "frames", frames)
    if dropped < numbers[0]:  # before any is given, the file is read from its start instead
        assert list(read_frames(path, timeline, numbers)) == want
        assert passes[-1] is None
    else:
        with pytest.raises(ValueError, match="no longer the video that it was"):
            list(read_frames(path, timeline, numbers))


def test_frames_too_large_for_memory_are_refused(written, tmp_path, monkeypatch, decoded):
    stretched = videos.write_video(tmp_path / "s.mp4", videos.number_frames(2), pixel_aspect=Fraction(4, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    for name in ("h264.mp4", "vp9.webm", "mpeg4.avi", "ffv1.mkv", "h264.ts"):
        with pytest.raises(ValueError, match=name):
            read_timeline(written / name)
    assert decoded == []  # before memory is taken for them
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * 96 * 64)
    assert read_timeline(written / "h264.mp4").count == COUNT
    with pytest.raises(ValueError, match=r"s.mp4: frames of 384x64 are too large"):
        read_timeline(stretched)


def test_nothing_but_video_containers_is_opened(written, monkeypatch):
    options = {}
    original = mpp.media.decoding.av.open

    def spy(file, **settings):
        options.update(settings["options"])
        return original(file, **settings)

    monkeypatch.setattr(mpp.media.decoding.av, "open", spy)
    read_timeline(written / "h264.mp4")
    assert int(options["max_pixels"]) == Image.MAX_IMAGE_PIXELS
    allowed = set(options["format_whitelist"].split(","))
    assert not allowed & {"hls", "concat", "dash", "image2", "sdp", "tty", "lavfi"}


# ---------------------------------------------------------------- memory

READ_LONG = """
import sys
from pathlib import Path
from mpp.media.videos import read_frames, read_timeline

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

path = Path(sys.argv[1])
timeline = read_timeline(path)
marks = []
for number, image in enumerate(read_frames(path, timeline, range(timeline.count))):
    if number in (60, timeline.count - 1):
        marks.append(peak())
print(timeline.count, *marks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its peak memory here")
def test_a_long_video_is_read_in_flat_memory(tmp_path):
    frames = videos.number_frames(8, (320, 180))
    path = videos.write_video(tmp_path / "v.mp4", [frames[n % 8] for n in range(900)], codec="mpeg4")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", READ_LONG, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    count, early, late = map(int, run.stdout.split())
    assert count == 900
    assert late - early < 16_000  # kilobytes; all frames together would be 155,000
