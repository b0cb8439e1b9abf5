"""Layers, layer masks and control images from files to tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.media.geometry import Geometry
from mpp.models.contract import ImageInputs, LatentSpec
from mpp.preparing.frames import (
    Cut,
    as_image,
    as_pixels,
    check_controls,
    check_layers,
    frame_files,
    mask_files,
    read_controls,
    read_item_frames,
    read_item_masks,
)
from mpp.sources.source import FolderSource

LAYERED = LatentSpec(16, 8, 1, (1, 2, 2), layered=True)
PLAIN = LatentSpec(16, 8, 1, (1, 2, 2))
SIDE = 64


def save(path, value, size=(SIDE, SIDE), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def root(tmp_path):
    """One image with two layers."""
    save(tmp_path / "photos" / "p.png", (10, 20, 30))
    save(tmp_path / "photos" / "p.layer0.png", (40, 50, 60))
    save(tmp_path / "photos" / "p.layer1.png", (70, 80, 90, 0), mode="RGBA")
    (tmp_path / "masks").mkdir()
    return tmp_path


def source(root, **settings):
    return FolderSource(image_dir=str(root / "photos"), cache_dir="cache", mask_dir=str(root / "masks"), **settings)


def items(root, *, layered=True, **settings):
    return source(root, **settings).items(with_layers=layered)


def half(root, name, *, left):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255 * left
    mask[:, SIDE // 2 :] = 255 * (not left)
    Image.fromarray(mask).save(root / "masks" / name)


def test_layers_belong_to_their_image_in_order_and_are_no_samples_of_their_own(root):
    (item,) = items(root)
    assert item.key == "p"
    assert [path.name for path in item.layers] == ["p.layer0.png", "p.layer1.png"]
    assert [path.name for path in frame_files(item)] == ["p.png", "p.layer0.png", "p.layer1.png"]
    (plain,) = items(root, layered=False)
    assert plain.layers == ()
    assert [path.name for path in frame_files(plain)] == ["p.png"]


def test_frames_are_the_image_and_its_layers_with_alpha_and_colours_kept_under_it(root):
    (item,) = items(root)
    frames = read_item_frames(item, Cut(Geometry((SIDE, SIDE), (32, 32))))
    assert frames.shape == (4, 3, 32, 32)
    assert frames[:, :, 0, 0].T.tolist() == [[10, 20, 30, 255], [40, 50, 60, 255], [70, 80, 90, 0]]
    assert as_pixels(frames)[:, 2, 0, 0].tolist() == pytest.approx([v / 127.5 - 1 for v in (70, 80, 90, 0)])
    shown = [as_image(frames[:, number]).getpixel((0, 0)) for number in range(3)]
    assert shown == [(10, 20, 30), (40, 50, 60), (128, 128, 128)]  # the last is transparent


def test_each_layer_has_its_own_mask_and_the_whole_learns_where_any_layer_does(root):
    half(root, "p.layer0.png", left=True)
    Image.new("L", (SIDE, SIDE), 0).save(root / "masks" / "p.layer1.png")
    (item,) = items(root)
    mask = read_item_masks(item, Cut(Geometry((SIDE, SIDE), (32, 32))), (16, 3, 4, 4), LAYERED)
    left = torch.tensor([1.0, 1, 0, 0]).expand(4, 4)
    assert mask.shape == (1, 3, 4, 4)
    assert torch.equal(mask[0, 0], left)  # the image itself has none of its own
    assert torch.equal(mask[0, 1], left)
    assert torch.equal(mask[0, 2], torch.zeros(4, 4))
    half(root, "p.png", left=False)
    (item,) = items(root)
    mask = read_item_masks(item, Cut(Geometry((SIDE, SIDE), (32, 32))), (16, 3, 4, 4), LAYERED)
    assert torch.equal(mask[0, 0], 1 - left)


def test_an_images_mask_alone_holds_for_all_layers(root):
    half(root, "p.png", left=True)
    (item,) = items(root)
    mask = read_item_masks(item, Cut(Geometry((SIDE, SIDE), (32, 32), flip=True)), (16, 3, 4, 4), LAYERED)
    right = torch.tensor([0.0, 0, 1, 1]).expand(4, 4)  # mirrored
    assert all(torch.equal(frame, right) for frame in mask[0])


def test_a_layer_without_a_mask_beside_one_with_is_refused(root):
    half(root, "p.layer0.png", left=True)
    (item,) = items(root)
    with pytest.raises(ValueError, match=r"1 of its 2 layers have a mask, layer 1 has none; add p.layer1.png"):
        mask_files(item)


def test_a_layer_without_its_number_or_its_image_is_refused(root):
    save(root / "photos" / "p.layer3.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"p has layers \[0, 1, 3\] but no p.layer2"):
        items(root)
    (root / "photos" / "p.layer3.png").unlink()
    save(root / "photos" / "q.layer0.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"q.layer0.png is a layer of q, which is not there"):
        items(root)
    assert [item.key for item in items(root, layered=False)] == ["p", "q.layer0"]  # an ordinary image there


def test_layers_of_another_size_and_images_without_layers_are_refused(root):
    save(root / "photos" / "p.layer1.png", (1, 2, 3), size=(SIDE, 32))
    (item,) = items(root)
    with pytest.raises(ValueError, match=r"p.layer1.png is 64x32, its image .*p.png is 64x64"):
        check_layers(item, LAYERED)
    save(root / "photos" / "r.png", (1, 2, 3))
    bare = next(item for item in items(root) if item.key == "r")
    with pytest.raises(ValueError, match=r"r.png has no layers.*add r.layer0.png"):
        check_layers(bare, LAYERED)
    check_layers(bare, PLAIN)


@pytest.mark.parametrize(
    ("files", "found"),
    [(["p.png", "q.png"], ["p.png"]), (["p_0.png", "p_1.jpg", "p_x.png"], ["p_0.png", "p_1.jpg"])],
)
def test_control_images_are_matched_by_name_and_number(root, files, found):
    for name in files:
        save(root / "controls" / name, (0, 0, 0))
    (item,) = items(root, control_dir=str(root / "controls"))
    assert [path.name for path in item.controls] == found


def test_a_folder_of_controls_or_masks_inside_the_images_is_no_image(root):
    save(root / "photos" / "inner" / "p.png", (0, 0, 0))
    (item,) = items(root, control_dir=str(root / "photos" / "inner"))
    assert [path.name for path in item.controls] == ["p.png"]


def test_too_few_and_too_many_controls_are_refused_and_mirrored_with_their_sample(root):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 0] = 255
    (root / "controls").mkdir()
    Image.fromarray(image).save(root / "controls" / "p.png")
    (item,) = items(root, control_dir=str(root / "controls"))
    check_controls(item, ImageInputs(1, 1))
    with pytest.raises(ValueError, match=r"p.png has 1 control images, this model takes 2 to 3; put p.png or p_0.png"):
        check_controls(item, ImageInputs(2, 3))
    with pytest.raises(ValueError, match="has 1 control images, this model takes 0"):
        check_controls(item, ImageInputs())
    (kept,) = read_controls(item, Geometry((SIDE, 32), (32, 32)))
    (mirrored,) = read_controls(item, Geometry((SIDE, 32), (32, 32), flip=True))
    assert kept.size == (8, 8)  # another shape than the sample's: a reference, which is not cut
    assert np.array_equal(np.asarray(kept)[:, ::-1], np.asarray(mirrored))


def test_a_control_of_the_samples_shape_is_cut_with_it(root):
    """What lies at a place in the sample lies there in its control, also after the crop to a bucket."""
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = 255  # the edge is in the middle, before and after
    image[:, :10] = 128  # this is cut off
    (root / "controls").mkdir()
    Image.fromarray(image).save(root / "controls" / "p.png")
    (item,) = items(root, control_dir=str(root / "controls"))
    (control,) = read_controls(item, Geometry((160, 80), (32, 32)))
    assert control.size == (40, 40)
    assert np.array_equal(np.asarray(control), image[:, 20:60])


def test_numbers_with_a_gap_and_two_ways_to_name_controls_are_refused_and_unused_ones_are_named(root):
    for name in ("p_1.png", "stranger.png"):
        save(root / "controls" / name, (0, 0, 0))
    with pytest.raises(ValueError, match=r"control images of p are numbered \[1\]; number them from 0"):
        items(root, control_dir=str(root / "controls"))
    (root / "controls" / "p_1.png").rename(root / "controls" / "p_0.png")
    chosen = source(root, control_dir=str(root / "controls"))
    assert chosen.left_over(chosen.items(with_layers=True), with_layers=True).unused == ["stranger.png"]
    save(root / "controls" / "p.png", (0, 0, 0))
    with pytest.raises(ValueError, match="p.png and .*p_0.png are both control images of p"):
        items(root, control_dir=str(root / "controls"))


def test_validation_folders_inside_the_images_are_no_training_images(root):
    for folder in ("val", "valmasks", "valcontrols"):
        save(root / "photos" / folder / "v.png", (0, 0, 0))
    folders = {f"val_{what}_dir": str(root / "photos" / name) for what, name in
               (("image", "val"), ("mask", "valmasks"), ("control", "valcontrols"))}  # fmt: skip
    found = items(root, **folders)
    assert [(item.key, item.split) for item in found] == [("p", "train"), ("@val/v", "val")]
