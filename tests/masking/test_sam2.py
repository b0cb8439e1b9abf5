"""SAM 2 on tiny random weights; transformers' own calls and video propagation are the witness."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2Model, Sam2VideoInferenceSession, Sam2VideoModel

from mpp.masking.sam2 import Sam2
from mpp.masking.segment_prompts import from_mask, from_settings, read_prompts
from tests.masking import tiny_models
from tests.masking.files import levels, read_video, run, save, write_video
from tests.masking.test_segment import SHAPE, resized, scene, seen
from tests.masking.tiny_models import SIDE

pytestmark = pytest.mark.slow

COUNT = 18  # frames; more than the 16 that the model looks back to
BOX, OTHER = [0.1, 0.15, 0.5, 0.7], [0.2, 0.6, 0.9, 0.95]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("sam2", "sam2_video"):
        (root / name).mkdir()
        getattr(tiny_models, name)(root / name)
    return root


@functools.cache
def loaded(kind, folder):
    return kind.from_pretrained(folder).eval()


@torch.no_grad()
def shown(folder, array, *, box=None, points=None, several=False):
    """White where SAM 2's score is above 0, by its own kind of call."""
    model = loaded(Sam2Model, folder)
    prompts = {}
    if box is not None:
        prompts["input_boxes"] = torch.tensor([[box]]) * SIDE
    if points is not None:
        prompts["input_points"] = torch.tensor([[[point[:2] for point in points]]]) * SIDE
        prompts["input_labels"] = torch.tensor([[[point[2] for point in points]]])
    result = model(pixel_values=seen(array, SIDE), multimask_output=several, **prompts)
    best = int(result.iou_scores[0, 0].argmax())
    return resized(result.pred_masks[0, 0, best], array.shape[:2]) > 0


@functools.cache
@torch.no_grad()
def followed(folder, frame, box):
    """Masks of all frames by transformers' own propagation through the whole clip, once in each direction."""
    model = loaded(Sam2VideoModel, folder)
    video = torch.cat([seen(scene(number), SIDE) for number in range(COUNT)])
    corners = torch.tensor([[[box[:2], box[2:]]]]) * SIDE
    found = {}
    for reverse in (True, False):
        session = Sam2VideoInferenceSession(video=video, dtype=torch.float32)
        subject = session.obj_id_to_idx(1)
        labels = torch.tensor([[[2, 3]]], dtype=torch.int32)  # of a box's corners
        session.add_point_inputs(subject, frame, {"point_coords": corners, "point_labels": labels})
        session.obj_with_new_inputs = [1]
        model(session, frame_idx=frame)
        for output in model.propagate_in_video_iterator(session, start_frame_idx=frame, reverse=reverse):
            found[output.frame_idx] = resized(output.pred_masks[0, 0]) > 0
    return [found[number] for number in range(COUNT)]


def differing(frame, want):
    """Share of pixels that differ: some scores are 0 but for rounding, and in clips that grows from frame to frame."""
    assert frame.shape == want.shape
    assert set(np.unique(frame)) <= {0, 255}
    return float(((frame == 255) != want).mean())


def given(models, *words, kind="sam2"):
    return [f"tool.model={models / kind}", *words]


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["sam2", "sam2_video"])
def test_a_box_gives_the_models_mask_at_the_images_size(models, tmp_path, kind):
    save(tmp_path / "in" / "p.png", scene())
    run("sam2", tmp_path / "in", tmp_path / "out", *given(models, f"tool.boxes=[{BOX}]", kind=kind))
    want = shown(models / kind, scene(), box=BOX)
    assert 0 < want.mean() < 1
    assert differing(levels(tmp_path / "out" / "p.png"), want) < 0.001


