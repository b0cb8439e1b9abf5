import os
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mpp.masking.sequences import FrameSequence, find_sequences, pair
from mpp.media.own import mark
from mpp.media.videos import read_timeline
from tests.masking.files import levels, random_mask, read_video, run, save, write_video
from tests.sources.test_beside import mask_name, stem
from tests.sources.test_source import touch

UNEVEN = [0, 40, 80, 250, 251, 1000]


def frames(count=6, shape=(10, 14), start=0):
    return [random_mask(start + number, shape) for number in range(count)]


def pixels(count=6, shape=(10, 14)):
    return [np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8) for number in range(count)]


def folder(path, arrays, first=1, name="{:06d}"):
    for number, array in enumerate(arrays, first):
        save(path / f"{name.format(number)}.png", array)


# ---------------------------------------------------------------- finding and matching


def test_masks_beside_their_media_are_masks_and_never_media(tmp_path):
    for name in ("a.jpg", "a-masklabel.png", "sub/b.png", "sub/b.mask.png", "c.mp4", "c.mask.mkv", "d.mask/0001.png"):
        save(tmp_path / name, random_mask(0)) if name.endswith(("png", "jpg")) else (tmp_path / name).touch()
    assert sorted(find_sequences(str(tmp_path), "input", masks=True)) == ["a", "c", "d/0001", "sub/b"]
    assert sorted(find_sequences(str(tmp_path), "input", masks=False)) == ["a", "c", "sub/b"]


def test_masks_are_told_from_media_by_the_names_that_prepare_knows(tmp_path):
    draw = random.Random(0)
    for number in range(30):
        stems = {stem(draw).casefold() for _ in range(draw.randint(1, 6))}
        named = {name: mask_name(draw, name) for name in sorted(stems) if draw.random() < 0.7}
        touch(tmp_path / str(number), *(f"{name}.png" for name in stems), *named.values())
        where = str(tmp_path / str(number))
        assert set(find_sequences(where, "input", masks=True)) == set(named or stems)
        assert set(find_sequences(where, "input", masks=False)) == stems


def test_what_mpp_wrote_is_an_input_only_by_its_own_name(tmp_path):
    save(tmp_path / "samples" / "step-000500" / "0_a_box.png", random_mask(0))
    mark(tmp_path / "samples" / "step-000500")
    with pytest.raises(ValueError, match=r"but in folders that mpp wrote, .*\(step-000500\); name one of them itself"):
        find_sequences(str(tmp_path / "samples"), "input", masks=False)
    assert list(find_sequences(str(tmp_path / "samples" / "step-000500"), "input", masks=False)) == ["0_a_box"]


