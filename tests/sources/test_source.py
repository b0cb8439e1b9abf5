"""Media, masks and captions in folders."""

import json
import os
from pathlib import Path

import pytest

from mpp.sources.captions import CaptionVariants
from mpp.sources.source import FolderSource


def touch(root, *names):
    """Files whose contents a source does not look at."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def source(root, **settings):
    if (root / "masks").is_dir():
        settings = {"mask_dir": str(root / "masks")} | settings
    return FolderSource(image_dir=str(root / "photos"), cache_dir=str(root / "cache"), **settings)


def masks(root, **settings):
    """Name and kind of each media's mask."""
    return {
        item.key: item.mask and (item.mask.relative_to(root).as_posix(), item.mask_kind)
        for item in source(root, **settings).items()
    }


def test_images_and_videos_are_found_in_subfolders_and_hidden_files_are_not(tmp_path):
    touch(tmp_path / "photos", "b.png", "a/c.MP4", "a/d.JPG", ".x.png", ".trash/e.png", "notes.md", "a/.d.txt")
    found = source(tmp_path).items()
    assert [(item.key, item.video) for item in found] == [("a/c", True), ("a/d", False), ("b", False)]
    assert [item.media for item in found] == [tmp_path / "photos" / name for name in ("a/c.MP4", "a/d.JPG", "b.png")]


def test_an_image_and_a_video_of_one_stem_are_refused(tmp_path):
    touch(tmp_path / "photos", "a.png", "a.mp4")
    with pytest.raises(ValueError, match=r"two media share one stem: .*a\.mp4, .*a\.png; rename or remove one"):
        source(tmp_path).items()


