"""What lies in a folder of media is used, or named with the reason; masks beside their images never train."""

import random
import string

import pytest

from mpp.media.images import SUFFIXES, VIDEO_SUFFIXES
from mpp.sources.passed import lines
from tests.sources.test_source import masks, source, touch

FOREIGN = [".psd", ".tga", ".jxl", ".json", ".npz", ".db", ".ogv", "", ".PSD"]


def stem(draw):
    """A name as cameras and people give them, without a word for masks."""
    return (
        "".join(draw.choices(string.ascii_letters + string.digits + "äß .-_()", k=draw.randint(1, 12))).strip(" .")
        or "x"
    )


def folder_of(draw):
    return "".join(f"{stem(draw)}/" for _ in range(draw.choice([0, 0, 1, 2])))


def mask_name(draw, name):
    word = draw.choice(["mask", "wmask", "masklabel", "Mask", "MASK"])
    return f"{name}{draw.choice('_-. ')}{word}{draw.choice(['.png', '.jpg', '.webp', '.PNG'])}"


def test_masks_beside_their_image_are_masks_of_it_whatever_joins_their_names(tmp_path):
    draw = random.Random(0)
    for number in range(60):
        root = tmp_path / str(number)
        stems = {f"{folder_of(draw)}{stem(draw)}".casefold() for _ in range(draw.randint(1, 6))}
        named = {name: mask_name(draw, name) for name in sorted(stems) if draw.random() < 0.7}
        touch(root / "photos", *(f"{name}{draw.choice(['.png', '.jpg', '.jfif', '.mp4'])}" for name in stems))
        touch(root / "photos", *named.values())
        found = {key: mask and mask[0] for key, mask in masks(root).items()}
        assert found == {name: f"photos/{named[name]}" if name in named else None for name in stems}


def test_every_file_is_used_or_named_with_a_reason(tmp_path):
    draw, tried = random.Random(1), 0
    for number in range(40):
        root = tmp_path / str(number)
        stems = [f"{folder_of(draw)}{stem(draw)}{n}" for n in range(draw.randint(1, 5))]
        files = [f"photos/{name}{draw.choice(sorted(SUFFIXES | VIDEO_SUFFIXES))}" for name in stems]
        others = [
            [f"photos/{name}{end}" for name in stems for end in (".txt", ".caption", "-condlabel.png")],
            [f"photos/{mask_name(draw, name)}" for name in stems],
            [f"photos/{stem(draw)}-masklabel.png", f"photos/.{stem(draw)}.png"],
            [f"{place}/{folder_of(draw)}{stem(draw)}{end}" for end in FOREIGN for place in ("photos", "masks")],
            [f"masks/{name}.png" for name in (*stems, stem(draw))],
        ]
        files += [draw.choice(draw.choice(others)) for _ in range(draw.randint(0, 10))] + [f"masks/{stems[0]}.png"]
        lower = {name.casefold(): name for name in files}
        touch(root, *lower.values())
        chosen = source(root)
        try:
            items = chosen.items()
        except ValueError as error:
            assert "share one stem" in str(error)  # two masks of one image, for example
            continue
        tried += 1
        left = chosen.left_over(items, with_layers=False)
        named = {f"photos/{row.name}" for row in left.passed} | {row.name for row in left.passed}
        named |= {path.relative_to(root).as_posix() for item in items for path in (item.media, item.mask) if path}
        named |= {f"photos/{item.key}{end}" for item in items for end in (".txt", ".caption") if item.captioned}
        rest = {name for name in lower.values() if name not in named}
        assert [name for name in rest if not {name.split("/", 1)[1], name.split("/")[-1]} & set(left.unused)] == []
    assert tried > 25


def test_images_called_like_masks_without_an_image_train_and_are_named(tmp_path):
    touch(tmp_path / "photos", "venetian_mask.png", "b.png", "b_mask.png")
    chosen = source(tmp_path)
    items = chosen.items()
    assert [item.key for item in items] == ["b", "venetian_mask"]
    assert chosen.left_over(items, with_layers=False).doubtful == ["venetian_mask.png"]