def test_several_boxes_are_several_subjects_in_one_mask(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    run("sam2", tmp_path / "in", tmp_path / "out", *given(models, f"tool.boxes=[{BOX},{OTHER}]"))
    first, second = (shown(models / "sam2", scene(), box=box) for box in (BOX, OTHER))
    assert (first & ~second).any()
    assert (second & ~first).any()
    assert differing(levels(tmp_path / "out" / "p.png"), first | second) < 0.001


def test_one_point_takes_the_best_of_the_models_masks_and_more_are_plain(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    run("sam2", tmp_path / "in", tmp_path / "one", *given(models, "tool.points=[[0.3,0.4]]"))
    run("sam2", tmp_path / "in", tmp_path / "two", *given(models, "tool.points=[[0.3,0.4],[0.8,0.8,0]]"))
    run("sam2", tmp_path / "in", tmp_path / "box", *given(models, f"tool.boxes=[{BOX}]", "tool.points=[[0.3,0.4]]"))
    one = shown(models / "sam2", scene(), points=[(0.3, 0.4, 1)], several=True)
    two = shown(models / "sam2", scene(), points=[(0.3, 0.4, 1), (0.8, 0.8, 0)])
    box = shown(models / "sam2", scene(), box=BOX, points=[(0.3, 0.4, 1)])
    alone = shown(models / "sam2", scene(), points=[(0.3, 0.4, 1)])
    assert differing(255 * one.astype(np.uint8), alone) > 0.01
    assert (one != two).any()
    for name, want in (("one", one), ("two", two), ("box", box)):
        assert differing(levels(tmp_path / name / "p.png"), want) < 0.001


def test_a_file_has_each_images_own_prompt(models, tmp_path):
    for number, name in enumerate(("a", "sub/b", "c")):
        save(tmp_path / "in" / f"{name}.png", scene(number))
    entries = {"a": {"boxes": [BOX]}, "sub/b": {"points": [[0.3, 0.4], [0.9, 0.9, 0]]}}
    (tmp_path / "where.json").write_text(json.dumps(entries))
    words = given(models, f"tool.prompts={tmp_path / 'where.json'}")
    with pytest.raises(ValueError, match=r"1 failed(?s:.*)c\.png: tool.prompts=.*where\.json has no 'c'"):
        run("sam2", tmp_path / "in", tmp_path / "out", *words)
    assert differing(levels(tmp_path / "out" / "a.png"), shown(models / "sam2", scene(0), box=BOX)) < 0.001
    want = shown(models / "sam2", scene(1), points=[(0.3, 0.4, 1), (0.9, 0.9, 0)])
    assert differing(levels(tmp_path / "out" / "sub" / "b.png"), want) < 0.001
    # another image's prompt is no reason to make this one again, its own is
    (tmp_path / "where.json").write_text(json.dumps(entries | {"c": {"boxes": [OTHER]}}))
    summary = run("sam2", tmp_path / "in", tmp_path / "out", *words)
    assert ([path.name for path in summary.written], len(summary.kept)) == (["c.png"], 2)
    (tmp_path / "where.json").write_text(json.dumps(entries | {"a": {"boxes": [OTHER]}, "c": {"boxes": [OTHER]}}))
    with pytest.raises(ValueError, match=r"1 results are there already and were made otherwise, such as .*a\.png"):
        run("sam2", tmp_path / "in", tmp_path / "out", *words)


@pytest.mark.parametrize("coarse", ["box", "centre"])
def test_coarse_masks_show_where_the_subject_is(models, tmp_path, coarse):
    save(tmp_path / "in" / "p.png", scene())
    mask = np.zeros((30, 45), np.uint8)  # at another resolution
    mask[5:20, 4:19] = 200
    mask[25, 40] = 100  # too dark to count
    save(tmp_path / "masks" / "p.png", mask)
    words = given(models, f"tool.masks={tmp_path / 'masks'}", f"tool.coarse={coarse}")
    run("sam2", tmp_path / "in", tmp_path / "out", *words)
    if coarse == "box":
        want = shown(models / "sam2", scene(), box=[4 / 45, 5 / 30, 19 / 45, 20 / 30])
    else:
        want = shown(models / "sam2", scene(), points=[(11.5 / 45, 12.5 / 30, 1)], several=True)
    assert differing(levels(tmp_path / "out" / "p.png"), want) < 0.001


def test_where_the_coarse_mask_is_empty_there_is_nothing(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    save(tmp_path / "masks" / "p.png", np.zeros(SHAPE, np.uint8))
    write_video(tmp_path / "in" / "v.mkv", [scene(n) for n in range(3)], form="bgr0", layout="rgb24")
    write_video(tmp_path / "masks" / "v.mkv", [np.zeros(SHAPE, np.uint8)] * 3)
    run(
        "sam2", tmp_path / "in", tmp_path / "out", *given(models, f"tool.masks={tmp_path / 'masks'}", kind="sam2_video")
    )
    assert not levels(tmp_path / "out" / "p.png").any()
    assert not np.any(read_video(tmp_path / "out" / "v.mkv")[0])


def test_the_centre_of_a_ring_lies_on_it():
    rows, columns = np.mgrid[:41, :61]
    away = np.hypot(rows - 20, columns - 30)
    prompt = from_mask(((away > 10) & (away < 15)).astype(np.float32), "centre")
    ((x, y, label),) = prompt.points
    assert label == 1
    assert 10 < np.hypot(y * 41 - 20.5, x * 61 - 30.5) < 15


# ---------------------------------------------------------------- clips


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "in"
    write_video(path / "v.mkv", [scene(n) for n in range(COUNT)], form="bgr0", layout="rgb24")
    return path


@pytest.mark.parametrize("frame", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, COUNT - 1))])
def test_the_mask_follows_through_a_clip_both_ways(models, clip, tmp_path, frame):
    (tmp_path / "where.json").write_text(json.dumps({"v": {"boxes": [BOX], "frame": frame}}))
    words = given(models, f"tool.prompts={tmp_path / 'where.json'}", kind="sam2_video")
    run("sam2", clip, tmp_path / "out", *words)
    got, times = read_video(tmp_path / "out" / "v.mkv")
    want = followed(models / "sam2_video", frame, tuple(BOX))
    assert times == [number / 25 for number in range(COUNT)]
    assert np.mean([mask.mean() for mask in want]) > 0.1
    assert max(differing(*both) for both in zip(got, want, strict=True)) < 0.002
    alone = shown(models / "sam2_video", scene((frame + 5) % COUNT), box=BOX)
    assert differing(got[(frame + 5) % COUNT], alone) > 0.05  # it is more than the same box in each frame


