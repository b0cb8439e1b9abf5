"""What the mask tests share: drawn files, plain readers, and the command as a function."""

import copy
import functools
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

import mpp.masks
from mpp import cli
from tests.helpers import config

COLOURS = {2: 3, 4: 2, 6: 4}


def run(tool, source, output, *overrides):
    """The command, in this process; a tool's configuration is composed once, which takes longer than the rest."""
    cfg = copy.deepcopy(_composed(tool))
    words = cli.overrides("masks", [f"input={source}", f"output={output}", *overrides])
    for word in OverridesParser.create().parse_overrides(words):
        OmegaConf.update(cfg, word.key_or_group, word.value(), force_add=word.is_add())
    return mpp.masks.run(cfg)


@functools.cache
def _composed(tool):
    return config("masks", [f"tool={tool}", "device=cpu"])


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def levels(path):
    """Whole numbers of a mask file as it is stored."""
    with Image.open(path) as image:
        return np.asarray(image).copy()


def random_mask(seed, shape=(9, 13), top=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype)


def write_video(path, frames, *, pts=None, codec="ffv1", form="gray", layout="gray", base=Fraction(1, 1000), **options):
    """A video by PyAV alone, `pts` in units of `base`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = form
        stream.codec_context.time_base = base
        for time, array in zip(pts or range(0, 40 * len(frames), 40), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=layout)
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_video(path, layout=None):
    """Frames as stored, and their times in seconds."""
    with av.open(str(path)) as container:
        found = [(f.to_ndarray(format=layout or f.format.name), f.time) for f in container.decode(video=0)]
    return [frame for frame, _ in found], [time for _, time in found]


def png16(path, array):
    """Write `(h, w, 2 to 4)` uint16 as PNG, by the specification alone."""
    height, width, channels = array.shape
    kind = {3: 2, 2: 4, 4: 6}[channels]
    rows = array.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def read_png16(path):
    """`(h, w, channels)` uint16 of a PNG with 16 bits per colour, and its text, by the specification alone."""
    data, location, body, text = path.read_bytes(), 8, b"", {}
    while location < len(data):
        (size,) = struct.unpack(">I", data[location : location + 4])
        name, content = data[location + 4 : location + 8], data[location + 8 : location + 8 + size]
        assert struct.unpack(">I", data[location + 8 + size : location + 12 + size])[0] == zlib.crc32(name + content)
        if name == b"IHDR":
            width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", content)
            assert (depth, rest) == (16, [0, 0, 0])
        if name == b"IDAT":
            body += content
        if name == b"tEXt":
            key, _, value = content.partition(b"\0")
            text[key.decode()] = value.decode()
        location += 12 + size
    step = 2 * COLOURS[kind]
    raw, size, rows = zlib.decompress(body), width * step, []
    above = bytearray(size)
    for number in range(height):
        start = number * (size + 1)
        rule, line = raw[start], bytearray(raw[start + 1 : start + 1 + size])
        for i in range(size):
            left, up = (line[i - step] if i >= step else 0), above[i]
            corner = above[i - step] if i >= step else 0
            line[i] = (line[i] + _predicted(rule, left, up, corner)) % 256
        rows.append(bytes(line))
        above = line
    return np.frombuffer(b"".join(rows), ">u2").reshape(height, width, -1).astype(np.uint16), text


def _predicted(rule, left, up, corner):
    if rule < 4:
        return (0, left, up, (left + up) // 2)[rule]
    near = left + up - corner
    return min((left, up, corner), key=lambda value: abs(near - value))