def test_linked_folders_are_searched_but_not_in_circles_and_a_link_to_nothing_is_not_dropped(tmp_path):
    touch(tmp_path / "store", "s.png", "deep/t.png")
    touch(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert [item.key for item in source(tmp_path).items()] == ["a", "lost", "more/deep/t", "more/s"]


def test_pipes_and_sockets_are_no_media(tmp_path):
    touch(tmp_path / "photos", "a.png")
    os.mkfifo(tmp_path / "photos" / "b.png")  # opening it would wait forever
    assert [item.key for item in source(tmp_path).items()] == ["a"]


@pytest.mark.parametrize(
    ("media", "files", "found"),
    [
        ("a.png", ["masks/a.tif"], ("masks/a.tif", "folder")),
        ("s/a.png", ["masks/s/a.png", "masks/a.png"], ("masks/s/a.png", "folder")),
        ("a.png", ["photos/a-masklabel.png"], ("photos/a-masklabel.png", "masklabel")),
        ("a.png", ["photos/a.mask.png"], ("photos/a.mask.png", "sidecar")),
        ("a.png", ["photos/a.mask.WebP"], ("photos/a.mask.WebP", "sidecar")),
        ("a.png", ["photos/a.mask"], ("photos/a.mask", "sidecar")),
        ("v1.2.png", ["photos/v1.2.mask"], ("photos/v1.2.mask", "sidecar")),
        ("a.mp4", ["masks/a.png"], ("masks/a.png", "folder")),
        ("a.mp4", ["masks/a.mkv"], ("masks/a.mkv", "folder")),
        ("a.mp4", ["masks/a/0.png", "masks/a/1.png"], ("masks/a", "folder")),
        ("s/v1.2.mp4", ["masks/s/v1.2/0.png"], ("masks/s/v1.2", "folder")),
        ("a.mp4", ["photos/a.mask.mov"], ("photos/a.mask.mov", "sidecar")),
        ("a.mp4", ["photos/a.mask/0.png", "photos/a.mask/1.png"], ("photos/a.mask", "sidecar")),
        ("a.png", ["photos/a-masklabel.jpg"], ("photos/a-masklabel.jpg", "masklabel")),
    ],
)
def test_masks_are_found_and_are_no_media(tmp_path, media, files, found):
    touch(tmp_path / "photos", media)
    touch(tmp_path, *files)
    got = masks(tmp_path)
    assert got == {media.rpartition(".")[0]: found}


def test_the_first_kind_of_mask_that_is_there_wins(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/a-masklabel.png", "photos/a.mask.png", "masks/a.png")
    assert masks(tmp_path)["a"] == ("masks/a.png", "folder")
    assert masks(tmp_path, mask_sources=["sidecar", "folder"])["a"] == ("photos/a.mask.png", "sidecar")
    assert masks(tmp_path, mask_sources=["masklabel"])["a"] == ("photos/a-masklabel.png", "masklabel")
    assert masks(tmp_path, mask_sources=["alpha"])["a"] is None
    (with_alpha,) = source(tmp_path).items()
    (without,) = source(tmp_path, mask_sources=["sidecar"]).items()
    assert (with_alpha.alpha, without.alpha) == (True, False)


@pytest.mark.parametrize("mask", ["masks/a.mp4", "photos/a.mask.mp4", "photos/a.mask/0.png"])
def test_an_image_with_a_mask_that_moves_is_refused(tmp_path, mask):
    touch(tmp_path, "photos/a.png", mask)
    with pytest.raises(ValueError, match=r"is a video or a folder of frames, the media .* is one image: .*a\.png"):
        source(tmp_path).items()


@pytest.mark.parametrize(
    "files", [["photos/a.mask", "photos/a.mask.png"], ["photos/a.mask.png", "photos/a.mask/0.png"],
              ["masks/a.png", "masks/a.mp4"], ["masks/a.png", "masks/a/0.png"]]
)  # fmt: skip
def test_two_masks_of_one_kind_are_refused(tmp_path, files):
    touch(tmp_path, "photos/a.mp4", *files)
    with pytest.raises(ValueError, match="two masks share one stem"):
        source(tmp_path).items()


def test_a_folder_beside_a_video_keeps_its_own_masks(tmp_path):
    touch(tmp_path, "photos/a.mp4", "photos/a/x.png", "masks/a/x.png")
    assert masks(tmp_path) == {"a": None, "a/x": ("masks/a/x.png", "folder")}


def test_layers_have_sidecars_of_their_own(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/a.layer0.png", "photos/a.layer0.mask.png", "photos/a.layer1.png")
    (item,) = source(tmp_path).items(with_layers=True)
    assert [mask and mask.name for mask in item.layer_masks] == ["a.layer0.mask.png", None]


def test_numbered_controls_go_to_the_sample_of_their_own_name_first(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/a_0.png", "controls/a.png", "controls/a_0.png", "controls/b.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 is a video; control images are images"):
        source(tmp_path, control_dir=str(tmp_path / "controls")).items()
    (tmp_path / "controls" / "b.mp4").unlink()
    found = source(tmp_path, control_dir=str(tmp_path / "controls")).items()
    assert [[path.name for path in item.controls] for item in found] == [["a.png"], ["a_0.png"]]
    touch(tmp_path, "controls/c_1.png", "controls/c_01.png", "photos/c.png")
    with pytest.raises(ValueError, match="are both number 1"):
        source(tmp_path, control_dir=str(tmp_path / "controls")).items()


def test_files_that_belong_to_no_media_are_named(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/b.mask.png", "photos/c-masklabel.png", "photos/a-masklabel.jpg")
    touch(tmp_path, "photos/d.txt", "photos/e.mask/0.png", "photos/a.txt", "masks/A.png", "masks/a.png")
    chosen = source(tmp_path)
    expected = ["A.png", "b.mask.png", "c-masklabel.png", "d.txt", "e.mask"]
    assert sorted(chosen.left_over(chosen.items(), with_layers=False).unused) == expected


def test_invert_repeats_and_requirement_are_said_of_each_item(tmp_path):
    touch(tmp_path, "photos/a.png", "held/v.png")
    held = {"val_image_dir": str(tmp_path / "held")}
    train, val = source(tmp_path, invert_mask=True, repeats=3, require_mask=True, **held).items()
    assert (train.invert, train.repeats, train.require_mask) == (True, 3, True)
    assert (val.key, val.invert, val.repeats, val.require_mask) == ("@val/v", True, 1, True)  # measured once


def test_validation_around_the_training_folder_leaves_it_out(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/train/b.png")
    photos = tmp_path / "photos"
    chosen = FolderSource(image_dir=str(photos / "train"), cache_dir="cache", val_image_dir=str(photos))
    assert [item.key for item in chosen.items()] == ["b", "@val/a"]


def test_masks_that_are_the_images_themselves_are_refused(tmp_path):
    touch(tmp_path, "photos/a.png")
    with pytest.raises(ValueError, match="mask_dir and data.image_dir are both .*would be their own masks"):
        source(tmp_path, mask_dir=str(tmp_path / "photos"))


@pytest.mark.parametrize("name", ["x" * 220 + ".png", os.fsdecode(b"caf\xe9.png")])
def test_names_that_the_cache_cannot_hold_are_refused(tmp_path, name):
    touch(tmp_path, f"photos/{name}")
    with pytest.raises(ValueError, match="the key .*(longer than 200 bytes|is not UTF-8)"):
        source(tmp_path).items()


def test_a_mirrored_copys_key_is_taken(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/a@flip.png")
    assert len(source(tmp_path).items()) == 2
    with pytest.raises(ValueError, match="has the key of a mirrored copy"):
        source(tmp_path, flip=True).items()


def test_one_file_under_two_names_is_refused(tmp_path):
    touch(tmp_path, "photos/a.png")
    (tmp_path / "photos" / "b.png").symlink_to(tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png and .*b\.png are the same file .*`repeats` shows media more often"):
        source(tmp_path).items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_sources": ["folder", "magic"]}, "data.mask_sources may name folder, masklabel, sidecar, alpha, got 'm"),
        ({"mask_sources": ["alpha", "folder"]}, "alpha must be the last"),
        ({"repeats": 0}, "data.repeats must be at least 1, got 0"),
        ({"on_error": "hope"}, "data.on_error must be stop or skip"),
        ({"manifest": "m.jsonl"}, "data.manifest names media, masks and captions itself; leave out data.image_dir"),
        ({"val_mask_dir": "m"}, "data.val_mask_dir has no data.val_image_dir"),
        ({"mask_dir": " "}, "data.mask_dir is empty"),
        ({"datasets": {"a": {"image_dir": "x"}}}, "data.image_dir and data.datasets are both set"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        FolderSource(image_dir="photos", cache_dir="cache", **settings)


def test_a_source_without_media_and_a_remote_cache_are_refused():
    with pytest.raises(ValueError, match="set data.image_dir, data.manifest or data.datasets"):
        FolderSource(cache_dir="cache")
    with pytest.raises(ValueError, match="data.cache_dir=s3://b/c must be a folder on this machine"):
        FolderSource(image_dir="photos", cache_dir="s3://b/c")


# ---------------------------------------------------------------- several datasets


@pytest.fixture
def two(tmp_path):
    touch(tmp_path, "photos/a.png", "masks/a.png", "clips/a.mp4", "clip_masks/a.mp4", "held/a.png")
    return tmp_path


def both(root):
    return {
        "photos": {"image_dir": f"{root}/photos", "mask_dir": f"{root}/masks", "repeats": 3,
                   "val_image_dir": f"{root}/held"},
        "clips": {"image_dir": f"{root}/clips", "mask_dir": f"{root}/clip_masks", "invert_mask": True,
                  "caption_variants": {"trigger": "ohwx"}},
    }  # fmt: skip


def test_datasets_keep_their_own_settings_and_take_the_others_from_the_top(two):
    chosen = FolderSource(
        cache_dir="cache", datasets=both(two), repeats=2, caption_variants=CaptionVariants("sks", separator=";")
    )
    clip, photo, held = chosen.items()
    assert [item.key for item in (clip, photo, held)] == ["clips/a", "photos/a", "@val/photos/a"]
    assert [(item.invert, item.repeats, item.caption) for item in (clip, photo, held)] == [
        (True, 2, "ohwx"), (False, 3, "sks"), (False, 1, "sks")]  # fmt: skip
    assert [item.mask and item.mask.parent.name for item in (clip, photo, held)] == ["clip_masks", "masks", None]
    left = chosen.left_over([clip, held], with_layers=False)
    assert [row.name for row in left.passed] == ["masks/a.png"]  # the masks of all datasets are looked through


def test_a_yaml_of_datasets_is_relative_to_its_own_folder(two, tmp_path_factory, monkeypatch):
    (two / "sets.yaml").write_text(
        "photos: {image_dir: photos, mask_dir: masks, repeats: 3, val_image_dir: held}\n"
        "clips:\n  image_dir: clips\n  mask_dir: clip_masks\n  invert_mask: true\n"
        "  caption_variants: {trigger: ohwx}\n"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    from_file = FolderSource(cache_dir="cache", datasets=str(two / "sets.yaml")).items()
    assert from_file == FolderSource(cache_dir="cache", datasets=both(two)).items()


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"a": {"image_dir": "x", "repeat": 3}}, r"data.datasets.a.repeat is not known; there are image_dir, manifest"),
        ({"a": {"image_dir": "x", "repeats": "3"}}, r'a.repeats should be a valid integer, got "3"'),
        (
            {"a": {"image_dir": "x", "caption_variants": {"trigger": 7}}},
            r"a.caption_variants.trigger should be .*got 7",
        ),
        (
            {"a": {"image_dir": "x", "mask_sources": ["magic"]}},
            r"a.mask_sources.0 should be 'folder', .* got \"magic\"",
        ),
        ({"a": {"image_dir": "x", "repeats": 0}}, r"data.datasets.a: data.repeats must be at least 1"),
        ({"a": {"mask_dir": "x"}}, "data.datasets.a has neither image_dir nor manifest"),
        ({"a/b": {"image_dir": "x"}}, "a dataset's name must be letters"),
        ({}, "names no dataset"),
    ],
)
def test_datasets_that_cannot_be_are_refused_at_once(datasets, message):
    with pytest.raises(ValueError, match=message):
        FolderSource(cache_dir="cache", datasets=datasets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {image_dir: x}\na: {image_dir: y}\n", "'a' is there twice"),
        ("a: [", "is not YAML"),
        ("- a\n", "should map names of datasets to their settings, got list"),
        ("a: photos\n", "should be settings like .image_dir: ....*got 'photos'"),
        ("on: {image_dir: x}\n", "a dataset's name must be letters.*got True"),
        ("a: {image_dir: x, ? [b, c] : 1}\n", "is not YAML|holds what no setting can be"),
        ("a: &a {image_dir: *a}\n", "is not YAML|holds what no setting can be"),
    ],
)
def test_a_damaged_yaml_of_datasets_is_named(tmp_path, text, message):
    (tmp_path / "sets.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        FolderSource(cache_dir="cache", datasets=str(tmp_path / "sets.yaml")).items()
    assert "sets.yaml" in str(error.value)


def test_one_file_in_two_datasets_is_refused_naming_both(two):
    datasets = {"one": {"image_dir": f"{two}/photos"}, "two": {"image_dir": f"{two}/photos"}}
    with pytest.raises(ValueError, match=r"\(data.datasets.one\) and .*\(data.datasets.two\) are the same file"):
        FolderSource(cache_dir="cache", datasets=datasets).items()


def test_masks_of_one_dataset_inside_the_media_of_another_are_no_media(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/m/b.png", "more/b.png")
    datasets = {
        "one": {"image_dir": f"{tmp_path}/photos"},
        "two": {"image_dir": f"{tmp_path}/more", "mask_dir": f"{tmp_path}/photos/m"},
    }
    assert [item.key for item in FolderSource(cache_dir="cache", datasets=datasets).items()] == ["one/a", "two/b"]


# ---------------------------------------------------------------- the record


@pytest.mark.parametrize("form", ["folder", "datasets", "yaml", "manifest"])
def test_the_record_finds_the_same_items_from_any_folder(two, form, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(two)
    (two / "sets.yaml").write_text(json.dumps(both("nowhere") | both(".")))
    (two / "m.jsonl").write_text('{"media": "photos/a.png", "mask": "masks/a.png", "caption": "x, y"}\n')
    settings = {
        "folder": {"image_dir": "photos", "mask_dir": "masks", "val_image_dir": "held"},
        "datasets": {"image_dir": None, "datasets": both(".")},
        "yaml": {"image_dir": None, "datasets": "sets.yaml"},
        "manifest": {"image_dir": None, "manifest": "m.jsonl"},
    }[form]
    chosen = FolderSource(
        **settings, cache_dir="cache", invert_mask=True, resolution=96, flip=True,
        caption_variants=CaptionVariants("sks", shuffles=2), mask_sources=["folder"],
    )  # fmt: skip
    expected = [(item.key, os.path.abspath(item.media), item.caption, item.invert) for item in chosen.items()]
    record = json.loads(json.dumps(chosen.sources_record()))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = FolderSource.from_record(record)
    assert [(item.key, str(item.media), item.caption, item.invert) for item in again.items()] == expected
    assert again.sources_record() == record
    assert (again.resolution, again.flip, Path(again.cache_dir)) == (96, True, two / "cache")


def test_a_damaged_record_is_refused(two):
    record = FolderSource(image_dir=f"{two}/photos", cache_dir="cache").sources_record()
    for damage in ({"repeats": "2"}, {"new": 1}):
        with pytest.raises(ValueError, match="the record of the sources.(repeats should|new is not known)"):
            FolderSource.from_record(record | damage)
