"""Videos for tests: written with PyAV, with frames that tell their own number, and damaged on purpose."""

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

BITS = 12
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"x264-params": "log-level=none"}}


def number_frame(number, size=(96, 64)):
    """A frame whose upper half is a row of black and white blocks, the bits of its number; below a bright square."""
    width, height = size
    pixels = np.full((height, width, 3), 90, np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        pixels[: height // 2, edges[bit] : edges[bit + 1]] = 255 if number >> bit & 1 else 0
    pixels[square(number, size)] = (250, 60, 30)
    return pixels


def square(number, size=(96, 64)):
    """Where the square of a frame lies: it moves to the right and comes back."""
    side = size[1] // 4
    left = 2 * number % (size[0] - side)
    return slice(size[1] // 2 + 4, size[1] // 2 + 4 + side), slice(left, left + side)


def read_number(image):
    """The number in an image, whatever the codec did to it."""
    pixels = np.asarray(image.convert("L"), dtype=float)
    row = pixels[: pixels.shape[0] // 4].mean(0)
    edges = np.linspace(0, len(row), BITS + 1).astype(int)
    bits = [row[a + 1 : b - 1].mean() for a, b in pairwise(edges)]
    assert all(value < 60 or value > 195 for value in bits), bits
    return sum((value > 128) << bit for bit, value in enumerate(bits))


def number_frames(count, size=(96, 64)):
    """Frames 0 to count - 1."""
    return [number_frame(number, size) for number in range(count)]


def square_masks(count, size=(96, 64)):
    """The square alone, white on black, `(height, width)`: the moving mask of `number_frames`."""
    masks = np.zeros((count, size[1], size[0]), np.uint8)
    for number in range(count):
        masks[(number, *square(number, size))] = 255
    return list(masks)


def write_video(
    path,
    frames,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=24,
    times=None,
    unit=Fraction(1, 1000),
    matrix=None,
    pixel_aspect=None,
    options=None,
    container=None,
    tags=None,
):
    """Encode arrays: `(h, w, 3)` RGB, `(h, w, 4)` RGBA or `(h, w)` grey, 8 bits.

    Args:
        path: Where to; the suffix chooses the container.
        frames: Of one size.
        codec: PyAV's name of an encoder.
        pix_fmt: What it encodes.
        rate: Frames per second.
        times: Instead of a rate: when each frame is shown, in units.
        unit: Seconds per unit of times.
        matrix: Display matrix, nine whole numbers.
        pixel_aspect: Width over height of a pixel.
        options: Of the encoder.
        container: Of the container.
        tags: Attributes of the codec context, such as color_trc.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options={**QUIET.get(codec, {}), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if times is not None:
            stream.codec_context.time_base = unit
        for number, pixels in enumerate(frames):
            source = "gray" if pixels.ndim == 2 else {3: "rgb24", 4: "rgba"}[pixels.shape[2]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), source)
            if times is not None:
                frame.pts, frame.time_base = times[number], unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_frames(folder, frames, name="frame{:d}.png"):
    """A folder of images."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / name.format(number))
    return folder


def write_sound(path, cover=None):
    """A file with sound and no moving image, perhaps with a cover image."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        if cover is not None:
            image = out.add_stream("png", rate=1)
            image.width, image.height, image.pix_fmt = cover.shape[1], cover.shape[0], "rgb24"
            image.disposition = Disposition.attached_pic
            out.mux(image.encode(av.VideoFrame.from_ndarray(cover, "rgb24")))
            out.mux(image.encode(None))
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, 1024 * number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def packets(path):
    """Offset and length of each packet of the image stream, in the order of decoding."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]


def damage(path, packet, spared=0, seed=0):
    """Overwrite a packet with noise, but for its first bytes."""
    start, length = packets(path)[packet]
    content = bytearray(path.read_bytes())
    spared = min(spared, length - 1)
    content[start + spared : start + length] = np.random.default_rng(seed).bytes(length - spared)
    path.write_bytes(content)
    return path


def mix(path, parts, order=None):
    """One stream of Motion JPEG images from several lists of frames, of whatever sizes; `order` is their clock."""
    count = 0
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=24)
        stream.height, stream.width = parts[0][0].shape[:2]
        stream.pix_fmt = "yuvj420p"
        for frames in parts:
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width = frames[0].shape[:2]
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 24)
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuvj420p")
                for packet in encoder.encode(frame):
                    packet.stream, packet.time_base = stream, Fraction(1, 24)
                    packet.dts, packet.pts = count, count if order is None else order[count]
                    out.mux(packet)
                    count += 1
    return path