@pytest.mark.slow
def test_several_subjects_are_followed_at_once(models, clip, tmp_path):
    words = given(models, f"tool.boxes=[{BOX},{OTHER}]", kind="sam2_video")
    run("sam2", clip, tmp_path / "out", *words)
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    first, second = (followed(models / "sam2_video", 0, tuple(box)) for box in (BOX, OTHER))
    assert max(differing(g, a | b) for g, a, b in zip(got, first, second, strict=True)) < 0.002


def test_folders_of_frames_are_followed_where_they_are_said_to_be_clips(models, tmp_path):
    arrays = [scene(n) for n in range(5)]
    for number, array in enumerate(arrays, 8):
        save(tmp_path / "in" / "v" / f"{number}.png", array)
    words = given(models, "tool.points=[[0.3,0.4]]", kind="sam2_video")
    run("sam2", tmp_path / "in", tmp_path / "out", *words, "frame_folders=true")
    run("sam2", tmp_path / "in", tmp_path / "each", *words)
    model = Sam2(str(models / "sam2_video"), points=[[0.3, 0.4]])
    tracker = model._tracker(model._given)
    for number, array in enumerate(arrays, 8):
        want = tracker.follow(Image.fromarray(array)).values == 1
        assert differing(levels(tmp_path / "out" / "v" / f"{number}.png"), want) == 0
        alone = shown(models / "sam2_video", array, points=[(0.3, 0.4, 1)], several=True)
        assert differing(levels(tmp_path / "each" / "v" / f"{number}.png"), alone) < 0.001


def test_moving_coarse_masks_start_where_they_first_show_something(models, clip, tmp_path):
    masks = [np.zeros(SHAPE, np.uint8) for _ in range(COUNT)]
    for number in range(7, COUNT):
        masks[number][9:42, 9:45] = 255
    write_video(tmp_path / "masks" / "v.mkv", masks)
    run("sam2", clip, tmp_path / "out", *given(models, f"tool.masks={tmp_path / 'masks'}", kind="sam2_video"))
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    box = [9 / 90, 9 / 60, 45 / 90, 42 / 60]
    want = followed(models / "sam2_video", 7, tuple(box))
    assert max(differing(*both) for both in zip(got, want, strict=True)) < 0.002


def test_moving_coarse_masks_of_another_length_are_refused(models, clip, tmp_path):
    write_video(tmp_path / "masks" / "v.mkv", [np.full(SHAPE, 255, np.uint8)] * (COUNT - 1))
    words = given(models, f"tool.masks={tmp_path / 'masks'}", kind="sam2_video")
    with pytest.raises(ValueError, match=rf"different numbers of frames: .*masks/v\.mkv has only {COUNT - 1}"):
        run("sam2", clip, tmp_path / "out", *words)


def test_without_following_each_frame_has_its_own_coarse_box(models, tmp_path):
    arrays = [scene(n) for n in range(3)]
    write_video(tmp_path / "in" / "v.mkv", arrays, form="bgr0", layout="rgb24")
    masks = [np.zeros(SHAPE, np.uint8) for _ in range(3)]
    for number in range(3):
        masks[number][6:30, 9 + 9 * number : 45 + 9 * number] = 255
    write_video(tmp_path / "masks" / "v.mkv", masks)
    words = given(models, f"tool.masks={tmp_path / 'masks'}", "tool.track=false")
    run("sam2", tmp_path / "in", tmp_path / "out", *words)
    for number, frame in enumerate(read_video(tmp_path / "out" / "v.mkv")[0]):
        left, right = 9 + 9 * number, 45 + 9 * number
        want = shown(models / "sam2", arrays[number], box=[left / 90, 6 / 60, right / 90, 30 / 60])
        assert differing(frame, want) < 0.001


