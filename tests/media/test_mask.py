"""One verdict on what a mask is, and one set of values, whatever holds it and whoever reads it."""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mpp.cache.format import Cache
from mpp.masking.sequences import FrameSequence
from mpp.media.images import read_mask
from mpp.media.videos import read_mask_frames, read_timeline
from tests.helpers import prepare
from tests.masking.files import levels, png16, run, save, write_video
from tests.media import videos

FRAMES, SIDE, CELL = 5, 64, 8
# by channels and bits: how PyAV has such arrays, and how FFV1 and PNG in MOV hold them
FORMS = {
    (1, 8): ("gray", "gray", "gray"),
    (1, 16): ("gray16le", "gray16le", "gray16be"),
    (3, 8): ("rgb24", "bgr0", "rgb24"),
    (3, 16): ("rgb48le", "gbrp16le", "rgb48be"),
    (4, 8): ("rgba", "bgra", "rgba"),
    (4, 16): ("rgba64le", "gbrap16le", "rgba64be"),
}


@dataclass
class Drawn:
    """A mask, what is to be said of it, and its values: from how it was drawn, not from any reader.

    Attributes:
        frames: `(FRAMES, SIDE, SIDE)` or with 3 or 4 channels, uint8 or uint16.
        refusal: Words of the refusal, or None where it is a mask.
        values: `(FRAMES, SIDE, SIDE)` in [0, 1].
    """

    frames: np.ndarray
    refusal: str | None
    values: np.ndarray


