import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mpp
import mpp.masking.job
from mpp.masking.job import MaskJob
from mpp.masking.tools import Invert
from tests.helpers import config
from tests.masking.files import levels, random_mask, read_video, run, save, write_video

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def paths(tmp_path):
    for number in range(3):
        save(tmp_path / "in" / f"sub{number}" / "m.png", random_mask(number))
    return tmp_path / "in", tmp_path / "out"


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- again


def test_running_again_writes_nothing(paths):
    source, output = paths
    write_video(source / "v.mkv", [random_mask(0)] * 3)
    assert len(run("invert", source, output).written) == 4
    before = snapshot(output)
    summary = run("invert", source, output)
    assert (summary.written, len(summary.kept), summary.frames) == ((), 4, 0)
    assert snapshot(output) == before
    assert "0 written" in summary.lines()[0]
    assert "4 there already" in summary.lines()[0]


@pytest.mark.parametrize("form", ["mkv", "frames"])
def test_other_settings_or_inputs_are_refused_until_overwriting(paths, form):
    source, output = paths
    write_video(source / "v.mkv", [random_mask(0)] * 2)
    options = [f"video_format={form}", "tool.sigma=1"]
    run("feather", source, output, *options)
    before = snapshot(output)
    for words in (["tool.sigma=2"], ["tool.grow=1"]):
        with pytest.raises(
            ValueError, match=r"4 results are there already and were made otherwise, such as .*sub0/m\.p"
        ):
            run("feather", source, output, *options, *words)
    save(source / "sub1" / "m.png", random_mask(7))
    write_video(source / "v.mkv", [random_mask(1)] * 2)
    with pytest.raises(ValueError, match="2 results are there already"):
        run("feather", source, output, *options)
    assert snapshot(output) == before
    assert len(run("feather", source, output, *options, "overwrite=true").written) == 4
    assert len(run("feather", source, output, *options).kept) == 4
    changed = {path for path, content in snapshot(output).items() if content[0] != before[path][0]}
    assert {path.relative_to(output).parts[0] for path in changed} == {"sub1", "v" if form == "frames" else "v.mkv"}


def test_a_changed_second_mask_counts_too(paths, tmp_path):
    source, output = paths
    save(tmp_path / "other" / "sub0" / "m.png", random_mask(9))
    words = [f"tool.masks={tmp_path / 'other'}", "tool.missing=keep"]
    run("combine", source, output, *words)
    assert len(run("combine", source, output, *words).kept) == 3
    save(tmp_path / "other" / "sub1" / "m.png", random_mask(9))
    with pytest.raises(ValueError, match="1 results are there already and were made otherwise"):
        run("combine", source, output, *words)


def test_files_of_others_are_never_replaced_unasked(paths):
    source, output = paths
    mine = save(output / "sub1" / "m.png", random_mask(20))
    with pytest.raises(ValueError, match="choose another output, or set overwrite=true"):
        run("invert", source, output)
    assert not (output / "sub0" / "m.png").exists()
    np.testing.assert_array_equal(levels(mine), random_mask(20))
    run("invert", source, output, "overwrite=true")
    np.testing.assert_array_equal(levels(mine), 255 - random_mask(1))


@pytest.mark.parametrize("text", ["[]", "5", "{", "null", '{"format": 1}'])
def test_what_others_write_into_their_files_is_not_taken_for_ours(paths, text):
    source, output = paths
    info = PngInfo()
    info.add_text("mpp", text)
    save(output / "sub1" / "m.png", random_mask(20), pnginfo=info)
    with pytest.raises(ValueError, match="1 results are there already and were made otherwise"):
        run("invert", source, output)


def test_with_keep_only_what_is_missing_is_made(paths):
    source, output = paths
    write_video(source / "v.mkv", [random_mask(0)] * 2)
    mine = save(output / "sub1" / "m.png", random_mask(20))
    summary = run("invert", source, output, "keep=true")
    assert (len(summary.written), summary.kept) == (3, (mine,))
    np.testing.assert_array_equal(levels(mine), random_mask(20))
    corrected = save(output / "sub0" / "m.png", random_mask(21))
    save(source / "new.png", random_mask(5))
    before = snapshot(output)
    assert [path.name for path in run("feather", source, output, "keep=true").written] == ["new.png"]
    np.testing.assert_array_equal(levels(corrected), random_mask(21))
    assert snapshot(output).items() >= before.items()
    with pytest.raises(ValueError, match="keep=true leaves results that are there, overwrite=true replaces them"):
        run("invert", source, output, "keep=true", "overwrite=true")