def test_following_holds_no_more_frames_than_the_model_looks_back_to(models):
    model = Sam2(str(models / "sam2_video"), boxes=[BOX])
    tracker = model._tracker(model._given)
    held = []
    for _ in range(24):
        tracker.follow(Image.fromarray(scene()))
        session = tracker._session
        held.append((len(session.processed_frames), len(session.output_dict_per_obj[0]["non_cond_frame_outputs"])))
    assert max(frames for frames, _ in held) == 0
    assert held[18:] == [held[18]] * 6


def test_prompts_for_frames_that_are_not_there_are_refused(models, clip, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    (tmp_path / "where.json").write_text(
        json.dumps({"v": {"boxes": [BOX], "frame": COUNT}, "p": {"boxes": [BOX], "frame": 1}})
    )
    words = given(models, f"tool.prompts={tmp_path / 'where.json'}", kind="sam2_video")
    with pytest.raises(ValueError, match=rf"v\.mkv has {COUNT} frames, its prompt is for frame {COUNT} \(from 0\)"):
        run("sam2", clip, tmp_path / "out", *words)
    with pytest.raises(ValueError, match=r"p\.png is an image, and its prompt is for frame 1"):
        run("sam2", tmp_path / "in", tmp_path / "out", *words)


def test_a_model_for_images_cannot_follow(models, clip, tmp_path):
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a Sam2VideoModel, such as .*; another model is needed"):
        run("sam2", clip, tmp_path / "out", *given(models, f"tool.boxes=[{BOX}]"))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tool=sam2 needs one of tool.boxes or tool.points, tool.prompts=FILE.json, tool.masks=FOLDER"),
        ({"boxes": [BOX], "masks": "x"}, "tool=sam2 needs one of"),
        ({"model": None, "boxes": [BOX]}, "tool.model=... is missing"),
        ({"boxes": []}, "tool has no box and no point of the subject"),
        ({"boxes": [[0.1, 0.2, 0.3]]}, r"tool.boxes: a box is \[left, top, right, bottom\] relative to the image"),
        ({"boxes": [[0.5, 0.2, 0.3, 0.9]]}, "left below right"),
        ({"boxes": [[10, 20, 300, 400]]}, "relative to the image, each from 0 to 1"),
        ({"boxes": [[-0.1, 0, 0.5, 0.5]]}, "each from 0 to 1"),
        ({"points": [[0.5]]}, r"tool.points: a point is \[x, y\] relative to the image"),
        ({"points": [[0.5, 1.5]]}, r"got \[0.5, 1.5\]"),
        ({"points": [[0.5, 0.5, 2]]}, r"got \[0.5, 0.5, 2\]"),
        ({"points": [[0.5, 0.5, 0]]}, "no box and no point of the subject"),
        ({"boxes": [BOX, OTHER], "points": [[0.5, 0.5]]}, "2 boxes and points; points go with one box at most"),
        ({"masks": "x", "coarse": "middle"}, "tool.coarse must be box or centre, got 'middle'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sam2(**{"model": "x"} | settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no readable JSON file"),
        ("{", "is no readable JSON file"),
        ("[]", 'must hold {"NAME": {"boxes"'),
        ("{}", "must hold"),
        ('{"a": [1]}', "must hold"),
        ('{"a": {"box": [0, 0, 1, 1]}}', "a: 'box' is unknown; there are boxes, points and frame"),
        ('{"a": {"boxes": {"x": 1}}}', "a: boxes and points are lists"),
        ('{"a": {"boxes": [0, 0, 1, 1]}}', r"a.boxes: a box is"),
        ('{"a": {"boxes": [["x", 0, 1, 1]]}}', r"a.boxes: a box is"),
        ('{"a": {"boxes": [[0, 0, 1, 1]], "frame": -1}}', "a.frame must be a frame's number, from 0, got -1"),
        ('{"a": {"boxes": [[0, 0, 1, 1]], "frame": true}}', "got True"),
        ('{"a": {}}', "a has no box and no point"),
    ],
)
def test_prompt_files_that_say_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "where.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path), "tool.prompts")


def test_whole_images_and_borders_are_fair_boxes():
    prompt = from_settings([[0, 0, 1, 1]], [[0, 1], [1.0, 0.0, 0]], "x")
    ((coordinates, labels),) = prompt.subjects(100)
    assert coordinates.tolist() == [[[[0, 0], [100, 100], [0, 100], [100, 0]]]]
    assert labels.tolist() == [[[2, 3, 1, 0]]]
