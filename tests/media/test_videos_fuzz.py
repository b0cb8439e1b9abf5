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
from av.video.reformatter import Interpolation

from mpp.media.videos import read_frames, read_mask_frames, read_timeline
from tests.media import videos

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
HIDDEN = {"mpeg4.avi", "vp8.webm"}
ALONE = {"mjpeg.avi", "prores.mov", "png.mov"}
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
SECONDS = 10  # for one file; they take a few milliseconds
MEMORY = 2 << 30  # more than is needed by far


def write_sources(folder):
    grey = [frame[..., :1].repeat(3, axis=2) for frame in videos.number_frames(COUNT, SIZE)]  # good for masks too
    for name, (codec, pixels, options, container) in SOURCES.items():
        videos.write_video(
            folder / name,
            grey,
            codec=codec,
            pix_fmt=pixels,
            options=options,
            container=container,
        )


def mutate(content, random):  # noqa: PLR0912 (one branch for each)
    """One of several ways in which files go bad."""
    mutated = bytearray(content)
    kind = random.choice(["bits", "bytes", "head", "tail", "cut", "hole", "swap", "repeat", "size"])
    length = len(mutated)
    at, other = (int(path) for path in random.integers(0, length, 2))
    match kind:
        case "bits":
            for path in random.integers(0, length, random.integers(1, 5)):
                mutated[path] ^= 1 << int(random.integers(0, 8))
        case "bytes":
            for path in random.integers(0, length, random.integers(1, 30)):
                mutated[path] = int(random.integers(0, 256))
        case "head":
            mutated[at % 1000] = int(random.integers(0, 256))
        case "tail":  # where MP4 keeps its tables
            mutated[-1 - at % 1500] = int(random.integers(0, 256))
        case "cut":
            del mutated[at:]
        case "hole":
            mutated[at : at + 100] = bytes(len(mutated[at : at + 100]))
        case "swap":
            mutated[at : at + 64], mutated[other : other + 64] = mutated[other : other + 64], mutated[at : at + 64]
        case "repeat":
            mutated[at:at] = mutated[at : at + 200]
        case "size":  # numbers of 32 bits that are far too large
            value = random.choice([0x7FFFFFFF, 0xFFFFFFFF, 0x00FFFFFF, 0x80000000, 0])
            mutated[at : at + 4] = int(value).to_bytes(4, "big")
    return bytes(mutated), kind


def read(path, *, alone=False):
    """What became of a file: "refused", "same" or "N frames"; anything else is a fault.

    `alone`: frames do not refer to others, so damage that no decoder sees cannot make them depend on its memory.
    """
    try:
        timeline = read_timeline(path)
        numbers = sorted({0, timeline.count // 2, timeline.count - 1})
        images = list(read_frames(path, timeline, numbers))
        masks = [] if timeline.transparent else list(read_mask_frames(path, timeline, numbers))
    except ValueError as error:
        return "refused" if str(path) in str(error) and str(error).strip() else f"nameless: {error}"
    except BaseException as error:  # noqa: BLE001 (any but a ValueError is a fault)
        return f"{type(error).__name__}: {error}"
    if any(image.size != timeline.size or image.mode != "RGB" for image in images):
        return "images of another size"
    if any(mask.shape != timeline.size[::-1] or not 0 <= mask.min() <= mask.max() <= 1 for mask in masks):
        return "masks out of range"
    times = timeline.times
    if len(times) != timeline.count or times[0] != 0 or min(np.diff([*times, timeline.duration])) <= 0:
        return "an impossible clock"
    given = given_by_codec(path, numbers, timeline.size) if alone else []
    if any(not np.array_equal(images[number], frame) for number, frame in enumerate(given)):
        return "other images than the codec gave"
    return "same" if timeline.count == COUNT else f"{timeline.count} frames"


def given_by_codec(path, numbers, size):
    """Frames as PyAV gives them in a plain pass from the start; none where a changed head stretches or turns them."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}  # else it patches damage up
        shown = {n: frame for n, frame in enumerate(container.decode(stream)) if n in numbers}
    if any(frame.rotation or (frame.width, frame.height) != size for frame in shown.values()):
        return []
    return [shown[number].to_image(interpolation=EXACT) for number in numbers]


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
            log.write("\t" + json.dumps(read(path, alone=name in ALONE)) + "\n")
            signal.alarm(0)


def fuzz(folder, seed, count):
    """Rows (number, file, kind of mutation, what became of it) of a child's whole run."""
    write_sources(folder)
    for name in SOURCES:
        assert read(folder / name, alone=True) == "same", name
    run = subprocess.run(
        [sys.executable, "-m", "tests.media.test_videos_fuzz", str(folder), str(seed), str(count)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=SECONDS * count,
        check=False,
    )
    rows = [line.split("\t") for line in (folder / f"log{seed}.jsonl").read_text().splitlines()]
    how = {-signal.SIGALRM: "hung", -signal.SIGSEGV: "crashed"}.get(run.returncode, f"ended with {run.returncode}")
    assert run.returncode == 0, f"it {how} at {rows[-1][0]} of seed {seed}\n{run.stderr[-2000:]}"
    found = [(*json.loads(case), json.loads(outcome)) for case, outcome in rows]
    assert len(found) == count
    return found


def check(rows):
    faults = [row for row in rows if row[3] not in ("refused", "same") and not row[3].endswith(" frames")]
    assert not faults, faults[:5]
    refused, kept = [[row for row in rows if (row[3] == "refused") == wanted] for wanted in (True, False)]
    assert len(refused) > len(rows) / 2
    assert len({kind for _, _, kind, _ in refused}) == 9
    # MP4's tables of times have no checksums; MPEG-4 and VP8 have frames that show nothing. Nothing else may lose any.
    lost = [row for row in kept if row[3] != "same"]
    assert {name for _, name, _, _ in lost} <= {n for n in SOURCES if n.endswith((".mp4", ".mov"))} | HIDDEN, lost
    assert len(lost) <= len(rows) / 100, lost
    # where bytes are missing at the end, it is always noticed
    assert not [row for row in lost if row[2] == "cut"], lost


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the child limits its memory as Linux tells it")
def test_mutated_videos_are_refused_by_name_or_read_whole(tmp_path):
    check(fuzz(tmp_path, seed=int(os.environ.get("MPP_FUZZ_SEED", "7")), count=2004))


@pytest.mark.slow
@pytest.mark.draws
def test_many_mutated_videos_are_refused_by_name_or_read_whole(tmp_path):
    for seed in range(10, 14):
        check(fuzz(tmp_path, seed, count=3000))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