@pytest.mark.parametrize("name", ["a_mask_0.png", "a_mask2.png", "a mask (1).png", "mask_a.png", "a_masks.png"])
def test_several_masks_of_one_image_and_other_orders_are_refused_with_the_way(tmp_path, name):
    touch(tmp_path / "photos", "a.png", name)
    with pytest.raises(ValueError, match=r"is called like a mask of a, and would train as an image; .*call it a_mask"):
        source(tmp_path).items()


@pytest.mark.parametrize(
    ("media", "inside"),
    [("a.png", "masks/a.jpg"), ("s/a.png", "s/Mask/a.png"), ("a.png", "mask/a.png"), ("s/a.png", "s_masks/a.png"),
     ("a.mp4", "a_mask/0001.png"), ("t/s/a.png", "t/masks/s/a.png")],
)  # fmt: skip
def test_a_folder_of_masks_among_the_media_is_refused_with_the_way(tmp_path, media, inside):
    touch(tmp_path / "photos", media, inside)
    with pytest.raises(ValueError, match=r"is called like a folder of masks .*set data.mask_dir=.*else rename"):
        source(tmp_path).items()
    assert (
        source(tmp_path, mask_dir=str((tmp_path / "photos" / inside).parents[0])).items() if media == "a.png" else True
    )


def test_a_mask_with_the_whole_name_of_its_image_is_its_mask(tmp_path):
    touch(tmp_path / "photos", "a.png", "a.png.mask.png", "b.jpg", "b.jpg_mask.png")
    assert masks(tmp_path) == {"a": ("photos/a.png.mask.png", "sidecar"), "b": ("photos/b.jpg_mask.png", "sidecar")}


def test_caption_files_are_captions_and_text_files_come_first(tmp_path):
    touch(tmp_path / "photos", "a.png", "b.png", "c.png")
    for name, text in {"a.caption": "one", "b.txt": "two", "b.caption": "not this", "C.txt": "stranger"}.items():
        (tmp_path / "photos" / name).write_text(text)
    chosen = source(tmp_path)
    items = chosen.items()
    assert [item.caption for item in items] == ["one", "two", ""]
    left = chosen.left_over(items, with_layers=False)
    assert left.unused == ["C.txt"]
    assert lines(left.passed) == ["1 .caption (b.caption): NAME.txt is there too, and is the one that is read"]


def test_captions_and_masks_that_lose_to_others_are_named(tmp_path):
    touch(tmp_path, "photos/a.png", "photos/a.txt", "photos/a.mask.png", "masks/a.png", "photos/a.layer0.png")
    (tmp_path / "photos" / "c.jsonl").write_text('{"file": "a.png", "caption": "x"}')
    chosen = source(tmp_path, captions=str(tmp_path / "photos" / "c.jsonl"))
    left = chosen.left_over(chosen.items(), with_layers=False)
    assert sorted(row.name for row in left.passed) == ["a.layer0.png", "a.mask.png", "a.txt"]
    assert left.unused == []


@pytest.mark.parametrize("option", ["mask_dir", "control_dir"])
def test_a_folder_of_which_no_file_fits_is_an_error_with_three_names_of_each(tmp_path, option):
    draw = random.Random(2)
    names = sorted({f"x{draw.randint(0, 999)}" for _ in range(9)})
    touch(tmp_path, *(f"photos/{name}.png" for name in names), *(f"other/{name[1:]}.png" for name in names))
    with pytest.raises(ValueError, match=rf"data.{option}=.*other: none of its {len(names)} files") as error:
        source(tmp_path, **{option: str(tmp_path / "other")}).items()
    for folder, shown in (("photos", names), ("other", sorted(name[1:] for name in names))):
        assert str(tmp_path / folder) in str(error.value)
        assert f"({', '.join(f'{name}.png' for name in shown[:3])}, and {len(names) - 3} more)" in str(error.value)