def test_with_keep_images_that_have_a_mask_beside_them_are_left_out(tmp_path):
    source, key = tmp_path / "in", "tool.color=[0,0,0]"
    for name in ("a", "a_mask", "b", "b-masklabel", "sub/c", "sub/c.mask", "d", "sub/d", "v.mask/1", "v.mask/2"):
        save(source / f"{name}.png", random_mask(0))
    write_video(source / "v.mkv", [random_mask(0)] * 2)
    run("from_color", source, tmp_path / "all", key)
    assert sorted(p.relative_to(tmp_path / "all").as_posix() for p in (tmp_path / "all").rglob("*.*")) == [
        "a.png", "b.png", "d.png", "sub/c.png", "sub/d.png", "v.mkv",
    ]  # fmt: skip
    run("from_color", source, tmp_path / "out", key, "keep=true")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == [
        "d.png", "sub/d.png",
    ]  # fmt: skip


def test_masks_in_which_nothing_was_found_are_named(tmp_path):
    green, red = np.full((8, 8, 3), (0, 255, 0), np.uint8), np.full((8, 8, 3), (255, 0, 0), np.uint8)
    for name, frames in (("some", [red, green]), ("none", [red, red])):
        save(tmp_path / "in" / f"{name}.png", frames[-1])
        write_video(tmp_path / "in" / "clips" / f"{name}.mkv", frames, form="bgr0", layout="rgb24")
    summary = run("from_color", tmp_path / "in", tmp_path / "out", "tool.color=[0,255,0]")
    assert [path.name for path in summary.black] == ["none.mkv", "none.png"]
    assert summary.lines()[-1].startswith("2 are wholly black, as nothing was found; draw these masks: ")
    again = run("feather", tmp_path / "out", tmp_path / "soft")
    assert (len(again.written), again.black) == (4, ())  # masks of masks are what they are


