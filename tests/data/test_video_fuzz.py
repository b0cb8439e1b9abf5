"""Mutated videos, read in a child process: a fault inside FFmpeg must not end the test run."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mpp.data.video import read_frames, read_mask_frames, read_timeline
from tests.data import videos

COUNT = 24
SIZE = (64, 48)
SOURCES = {
    "h264.mp4": ("libx264", "yuv420p", {"g": "8"}, {}),
    "fast.mp4": ("libx264", "yuv420p", {"g": "8"}, {"movflags": "faststart"}),
    "parts.mp4": ("libx264", "yuv420p", {"g": "8"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mkv": ("libx264", "yuv420p", {"g": "8"}, {}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=8"}, {}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "8"}, {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "8"}, {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}, {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}, {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}, {}),
    "png.mov": ("png", "rgb24", {}, {}),
    "ffv1.mkv": ("ffv1", "gray", {}, {}),
}
SECONDS = 10  # for one file; they take a few milliseconds
MEMORY = 2 << 30  # more than is needed by far


def write_sources(folder):
    for name, (codec, pixels, options, container) in SOURCES.items():
        videos.write_video(
            folder / name,
            videos.number_frames(COUNT, SIZE),
            codec=codec,
            pix_fmt=pixels,
            options=options,
            container=container,
        )


def mutate(content, random):
    """One of several ways in which files go bad."""
    mutated = bytearray(content)
    kind = random.choice(["bits", "bytes", "head", "tail", "cut", "hole", "swap", "repeat", "size"])
    length = len(mutated)
    at = int(random.integers(0, length))
    if kind == "bits":
        for place in random.integers(0, length, random.integers(1, 5)):
            mutated[place] ^= 1 << int(random.integers(0, 8))
    elif kind == "bytes":
        for place in random.integers(0, length, random.integers(1, 30)):
            mutated[place] = int(random.integers(0, 256))
    elif kind == "head":
        mutated[int(random.integers(0, min(1000, length)))] = int(random.integers(0, 256))
    elif kind == "tail":  # where MP4 keeps its tables
        mutated[-int(random.integers(1, min(1500, length)))] = int(random.integers(0, 256))
    elif kind == "cut":
        del mutated[at:]
    elif kind == "hole":
        mutated[at : at + 100] = bytes(len(mutated[at : at + 100]))
    elif kind == "swap":
        other = int(random.integers(0, length))
        mutated[at : at + 64], mutated[other : other + 64] = mutated[other : other + 64], mutated[at : at + 64]
    elif kind == "repeat":
        mutated[at:at] = mutated[at : at + 200]
    else:  # numbers of 32 bits that are far too large
        value = random.choice([0x7FFFFFFF, 0xFFFFFFFF, 0x00FFFFFF, 0x80000000, 0])
        mutated[at : at + 4] = int(value).to_bytes(4, "big")
    return bytes(mutated), kind


def read(path):
    """What became of a file: "refused", "same", or in words what is wrong."""
    try:
        timeline = read_timeline(path)
        numbers = sorted({0, timeline.count // 2, timeline.count - 1})
        images = list(read_frames(path, timeline, numbers))
        masks = [] if timeline.transparent else list(read_mask_frames(path, timeline, numbers))
    except ValueError as error:
        return "refused" if str(path) in str(error) and str(error).strip() else f"nameless: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if any(image.size != timeline.size or image.mode != "RGB" for image in images):
        return "pictures of another size"
    if any(mask.shape != timeline.size[::-1] or not 0 <= mask.min() <= mask.max() <= 1 for mask in masks):
        return "masks out of range"
    times = timeline.times
    if not (len(times) == timeline.count and times[0] == 0 and all(np.diff(times) > 0) and timeline.duration > times[-1]):
        return "an impossible clock"
    if timeline.count != COUNT:
        return f"{timeline.count} frames"
    return "same"


def main(folder, seed, count):
    """In the child: read `count` mutated files, and write down each before it is read."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    av.logging.set_level(None)
    random = np.random.default_rng(seed)
    contents = {name: (folder / name).read_bytes() for name in SOURCES}
    names = list(SOURCES)
    with (folder / f"log{seed}.jsonl").open("w") as log:
        for number in range(count):
            name = names[number % len(names)]
            content, kind = mutate(contents[name], random)
            path = folder / f"fuzz{seed}{Path(name).suffix}"
            path.write_bytes(content)
            log.write(json.dumps([number, name, kind]))
            log.flush()
            signal.alarm(SECONDS)
            log.write("\t" + json.dumps(read(path)) + "\n")
            signal.alarm(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
