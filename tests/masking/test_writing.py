from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mpp.masking.pixels import Mask
from mpp.masking.video_frames import Times
from mpp.masking.writing import write_frames, write_video
from tests.masking.files import levels, random_mask

MADE = '{"tool": "Test"}'


def masks(count):
    return (Mask((random_mask(number) / 255).astype(np.float32)) for number in range(count))


@pytest.mark.parametrize(("count", "message"), [(2, "2 frames instead of 3"), (4, "more frames than the 3 expected")])
@pytest.mark.parametrize("form", ["video", "frames"])
def test_other_numbers_of_frames_than_announced_leave_nothing(tmp_path, form, count, message):
    with pytest.raises(ValueError, match=message):
        if form == "video":
            write_video(tmp_path / "v.mkv", masks(count), Times((0, 40, 80), Fraction(1, 1000), Fraction(25)), MADE)
        else:
            write_frames(tmp_path / "v", masks(count), ("1.png", "2.png", "3.png"), MADE)
    assert not list(tmp_path.iterdir())


def test_frames_of_several_sizes_are_no_video(tmp_path):
    sizes = (Mask(np.zeros((9, 13 + number), np.float32)) for number in range(3))
    with pytest.raises(ValueError, match="frames of a video have one size, got 13x9 and then 14x9; use video_format"):
        write_video(tmp_path / "v.mkv", sizes, Times((0, 40, 80), Fraction(1, 1000), Fraction(25)), MADE)
    assert not list(tmp_path.iterdir())


def test_an_old_folder_of_frames_comes_back_when_the_new_one_cannot_take_its_path(tmp_path, monkeypatch):
    names = ("1.png", "2.png")
    write_frames(tmp_path / "v", masks(2), names, MADE)
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(28, "no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        write_frames(tmp_path / "v", (Mask(np.zeros((9, 13), np.float32)) for _ in range(2)), names, MADE)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
    for number, name in enumerate(names):
        np.testing.assert_array_equal(levels(tmp_path / "v" / name), random_mask(number))
