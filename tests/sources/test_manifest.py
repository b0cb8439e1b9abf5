"""A manifest names media, masks and captions wherever they lie."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mpp.sources.items import Item
from mpp.sources.manifest import Row
from mpp.sources.settings import SourceSettings
from mpp.sources.source import FolderSource

FILES = ["set/a.png", "set/deep/b.jpg", "set/clip.mp4", "set/frames.v1/0.png", "set/m/a.tif", "set/m/b.mask",
         "set/m.mp4", "set/l0.png", "set/l1.png", "other/c.png", "other/a.png"]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def source(root, *rows, **settings):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / "set" / "m.jsonl").write_text(text)
    return FolderSource(cache_dir="cache", manifest=str(root / "set" / "m.jsonl"), **settings)


def items(root, *rows, layered=False, **settings):
    return source(root, *rows, **settings).items(with_layers=layered)


def test_all_fields_of_a_row_reach_its_item(root):
    row = {
        "media": "a.png", "mask": "m/a.tif", "caption": " one \n two", "key": "first/x", "repeats": 4,
        "invert_mask": True, "controls": ["../other/c.png", "deep/b.jpg"], "layers": ["l0.png", "l1.png"],
        "layer_masks": ["m/a.tif", None],
    }  # fmt: skip
    where = root / "set"
    (item,) = items(root, row, layered=True)
    assert item == Item(
        key="first/x", split="train", media=where / "a.png", mask=where / "m" / "a.tif", mask_kind="manifest",
        caption="one two", captioned=True, layers=(where / "l0.png", where / "l1.png"),
        layer_masks=(where / "m" / "a.tif", None), controls=(root / "other" / "c.png", where / "deep" / "b.jpg"),
        invert=True, repeats=4,
    )  # fmt: skip
    (plain,) = items(root, row)
    assert (plain.layers, plain.layer_masks) == ((), ())


def test_what_a_row_leaves_out_is_as_the_settings_say(root):
    (item,) = items(
        root, {"media": "a.png", "layers": ["l0.png"]}, layered=True,
        invert_mask=True, repeats=3, require_mask=True, mask_sources=["folder"],
    )  # fmt: skip
    assert (item.key, item.mask, item.mask_kind, item.caption, item.captioned) == ("a", None, None, "", False)
    assert (item.invert, item.repeats, item.require_mask, item.alpha, item.layer_masks) == (
        True,
        3,
        True,
        False,
        (None,),
    )


def test_keys_are_paths_below_the_manifest_and_whole_paths_elsewhere(root):
    rows = [{"media": name} for name in ("deep/b.jpg", "clip.mp4", "frames.v1", "../other/c.png")]
    whole = f"{root}/other/c".lstrip("/")
    assert {item.key for item in items(root, *rows)} == {"deep/b", "clip", "frames.v1", whole}


def test_videos_and_folders_of_frames_may_have_masks_that_move_and_starts(root):
    found = items(
        root, {"media": "clip.mp4", "mask": "m.mp4", "starts": [5, 0]}, {"media": "frames.v1", "mask": "m"},
        {"media": "a.png", "mask": "m/b.mask"},
    )  # fmt: skip
    assert [(item.key, item.video, item.mask.name, item.starts) for item in found] == [
        ("a", False, "b.mask", ()), ("clip", True, "m.mp4", (5, 0)), ("frames.v1", True, "m", ())]  # fmt: skip


def test_a_row_may_be_for_validation_and_named_datasets_prefix_its_key(root):
    rows = [{"media": "a.png"}, {"media": "deep/b.jpg", "split": "val"}]
    train, val = items(root, *rows, repeats=5)
    assert [(item.key, item.split, item.repeats) for item in (train, val)] == [
        ("a", "train", 5),
        ("@val/deep/b", "val", 1),
    ]
    chosen = FolderSource(cache_dir="cache", datasets={"one": {"manifest": str(root / "set" / "m.jsonl")}})
    assert [item.key for item in chosen.items()] == ["one/a", "@val/one/deep/b"]


def test_two_rows_with_one_key_or_one_media_are_refused_naming_both_lines(root):
    with pytest.raises(ValueError, match=r"m\.jsonl:1 and .*m\.jsonl:3 both claim the key a; rename"):
        items(root, {"media": "a.png"}, "", {"media": "../other/a.png", "key": "a"})
    with pytest.raises(ValueError, match=r"m\.jsonl:1 and .*m\.jsonl:2 are the same file .*set/a\.png; leave one out"):
        items(root, {"media": "a.png"}, {"media": "deep/../a.png", "key": "b"})
    datasets = {"one": {"image_dir": f"{root}/set/deep"}, "two": {"manifest": f"{root}/set/m.jsonl"}}
    source(root, {"media": "deep/b.jpg"})
    with pytest.raises(ValueError, match=r"b\.jpg \(data.datasets.one\) and .*m\.jsonl:1 are the same file"):
        FolderSource(cache_dir="cache", datasets=datasets).items()


@pytest.mark.parametrize("key", ["", "../x", "/x", "a//b", "a/./b", "x" * 201, "a\0b"])
def test_keys_that_cannot_name_files_are_refused(root, key):
    with pytest.raises(
        ValueError, match=r"m\.jsonl:1: the key .* (has an empty part|longer than 200 bytes|has a part)"
    ):
        items(root, {"media": "a.png", "key": key})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"media": "none.png"}, r"none\.png is not there"),
        ({"media": "a.png", "mask": "m/none.png"}, r"m/none\.png is not there"),
        ({"media": "m.jsonl"}, r"m\.jsonl is no image, video or folder of frames"),
        ({"media": "a.png", "mask": "m.mp4"}, r"the mask .*m\.mp4 is a video or a folder, its media is an image"),
        ({"media": "a.png", "mask": "m"}, r"the mask .*m is a video or a folder, its media is an image"),
        ({"media": "a.png", "mask": "a.png"}, r"a\.png is named as its own mask"),
        ({"media": "a.png", "controls": ["clip.mp4"]}, r"clip\.mp4 is no image; layers, their masks and controls"),
        ({"media": "a.png", "starts": [1]}, r"starts are for videos, and .*a\.png is an image"),
        ({"media": "clip.mp4", "starts": [1, 1]}, "starts must be different numbers of frames"),
        ({"media": "clip.mp4", "starts": [-1]}, "starts must be different numbers of frames"),
        ({"media": "a.png", "layers": ["l0.png"], "layer_masks": [None, None]}, "it has 1 layers and 2 layer_masks"),
        ({"media": "a.png", "repeats": 0}, "repeats must be at least 1"),
        ({"media": "a.png", "split": "val", "repeats": 2}, "and 1 for validation, got 2"),
        ({"media": "a.png", "mask": ""}, "an empty path; leave the field out"),
        ({"media": " "}, "an empty path"),
        ({"mask": "a.png"}, "media is missing"),
        ({"media": "a.png", "Mask": "m/a.tif"}, "Mask is not known; there are media, mask, caption, key, split"),
        ({"media": "a.png", "repeats": "2"}, 'repeats should be a valid integer, got "2"'),
        ({"media": "a.png", "split": "test"}, "split should be 'train' or 'val', got \"test\""),
        ({"media": "nofs://b/a.png"}, "nofs://b/a.png cannot be reached"),
        ('{"media": "a.png"', "is not JSON"),
        ("7", "is 7, not an object"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(root, row, message):
    with pytest.raises(ValueError, match=message) as error:
        items(root, {"media": "deep/b.jpg"}, row)
    assert "m.jsonl:2" in str(error.value)


def test_a_manifest_without_rows_or_that_is_not_there_is_named(root):
    with pytest.raises(ValueError, match=r"data.manifest=.*m\.jsonl has no rows"):
        items(root)
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read \(it is not there\)"):
        FolderSource(cache_dir="cache", manifest=str(root / "none.jsonl")).items()


def test_a_name_that_no_file_can_have_is_refused(root):
    with pytest.raises(ValueError, match=r"x\.png cannot be read \(File name too long\)"):
        items(root, {"media": "x" * 300 + ".png"})


@pytest.mark.parametrize("record", [Row, SourceSettings])
def test_the_guide_names_every_field(record):
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    missing = [field.name for field in fields(record) if not re.search(rf"`(data\.)?{field.name}`", guide)]
    assert missing == []


def test_nothing_named_in_a_manifest_is_unused(root):
    chosen = source(root, {"media": "a.png", "mask": "m/a.tif"})
    assert chosen.left_over(chosen.items(), with_layers=False).unused == []
