"""Folders that mpp writes are told from folders of media, wherever they lie."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from mpp.cache.format import Cache
from mpp.masking.alpha import FromAlpha
from mpp.masking.job import MaskJob
from mpp.media.own import MARK, is_own, mark
from mpp.media.paths import look_through
from mpp.sources.source import FolderSource
from tests import helpers


def cache(folder):
    """What prepare leaves: previews, and the marker that it writes first."""
    return {f"{folder}cache.json": json.dumps({"format": 3, "mpp": "0.1.0"}), f"{folder}previews/a.jpg": "x"}


def run(folder):
    return {f"{folder}.hydra/config.yaml": "_target_: mpp.x.Y", f"{folder}regions.png": "x",
            f"{folder}samples/step-000500/0_a.png": "x", f"{folder}checkpoints/last.ckpt": "x"}  # fmt: skip


def marked(folder):
    return {f"{folder}{MARK}": "mpp", f"{folder}0_a_photo.png": "x", f"{folder}deep/er/0_b.mp4": "x"}


def others(folder):
    """Another program's folders, which hold media of the user's."""
    return {f"{folder}cache.json": '{"files": []}', f"{folder}.hydra/config.yaml": "lr: 1", f"{folder}mine.png": "x"}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_own_folders_are_left_out_at_any_depth_and_others_are_not(tmp_path, where):
    draw = random.Random(0)
    for number in range(40):
        root = tmp_path / str(number) if where == "local" else UPath(f"memory://own/{number}")
        files, media, own = {"a.png": "x"}, {"a.png"}, set()
        places = [""]
        for n in range(draw.randint(1, 6)):
            place = f"{draw.choice(places)}f{n}/"
            kind = draw.choice([cache, run, marked, others, None])
            if kind is None:
                files |= {f"{place}b.png": "x"}
                places.append(place)
            else:
                files |= kind(place)
            inside_own = any(place.startswith(f"{folder}/") for folder in own)
            if kind in (cache, run, marked) and not inside_own:
                own.add(place[:-1])
            if kind in (others, None) and not inside_own:
                media.add(f"{place}{'b' if kind is None else 'mine'}.png")
            places += [place] if kind is not None and draw.random() < 0.5 else []
        own = {folder for folder in own if not any(folder.startswith(f"{other}/") for other in own)}
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        found = look_through(root)
        assert set(found.own) == own
        assert {listed.name for listed in found.files if listed.name.endswith(".png")} == media
        chosen = FolderSource(image_dir=str(root), cache_dir="elsewhere")
        assert {f"{item.key}.png" for item in chosen.items()} == media
        assert {row.name for row in chosen.left_over(chosen.items(), with_layers=False).passed} >= {
            f"{f}/" for f in own
        }


def test_a_link_to_an_own_folder_is_left_out(tmp_path):
    for name, text in {"photos/a.png": "x", **cache("elsewhere/")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    assert look_through(tmp_path / "photos").own == ["link"]


@pytest.mark.parametrize("option", ["image_dir", "mask_dir", "control_dir", "val_image_dir"])
@pytest.mark.parametrize("kind", [cache, run, marked])
def test_an_own_folder_as_a_folder_of_data_is_refused(tmp_path, option, kind):
    for name, text in {"photos/a.png": "x", "own/a.png": "x", **kind("own/")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folders = {"image_dir": str(tmp_path / "photos")} | {option: str(tmp_path / "own")}
    with pytest.raises(ValueError, match="own is a folder that mpp wrote, .*; name another folder, or move"):
        FolderSource(**folders, cache_dir="elsewhere").items()


@pytest.mark.parametrize("option", ["image_dir", "mask_dir", "control_dir", "val_image_dir"])
def test_the_cache_in_the_place_of_data_is_refused(tmp_path, option):
    for name in ("photos/a.png", "other/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    folders = {"image_dir": str(tmp_path / "photos")} | {option: str(tmp_path / "other")}
    with pytest.raises(ValueError, match=rf"data.{option} and data.cache_dir are both .*; choose .*other_cache"):
        FolderSource(**folders, cache_dir=f"{tmp_path}/photos/../other").items()


@pytest.mark.slow
def test_what_mpp_makes_among_the_media_is_read_by_no_second_preparation(tmp_path, pipeline):
    """The commands themselves: prepare, train with samples, the masks' previews, prepare again."""
    helpers.draw_photos(tmp_path / "photos", tmp_path / "photos" / "their masks", 4)
    inside = tmp_path / "photos" / "out"
    where = [f"data.mask_dir={tmp_path / 'photos' / 'their masks'}", f"data.cache_dir={inside / 'cache'}"]
    prompts = ["sampling.prompts=[a box]", "sampling.height=32", "sampling.width=32", "sampling.steps=1"]
    first = helpers.prepare(pipeline, tmp_path, *where, *prompts)
    more = ["trainer.max_steps=1", "callbacks.samples.every_n_steps=1", "callbacks.report.pictures=4", *prompts]
    helpers.train(pipeline, inside / "cache", inside / "run", *more)
    assert (inside / "run" / "regions.png").is_file()
    assert list(inside.glob("run/samples/*/*.png"))
    again = helpers.prepare(pipeline, tmp_path, *where, *prompts)
    assert (again.encoded, again.current) == (0, first.encoded) == (0, 4)
    assert len(Cache(inside / "cache").entries()) == 4
    assert [row.name for row in again.left_over.passed] == ["out/run/"]


def test_a_folder_of_previews_of_masks_is_marked_and_one_of_masks_is_not(tmp_path):
    (tmp_path / "cut").mkdir()
    Image.fromarray(np.full((16, 16, 4), 128, np.uint8)).save(tmp_path / "cut" / "a.png")
    folders = {name: str(tmp_path / name) for name in ("output", "preview")}
    MaskJob(tool=FromAlpha(), input=str(tmp_path / "cut"), **folders).run()
    assert is_own(tmp_path / "preview")
    assert not is_own(tmp_path / "output")


def test_a_folder_that_cannot_be_marked_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    mark(tmp_path / "file" / "nowhere")
    assert not is_own(tmp_path / "file" / "nowhere")