def draw(kind, seed):
    """A mask of one kind, drawn."""
    random = np.random.default_rng(seed)
    bits = 16 if "deep" in kind else 8
    top, dtype = 2**bits - 1, np.uint16 if bits == 16 else np.uint8

    def blocks(high, low=0):
        found = random.integers(low, high + 1, (FRAMES, SIDE // CELL, SIDE // CELL))
        found[:, 0, 0], found[:, 0, 1] = high, low
        if "still" in kind:
            found[:] = found[0]
        return found.repeat(CELL, 1).repeat(CELL, 2).astype(dtype)

    grey, refusal = blocks(top), None
    if "black" in kind:
        grey[:] = 0
    if "dark" in kind:  # the subject comes in: one frame is all but black
        grey[0] = grey[0] > top // 2
    if "labels" in kind:
        grey, refusal = blocks(int(random.integers(1, 256)) if bits == 16 else 1), "brightest value of this mask"
    frames = grey
    if "rgb" in kind or "tinted" in kind or "coloured" in kind or "alpha" in kind:
        frames = np.repeat(grey[..., None], 3, axis=3)
    if "tinted" in kind:
        frames[..., 2] -= np.minimum(frames[..., 2], 30 * (top // 255))
    if "coloured" in kind:
        frames[-1, :CELL, :CELL], refusal = (top, 0, top // 2), "has colours"
    if "alpha" in kind:
        alpha = np.full_like(grey, top)
        if "clear" in kind:
            alpha[-1, 0, 0], refusal = top - 1, "transparent alpha"
        frames = np.concatenate([frames, alpha[..., None]], axis=3)
    luminance = frames[..., :3] @ [0.299, 0.587, 0.114] if frames.ndim == 4 else frames
    return Drawn(frames, refusal, luminance / top)


def draws():
    """One of each kind; each values of its own."""
    deep = "still deep, deep, deep black, deep dark, deep labels, deep still labels, deep rgb, deep rgb labels"
    kinds = "still, moving, black, dark, labels, still labels, rgb, rgb labels, tinted, coloured, alpha, clear alpha"
    rest = "deep tinted, deep coloured, deep alpha, deep clear alpha"
    names = f"{kinds}, {deep}, {rest}".split(", ")
    return {name.replace(" ", "_"): draw(name, seed) for seed, name in enumerate(names)}


def write_png(path, array):
    return png16(path, array) if array.ndim == 3 and array.dtype == np.uint16 else save(path, array)


def write_folder(path, frames):
    for number, array in enumerate(frames):
        write_png(path / f"{number:03d}.png", array)
    return path


def write(root, name, drawn):
    """The mask in each container that can hold it, by a name of the container."""
    frames = drawn.frames
    layout, ffv1, png = FORMS[frames.shape[3] if frames.ndim == 4 else 1, 8 * frames.itemsize]
    found = {
        "folder": write_folder(root / f"{name}_folder", frames),
        "mkv": write_video(root / f"{name}_mkv.mkv", list(frames), form=ffv1, layout=layout),
        "mov": write_video(root / f"{name}_mov.mov", list(frames), codec="png", form=png, layout=layout),
    }
    if layout == "gray":
        found["avi"] = write_video(root / f"{name}_avi.avi", list(frames), codec="rawvideo", form=layout, layout=layout)
    return found


def attempt(read):
    try:
        return list(read()), None
    except ValueError as error:
        return None, str(error)


def by_prepare(path):
    timeline = read_timeline(path, mask=True)
    return read_mask_frames(path, timeline, range(timeline.count))


def by_tools(path):
    frames = tuple(sorted(path.iterdir())) if path.is_dir() else ()
    return [mask.values for mask in FrameSequence("m", path, frames).masks()]


def check(drawn, read, where):
    values, error = attempt(read)
    if drawn.refusal is not None:
        assert error is not None, where
        assert drawn.refusal in error, (where, error)
        return
    assert error is None, (where, error)
    # luminance is a whole number of the file's depth; in 16 bits the witness is exact to its rounding too
    tolerance = (0.51 if drawn.frames.ndim == 4 else 0) / np.iinfo(drawn.frames.dtype).max + 1e-6
    np.testing.assert_allclose(np.stack(values), drawn.values[: len(values)], rtol=0, atol=tolerance, err_msg=where)


@pytest.mark.parametrize("name", draws())
def test_every_container_and_every_reader_says_the_same_of_a_mask(tmp_path, name):
    drawn = draws()[name]
    for container, path in write(tmp_path, name, drawn).items():
        for reader in (by_prepare, by_tools):
            check(drawn, lambda path=path, reader=reader: reader(path), f"{container} {reader.__name__}")
    if "still" in name:
        path = write_png(tmp_path / "one.png", drawn.frames[0])
        check(drawn, lambda: [read_mask(path)], "one image")
        check(drawn, lambda: by_tools(path), "one image, tools")


@pytest.mark.slow
def test_prepare_and_the_commands_of_masks_agree_on_every_container(tmp_path, pipeline):
    drawn, masks = draws(), tmp_path / "masks"
    names = ("still", "dark", "labels", "coloured", "deep", "deep_rgb_labels", "clear_alpha")
    samples = {f"{name}_{container}": drawn[name] for name in names for container in write(masks, name, drawn[name])}
    (tmp_path / "photos").mkdir()
    for sample in samples:
        videos.write_video(tmp_path / "photos" / f"{sample}.mkv", videos.number_frames(FRAMES, (SIDE, SIDE)), rate=16)
    summary = prepare(pipeline, tmp_path, "data.clips.frames=[5]", "data.on_error=skip")
    cache = Cache(tmp_path / "cache")
    prepared = {entry.source: cache.mask(entry)[0].numpy() for entry in cache.entries()}
    with pytest.raises(ValueError, match=f"{len(summary.skipped)} failed, the others are done"):
        run("invert", masks, tmp_path / "out", "frame_folders=true", "video_format=frames")
    for sample, mask in samples.items():
        made = sorted((tmp_path / "out" / sample).glob("*.png"))
        fine = mask.refusal is None
        assert (sample in prepared, bool(made)) == (fine, fine), sample
        if fine:
            inverted = np.stack([levels(path) for path in made])
            np.testing.assert_allclose(1 - inverted / np.iinfo(inverted.dtype).max, mask.values, rtol=0, atol=1e-6)
            cells = mask.values[:, ::CELL, ::CELL]
            want = np.stack([cells[0], cells[1:].mean(0)])  # as the VAE groups frames
            np.testing.assert_allclose(prepared[sample], want, rtol=0, atol=1e-6, err_msg=sample)
        else:
            (error,) = [line for line in summary.skipped if f"/{sample}." in line or f"/{sample}/" in line]
            assert mask.refusal in error


@pytest.mark.parametrize("kind", ["still", "coloured"])
def test_lossy_containers_blur_a_mask_and_change_no_verdict(tmp_path, kind):
    drawn = draw(kind, 0)
    frames = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in drawn.frames]
    for number, array in enumerate(frames):
        save(tmp_path / "jpg" / f"{number}.jpg", array, quality=90)
    paths = [tmp_path / "jpg", *(tmp_path / name for name in ("m.mp4", "m.mkv", "m.webm", "m.avi"))]
    videos.write_video(paths[1], frames, options={"crf": "12"})
    videos.write_video(paths[2], frames, codec="libx265", pix_fmt="yuv420p10le", options={"crf": "8"})
    videos.write_video(paths[3], frames, codec="libvpx-vp9", options={"crf": "8", "b": "0"})
    videos.write_video(paths[4], frames, codec="mjpeg", pix_fmt="yuvj420p", options={"qscale": "1"})
    for path in paths:
        for reader in (by_prepare, by_tools):
            values, error = attempt(lambda path=path, reader=reader: reader(path))
            if drawn.refusal is not None:
                assert drawn.refusal in error, path
                continue
            inner = np.abs(np.stack(values) - drawn.values).reshape(FRAMES, SIDE // CELL, CELL, SIDE // CELL, CELL)
            assert inner[:, :, 2:-2, :, 2:-2].mean() < 5 / 255, path


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_grey_videos_of_odd_depths_have_the_values_of_their_depth(tmp_path, bits):
    top, form = 2**bits - 1, f"gray{bits}le"
    ramp = np.linspace(0, top, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
    for frames, fine in (([ramp, 0 * ramp], True), ([0 * ramp, np.minimum(ramp, top // 255)], False)):
        path = write_video(tmp_path / f"{fine}.mkv", frames, form=form, layout=form)
        for reader in (by_prepare, by_tools):
            if fine:
                np.testing.assert_allclose(next(iter(reader(path))), ramp / top, rtol=0, atol=1e-6)
            else:
                with pytest.raises(ValueError, match=f"brightest value of this mask is {top // 255} of {top}"):
                    list(reader(path))


def test_a_black_clip_is_a_mask_also_with_the_noise_of_a_lossy_codec(tmp_path):
    black = [np.zeros((SIDE, SIDE), np.uint8)] * FRAMES
    noisy = [np.ones((SIDE, SIDE), np.uint8)] * FRAMES
    for path in (
        write_video(tmp_path / "a.mkv", black),
        videos.write_video(tmp_path / "b.mp4", noisy),
        videos.write_video(tmp_path / "c.avi", noisy, codec="mjpeg", pix_fmt="yuvj420p", options={"qmin": "1"}),
    ):
        for reader in (by_prepare, by_tools):
            assert max(mask.max() for mask in reader(path)) <= 2 / 255


def test_lossless_webp_is_judged_as_png_and_lossy_webp_as_jpeg(tmp_path):
    labels = np.eye(16, dtype=np.uint8)
    with pytest.raises(ValueError, match="brightest value of this mask is 1 of 255"):
        read_mask(save(tmp_path / "exact.webp", labels, lossless=True))
    assert read_mask(save(tmp_path / "noisy.webp", labels)).max() <= 2 / 255


def test_transparent_palettes_are_alpha_in_an_image_and_in_a_video(tmp_path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 17).convert("P")
    image.save(tmp_path / "m.png", transparency=17)
    path = tmp_path / "m.mov"
    with pytest.raises(ValueError, match="transparent alpha"):
        read_mask(tmp_path / "m.png")
    remux(tmp_path / "m.png", path)
    assert read_timeline(path).transparent
    for reader in (by_prepare, by_tools):
        with pytest.raises(ValueError, match="transparent alpha"):
            list(reader(path))


def remux(image, path):
    """A PNG file as it is, as the only frame of a video."""
    data = image.read_bytes()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = 4, 4, "pal8"
        packet = av.Packet(data)
        packet.stream, packet.pts, packet.dts, packet.duration, packet.is_keyframe = stream, 0, 0, 1, True
        packet.time_base = Fraction(1, 24)
        out.mux(packet)