def test_masks_beside_their_images_are_softened_into_a_folder_of_their_own(tmp_path):
    save(tmp_path / "in" / "a.png", random_mask(0))
    save(tmp_path / "in" / "a-masklabel.png", random_mask(1))
    run("invert", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    np.testing.assert_array_equal(levels(tmp_path / "out" / "a.png"), 255 - random_mask(1))


def test_a_mask_folder_inside_the_images_is_no_image(tmp_path):
    save(tmp_path / "in" / "a.png", np.zeros((9, 13, 3), np.uint8))
    save(tmp_path / "in" / "masks" / "a.png", random_mask(1))
    run("to_alpha", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'in' / 'masks'}")
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["a.png"]


def clips(*names):
    return {name.split(".")[0]: FrameSequence(name.split(".")[0], Path("root", name)) for name in names}


@pytest.mark.parametrize(
    ("inputs", "others", "want"),
    [
        (["a.png", "b.png"], ["a.png", "c.png"], {"a": "a.png", "b": None}),
        (["s/a.png"], ["a.png"], {"s/a": None}),
        (["v.mp4"], ["v.mkv"], {"v": "v.mkv"}),
        (["v.mp4"], ["v.png"], {"v": "v.png"}),
        (["v.mp4"], ["v/1.png", "v/2.png", "v/10.png"], {"v": ["1", "2", "10"]}),
        (["v.png"], ["v/1.png", "v/2.png"], {"v": ["1", "2"]}),
        (["v/1.png", "v/2.png"], ["v.mkv"], {("1", "2"): "v.mkv"}),
        (["v/1.png", "v/2.png"], ["v.png"], {("1", "2"): "v.png"}),
        (["v/1.png", "v/2.png"], ["v/1.png", "v/3.png"], {"v/1": "1.png", "v/2": None}),
        # a folder whose images have their own is no folder of frames
        (["v.png", "v/1.png"], ["v/1.png", "v/2.png"], {"v": None, "v/1": "1.png"}),
        (["v/1.png", "v/2.png"], ["v.png", "v/1.png"], {"v/1": "1.png", "v/2": None}),
    ],
)
def test_files_match_by_name_and_clips_with_folders_of_frames(inputs, others, want):
    got = {}
    for clip, other in pair(clips(*inputs), clips(*others)):
        what = tuple(path.stem for path in clip.frames) or clip.key
        assert what not in got
        got[what] = None if other is None else [path.stem for path in other.frames] or other.path.name
    assert got == want


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.avi"])
def test_mask_videos_keep_frames_times_and_values(tmp_path, name):
    codec, form = ("libx264", "gray") if name == "v.mp4" else ("ffv1", "gray")
    arrays = frames()
    options = {"qp": "0", "color_range": "pc"} if codec == "libx264" else {}
    pts = None if name == "v.avi" else UNEVEN
    write_video(
        tmp_path / "in" / "sub" / name, arrays, codec=codec, form=form, pts=pts or list(range(6)),
        base=Fraction(1, 25) if name == "v.avi" else Fraction(1, 1000), **options,
    )  # fmt: skip
    summary = run("invert", tmp_path / "in", tmp_path / "out")
    assert summary.frames == 6
    got, times = read_video(tmp_path / "out" / "sub" / "v.mkv")
    before, want = read_video(tmp_path / "in" / "sub" / name, "gray")
    assert times == pytest.approx(want, abs=6e-4)  # Matroska counts milliseconds
    for frame, array in zip(got, before, strict=True):
        np.testing.assert_array_equal(frame, 255 - array)
    for frame, array in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(frame, array)  # the input itself was without loss
    assert read_timeline(tmp_path / "out" / "sub" / "v.mkv").count == 6


def test_times_of_other_clocks_are_kept_to_the_millisecond(tmp_path):
    pts = [0, 1001, 2002, 4004, 4100, 90_000]
    write_video(tmp_path / "in" / "v.mov", frames(), codec="png", pts=pts, base=Fraction(1, 24_000))
    run("invert", tmp_path / "in", tmp_path / "out")
    _, times = read_video(tmp_path / "out" / "v.mkv")
    assert times == pytest.approx([time / 24_000 for time in pts], abs=5.1e-4)


def test_videos_can_become_folders_of_frames(tmp_path):
    write_video(tmp_path / "in" / "v.mkv", frames())
    run("invert", tmp_path / "in", tmp_path / "out", "video_format=frames")
    names = sorted(os.listdir(tmp_path / "out" / "v"))
    assert names == [f"{number:06d}.png" for number in range(1, 7)]
    for name, array in zip(names, frames(), strict=True):
        np.testing.assert_array_equal(levels(tmp_path / "out" / "v" / name), 255 - array)


def test_deep_frames_are_deep_as_files(tmp_path):
    deep = [random_mask(number, top=65536, dtype=np.uint16) for number in range(3)]
    folder(tmp_path / "in" / "v", deep)
    run("invert", tmp_path / "in", tmp_path / "out", "frame_folders=true")
    for number, array in enumerate(deep, 1):
        np.testing.assert_array_equal(levels(tmp_path / "out" / "v" / f"{number:06d}.png"), 65535 - array)


@pytest.mark.parametrize("still", ["input", "masks"])
@pytest.mark.parametrize("moving", ["video", "frames"])
def test_what_stands_still_holds_for_all_frames_of_what_moves(tmp_path, still, moving):
    arrays, mask = frames(), np.zeros((10, 14), np.uint8)
    mask[:, 7:] = 255
    paths = {"input": tmp_path / "in", "masks": tmp_path / "masks"}
    save(paths.pop(still) / "v.png", mask)
    (other,) = paths.values()
    if moving == "video":
        write_video(other / "v.mkv", arrays, pts=UNEVEN)
    else:
        folder(other / "v", arrays, first=3, name="f{}")
    run("combine", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    if moving == "video":
        got, times = read_video(tmp_path / "out" / "v.mkv")
        assert times == [time / 1000 for time in UNEVEN]
    else:
        got = [levels(tmp_path / "out" / "v" / f"f{number}.png") for number in range(3, 9)]
    for frame, array in zip(got, arrays, strict=True):
        np.testing.assert_array_equal(frame[:, 7:], array[:, 7:])
        assert not frame[:, :7].any()


def test_folders_of_frames_combine_frame_by_frame(tmp_path):
    ones, twos = frames(3), frames(3, start=10)
    folder(tmp_path / "in" / "a" / "v", ones)
    folder(tmp_path / "masks" / "a" / "v", twos)
    words = [f"tool.masks={tmp_path / 'masks'}", "tool.how=max"]
    run("combine", tmp_path / "in", tmp_path / "clips", *words, "frame_folders=true")
    run("combine", tmp_path / "in", tmp_path / "files", *words)
    for number, both in enumerate(zip(ones, twos, strict=True), 1):
        for path in ("clips", "files"):
            np.testing.assert_array_equal(levels(tmp_path / path / "a" / "v" / f"{number:06d}.png"), np.maximum(*both))


def test_frame_10_comes_after_frame_9(tmp_path):
    arrays = frames(11)
    write_video(tmp_path / "in" / "v.mkv", [np.full((10, 14), 255, np.uint8)] * 11)
    folder(tmp_path / "masks" / "v", arrays, name="{}")
    run("combine", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    for frame, array in zip(got, arrays, strict=True):
        np.testing.assert_array_equal(frame, array)


@pytest.mark.parametrize("short", ["in", "masks"])
def test_clips_of_other_lengths_are_no_pair(tmp_path, short):
    for path in ("in", "masks"):
        write_video(tmp_path / path / "v.mkv", frames(4 if path == short else 6))
    with pytest.raises(ValueError, match=rf"different numbers of frames: .*{short}/v\.mkv has only 4; give masks of"):
        run("combine", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    assert not list((tmp_path / "out").iterdir())  # nothing half made either


def test_a_video_with_a_mask_of_another_size_is_refused_unless_it_fits(tmp_path):
    write_video(tmp_path / "in" / "v.mkv", frames(2))
    write_video(tmp_path / "masks" / "v.mkv", [np.full((20, 28), 255, np.uint8)] * 2)
    with pytest.raises(ValueError, match="sizes differ, 28x20 and 14x10"):
        run("combine", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    run("combine", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}", "tool.resize=true")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    np.testing.assert_array_equal(got[1], frames(2)[1])


def test_keying_a_video_follows_the_colour(tmp_path):
    arrays = []
    for number in range(5):
        array = np.full((16, 24, 3), 40, np.uint8)
        array[4:12, 3 * number : 3 * number + 6] = (0, 255, 0)
        arrays.append(array)
    write_video(tmp_path / "in" / "v.mkv", arrays, form="bgr0", layout="rgb24")
    run("from_color", tmp_path / "in", tmp_path / "out", "tool.color=[0,255,0]")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    for number, frame in enumerate(got):
        want = np.zeros((16, 24), np.uint8)
        want[4:12, 3 * number : 3 * number + 6] = 255
        np.testing.assert_array_equal(frame, want)


def test_tiers_of_a_lossy_mask_video_by_tolerance(tmp_path):
    tiers = np.repeat(np.repeat(np.array([[0, 80, 128, 255]], np.uint8), 16, axis=0), 16, axis=1)
    write_video(
        tmp_path / "in" / "v.mp4", [np.dstack([tiers] * 3)] * 3, codec="libx264", form="yuv420p", layout="rgb24"
    )
    table = "tool.table={255:1.0,128:0.6,80:0.2,0:0}"
    run("tiers", tmp_path / "in", tmp_path / "out", table, "tool.tolerance=12")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    centres = got[2][8, 8::16]
    assert centres.tolist() == [0, 51, 153, 255]
    assert set(np.unique(got[2])) <= {0, 51, 153, 255}
    with pytest.raises(ValueError, match=r"v\.mp4, frame 0: .* not in the table"):
        run("tiers", tmp_path / "in", tmp_path / "out2", table.replace("128:0.6,", ""))


def test_previews_of_videos_play_anywhere(tmp_path):
    arrays = [np.full((33, 47, 3), 200, np.uint8)] * 4
    write_video(tmp_path / "in" / "v.mkv", arrays, form="bgr0", layout="rgb24", pts=[0, 40, 500, 1000])
    mask = np.zeros((33, 47), np.uint8)
    mask[:, 24:] = 255
    save(tmp_path / "masks" / "v.png", mask)
    run("preview", tmp_path / "in", tmp_path / "out", f"tool.masks={tmp_path / 'masks'}")
    with av.open(str(tmp_path / "out" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 46, 32)
    got, times = read_video(tmp_path / "out" / "v.mp4", "rgb24")
    assert times == pytest.approx([0, 0.04, 0.5, 1.0], abs=1e-3)
    left, right = got[1][:, :20].mean((0, 1)), got[1][:, 28:].mean((0, 1))
    assert left[2] > left[0] + 60
    assert np.abs(right - (206, 147, 100)).max() < 6  # half of grey 200, half of the colour of what is learned


@pytest.mark.parametrize("orientation", ["upright", "turned"])
def test_turned_videos_of_phones_give_upright_masks(tmp_path, orientation):
    array = np.zeros((32, 48, 3), np.uint8)
    array[:8, :16] = (0, 255, 0)
    path = write_video(tmp_path / "in" / "v.mp4", [array] * 2, codec="libx264", form="yuv444p", layout="rgb24", qp="0")
    data = bytearray(path.read_bytes())
    location = data.index(b"tkhd") + 44
    if orientation == "turned":  # a quarter turn clockwise, as phones write it
        matrix = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4")
        data[location : location + 36] = matrix.tobytes()
        path.write_bytes(data)
    run("from_color", tmp_path / "in", tmp_path / "out", "tool.color=[0,255,0]", "tool.tolerance=60")
    (first, _), _ = read_video(tmp_path / "out" / "v.mkv")
    want = np.zeros((32, 48), np.uint8)
    want[:8, :16] = 255
    np.testing.assert_array_equal(first, want if orientation == "upright" else np.rot90(want, -1))


def test_folders_of_frames_are_whole_or_not_there(tmp_path):
    folder(tmp_path / "in" / "v", frames(3))
    (tmp_path / "in" / "v" / "000002.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"v/000002\.png: not a readable mask"):
        run("invert", tmp_path / "in", tmp_path / "out", "frame_folders=true")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(
        ValueError, match="1 failed, the others are done"
    ):  # without frame_folders each is an image of its own
        run("invert", tmp_path / "in", tmp_path / "alone")
    assert sorted(os.listdir(tmp_path / "alone" / "v")) == ["000001.png", "000003.png"]


def test_frame_folders_are_refused_where_images_lie_loose(tmp_path):
    folder(tmp_path / "in", frames(2))
    with pytest.raises(ValueError, match=r"frame_folders=true takes each folder .* give the folder above"):
        run("invert", tmp_path / "in", tmp_path / "out", "frame_folders=true")


def test_a_video_and_a_folder_of_its_name_are_not_mixed(tmp_path):
    write_video(tmp_path / "in" / "v.mkv", frames(2))
    folder(tmp_path / "in" / "v", frames(2))
    with pytest.raises(ValueError, match="share one name"):
        run("invert", tmp_path / "in", tmp_path / "out", "frame_folders=true")
    with pytest.raises(ValueError, match=r"would both lie in .*out/v; rename one of them"):
        run("invert", tmp_path / "in", tmp_path / "out", "video_format=frames")
    run("invert", tmp_path / "in", tmp_path / "out")  # a video file and images in a folder do not meet


def test_a_mask_video_with_a_transparent_alpha_is_refused(tmp_path):
    arrays = [np.dstack([array, array, array, array]) for array in frames(2)]
    write_video(tmp_path / "in" / "v.mkv", arrays, form="bgra", layout="rgba")
    with pytest.raises(ValueError, match="tool=from_alpha` make masks of its alpha"):
        run("invert", tmp_path / "in", tmp_path / "out")