def test_folders_with_other_things_are_not_replaced_even_when_asked(paths):
    source, output = paths
    write_video(source / "v.mkv", [random_mask(0)] * 2)
    (output / "v").mkdir(parents=True)
    (output / "v" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out/v holds other things, and is not replaced"):
        run("invert", source, output, "video_format=frames", "overwrite=true")
    (output / "sub0" / "m.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"sub0/m\.png holds other things, and is not replaced"):
        run("invert", source, output, "overwrite=true")
    assert (output / "v" / "notes.txt").read_text() == "mine"


def test_a_folder_of_frames_that_lost_one_is_not_taken_for_done(paths):
    source, output = paths
    for number in range(3):
        save(source / "clip" / f"{number}.png", random_mask(number))
    run("invert", source, output, "frame_folders=true")
    (output / "clip" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 results are there already .* such as .*out/clip"):
        run("invert", source, output, "frame_folders=true")


@pytest.mark.parametrize("kind", ["png", "mkv", "mp4"])
def test_results_say_how_they_were_made(paths, tmp_path, kind):
    source, output = paths
    write_video(source / "v.mkv", [random_mask(0)] * 2)
    tool = "preview" if kind == "mp4" else "invert"
    run(tool, source, output, *([f"tool.masks={source / 'sub0' / 'm.png'}"] if kind == "mp4" else []))
    if kind == "png":
        with Image.open(output / "sub0" / "m.png") as image:
            text = image.text["mpp"]
    else:
        import av

        with av.open(str(output / f"v.{kind}")) as container:
            text = next(value for key, value in container.metadata.items() if key.lower() == "comment")
    made = json.loads(text)
    assert made["mpp"] == mpp.__version__
    assert made["tool"] == ("Preview" if kind == "mp4" else "Invert")


# ---------------------------------------------------------------- what goes wrong


def test_a_corrupt_image_stops_nothing_and_the_rest_follows_when_it_is_mended(paths):
    source, output = paths
    whole = (source / "sub1" / "m.png").read_bytes()
    (source / "sub1" / "m.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 failed, the others are done(?s:.*)sub1/m\.png: not a readable mask"):
        run("invert", source, output)
    assert sorted(path.parent.name for path in output.rglob("*.png")) == ["sub0", "sub2"]
    (source / "sub1" / "m.png").write_bytes(whole)
    summary = run("invert", source, output)
    assert ([path.parent.name for path in summary.written], len(summary.kept)) == (["sub1"], 2)


# x264 looks ahead in a thread, so its bytes vary now and then, and what is hit by damage at a fixed place with them.
STEADY = {"preset": "ultrafast", "threads": "1"}


def test_a_damaged_video_leaves_nothing_behind(paths):
    source, output = paths
    frames = [random_mask(n, (48, 64)) for n in range(9)]
    path = write_video(source / "v.mp4", frames, codec="libx264", form="yuv420p", **STEADY)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 3000
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"1 failed(?s:.*)v\.mp4"):
        run("invert", source, output)
    assert sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()) == [
        "sub0/m.png", "sub1/m.png", "sub2/m.png",
    ]  # fmt: skip


def test_many_failures_are_counted_and_the_first_named(tmp_path):
    for number in range(25):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"m{number:02d}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"25 failed(?s:.*)m00\.png(?s:.*)m19\.png(?s:.*)and 5 more") as caught:
        run("invert", tmp_path / "in", tmp_path / "out")
    assert "m20.png" not in str(caught.value)


def test_a_full_disk_is_said_and_leaves_no_part(paths, monkeypatch):
    source, output = paths
    written = []

    def write(path, frame, made):
        if written:
            raise OSError(28, f"no space left to write {path}")
        written.append(path)

    monkeypatch.setattr(mpp.masking.job, "write_png", write)
    with pytest.raises(OSError, match="no space left to write"):
        run("invert", source, output)
    assert len(written) == 1


@pytest.mark.parametrize("failing", [1, 3])
def test_a_video_whose_making_fails_midway_leaves_the_old_one(tmp_path, monkeypatch, failing):
    write_video(tmp_path / "in" / "v.mkv", [random_mask(n) for n in range(4)])
    run("invert", tmp_path / "in", tmp_path / "out")
    run("invert", tmp_path / "in", tmp_path / "frames", "video_format=frames")
    before = snapshot(tmp_path / "out") | snapshot(tmp_path / "frames")
    good = Invert.apply

    def apply(self, clip, other):
        for number, mask in enumerate(good(self, clip, other)):
            if number == failing:
                raise KeyboardInterrupt
            yield mask

    monkeypatch.setattr(Invert, "apply", apply)
    for output, form in (("out", "mkv"), ("frames", "frames")):
        with pytest.raises(KeyboardInterrupt):
            run("invert", tmp_path / "in", tmp_path / output, f"video_format={form}", "overwrite=true")
    assert snapshot(tmp_path / "out") | snapshot(tmp_path / "frames") == before


@pytest.mark.slow
def test_a_killed_run_leaves_only_whole_files_and_goes_on(tmp_path):
    for number in range(40):
        save(tmp_path / "in" / f"m{number:03d}.png", random_mask(number, (300, 400)))
    words = [sys.executable, "-m", "mpp.masks", "tool=feather", "tool.sigma=6", "input=in", "output=out"]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.time() + 60
    while len(list((tmp_path / "out").glob("m*.png"))) < 3 and time.time() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted((tmp_path / "out").glob("m*.png"))
    assert 3 <= len(done) < 40
    for path in done:
        assert levels(path).shape == (300, 400)
    summary = run("feather", tmp_path / "in", tmp_path / "out", "tool.sigma=6")
    assert (len(summary.kept), len(summary.written)) == (len(done), 40 - len(done))


# ---------------------------------------------------------------- bad settings


def image(path):
    save(path / "in" / "p.png", random_mask(0))


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        ("invert", ["input=nowhere"], "input=nowhere is no folder, and no image or video"),
        ("invert", ["input=null"], "input=... is missing"),
        ("invert", ["output=null"], "output=... is missing"),
        ("invert", ["input=texts"], "input=texts holds no images and no videos"),
        ("invert", ["output=in"], "output=in lies in input=in; choose a folder outside of it"),
        ("invert", ["output=in/new"], "output=in/new lies in input=in"),
        ("invert", ["output=../CWD/in"], "lies in input=in"),
        ("invert", ["output=texts/note.txt"], "output=texts/note.txt cannot be written"),
        ("invert", ["output=texts/note.txt/deep"], "cannot be written"),
        ("invert", ["output=/proc/masks"], "output=/proc/masks cannot be written"),
        ("invert", ["input=twins"], r"twins/p\.bmp and twins/p\.png share one name"),
        ("invert", ["video_format=mp4"], "video_format should be 'mkv' or 'frames', got 'mp4'"),
        ("invert", ["+tool.sigma=3"], "tool.sigma is not a setting of mpp.masking.tools.Invert"),
        ("invert", ["input=in/p.png", "output=in"], r"in/p\.png is an input itself"),
        ("combine", [], "tool.masks=... is missing: give the folder of masks"),
        ("combine", ["tool.masks=nowhere"], "tool.masks=nowhere is no folder"),
        (
            "combine",
            ["tool.masks=others"],
            "nothing in tool.masks=others has the name of anything in input=in, such as p",
        ),
        ("combine", ["tool.masks=others", "output=others/new"], "output=others/new lies in tool.masks=others"),
        ("combine", ["tool.masks=in", "tool.how=add"], "tool.how should be 'multiply', 'min', 'max' or 'subtract'"),
        ("tiers", ["tool.table={255:1.0}", "tool.tolerance=-1"], "tool.tolerance must be at least 0, got -1"),
        ("tiers", ["tool.table={255:2.0}"], "must be between 0 and 1"),
        ("tiers", ["tool.table={255:white}"], "tool.table"),
        ("tiers", ["tool.table={255:1.0}", "tool.tolerance=1.5"], "tool.tolerance should be a valid integer"),
        (
            "from_color",
            ["tool.color=[0,255,0]", "tool.tolerance=443"],
            "tool.tolerance must be between 0 and 442, got 443",
        ),
        ("from_color", ["tool.color=green"], "tool.color"),
        ("from_alpha", [], r"p\.png has no alpha channel"),
        ("from_alpha", ["preview=in/look"], "preview=in/look lies in input=in"),
        ("from_alpha", ["preview=out/look"], "preview=out/look lies in output=out"),
        ("feather", ["tool.sigma=-2"], "tool.sigma must be at least 0"),
        ("feather", ["tool.grow=0.5"], "tool.grow should be a valid integer"),
        ("preview", ["tool.masks=in", "tool.side=8"], "tool.side must be at least 16 pixels, got 8"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path, monkeypatch, tool, words, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "p.png", random_mask(0))
    save(tmp_path / "others" / "q.png", random_mask(0))
    save(tmp_path / "twins" / "p.png", random_mask(0))
    save(tmp_path / "twins" / "p.bmp", random_mask(0))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "note.txt").write_text("a caption")
    before = snapshot(tmp_path)
    words = [word.replace("CWD", tmp_path.name) for word in words]
    with pytest.raises(ValueError, match=message):
        run(tool, "in", "out", *words)
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_the_command_says_what_it_did_or_one_error(tmp_path):
    save(tmp_path / "in" / "p.png", random_mask(0))
    command = [sys.executable, "-m", "mpp.masks", "input=in", "output=out"]

    (tmp_path / "in" / "q.png").write_bytes(b"nothing")
    command += ["tool=tiers", "tool.table={255:1.0,hair:[80,0.3],0:0}", "tool.other=0"]
    failed = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=100
    )
    assert failed.returncode == 1
    assert "1 written to out, 0 there already" in failed.stdout
    assert failed.stderr.splitlines()[0].startswith("error: 1 failed, the others are done")
    assert "in/q.png: not a readable" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["p.png"]


def test_without_a_tool_all_of_them_are_named():
    with pytest.raises(Exception, match=r"(?s)You must specify 'tool'.*clipseg.*combine.*feather.*to_alpha"):
        config("masks", ["input=in", "output=out"])


def test_one_file_is_enough(tmp_path):
    save(tmp_path / "p.png", random_mask(0))
    run("invert", tmp_path / "p.png", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["p.png"]
    write_video(tmp_path / "v.mkv", [random_mask(0)] * 2)
    run("invert", tmp_path / "v.mkv", tmp_path / "out")
    assert len(read_video(tmp_path / "out" / "v.mkv")[0]) == 2


def test_jobs_need_no_configuration(tmp_path):
    save(tmp_path / "in" / "p.png", random_mask(0))
    summary = MaskJob(Invert(), str(tmp_path / "in"), str(tmp_path / "out")).run()
    assert summary.written == (tmp_path / "out" / "p.png",)
    with pytest.raises(ValueError, match="video_format must be mkv or frames, got 'gif'"):
        MaskJob(Invert(), "in", "out", video_format="gif")
