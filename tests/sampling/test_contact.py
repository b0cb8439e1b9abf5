"""The contact sheet of a run: base and steps of each prompt on one image, of bounded size."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.media.lettering import font_size, line_height
from mpp.models.contract import Generation
from mpp.models.frame_axis import Moments
from mpp.sampling.contact import step_folder, write_contact
from mpp.sampling.generation import Pair, generation_name, save
from mpp.sampling.prompts import ReadyPrompt

ABSENT = (225, 226, 221)


def ready(prompt, width=64, height=48):
    return ReadyPrompt(prompt, Generation(width, height, 1, 2, 1.0, 3), None, None)


def plain(value, frames=1, size=(48, 64)):
    """Frames of one grey each, a little brighter from frame to frame."""
    values = value / 255 + torch.arange(frames) * 10 / 255
    return values.view(-1, 1, 1, 1).expand(frames, 3, *size).contiguous()


def generated(folder, prompts, steps, value=lambda number, step: 20 * number + step, frames=1):
    for step in steps:
        for number, one in enumerate(prompts):
            pair = Pair(generation_name(number, one.prompt), one.prompt, plain(200, frames), plain(value(number, step), frames), Moments())  # fmt: skip  # noqa: E501
            save(pair, step_folder(folder, step))


def cells(path, rows, columns, size=(256, 192)):
    """The grey in the middle of each image of a sheet."""
    sheet, font = np.asarray(Image.open(path)), font_size(max(size))
    line, gap = line_height(font), font // 2
    across = [font + n * (size[0] + gap) + size[0] // 2 for n in range(columns)]
    down = [font + n * (2 * line + size[1] + font) + 2 * line + size[1] // 2 for n in range(rows)]
    return sheet[np.ix_(down, across)]


def test_rows_are_prompts_and_columns_the_base_and_the_steps(tmp_path):
    prompts = [ready("a red box"), ready("a cat")]
    generated(tmp_path, prompts, [0, 50, 100])
    assert write_contact(tmp_path, prompts) == tmp_path / "contact.png"
    got = cells(tmp_path / "contact.png", 2, 4)[..., 0]
    assert got.tolist() == [[200, 0, 50, 100], [200, 20, 70, 120]]


@pytest.mark.parametrize("count", [13, *(pytest.param(count, marks=pytest.mark.slow) for count in (12, 30, 101))])
def test_of_many_steps_twelve_are_shown_the_first_and_the_newest_among_them(tmp_path, count):
    prompts = [ready("a cat")]
    generated(tmp_path, prompts, range(count), lambda _, step: 2 * step)
    write_contact(tmp_path, prompts)
    got = cells(tmp_path / "contact.png", 1, 13)[0, :, 0].tolist()[1:]
    assert (got[0], got[-1]) == (0, 2 * (count - 1))
    distances = np.diff(got) // 2
    assert distances.max() - distances.min() <= 1
    assert np.asarray(Image.open(tmp_path / "contact.png")).shape[1] < 14 * 256


def test_what_is_not_there_is_empty_and_older_folders_without_single_files_are_passed_over(tmp_path):
    prompts = [ready("a red box"), ready("a cat")]
    assert write_contact(tmp_path, prompts) is None
    generated(tmp_path, prompts, [10, 20])
    (tmp_path / "step-000020" / "1_a_cat_lora.png").unlink()
    for part in ("_base", "_lora"):
        (tmp_path / "step-000010" / f"0_a_red_box{part}.png").unlink()
        (tmp_path / "step-000010" / f"1_a_cat{part}.png").unlink()
    (tmp_path / "step-of-mine").mkdir()
    write_contact(tmp_path, prompts)
    got = cells(tmp_path / "contact.png", 2, 2)
    assert got[:, 0, 0].tolist() == [200, 200]
    assert got[0, 1].tolist() == [20, 20, 20]
    assert got[1, 1].tolist() == list(ABSENT)


def test_clips_show_their_middle_frame(tmp_path):
    prompts = [ready("a cat")]
    generated(tmp_path, prompts, [0, 40], frames=5)
    write_contact(tmp_path, prompts)
    assert cells(tmp_path / "contact.png", 1, 3)[0, :, 0].tolist() == [220, 20, 60]


@pytest.mark.slow
def test_many_prompts_make_no_huge_sheet(tmp_path):
    prompts = [ready(f"prompt {number}", 1024, 1024) for number in range(30)]
    generated(tmp_path, prompts, [0, 5])
    write_contact(tmp_path, prompts)
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.width * sheet.height < 10e6


def test_an_image_that_cannot_be_read_leaves_the_older_sheet(tmp_path):
    prompts = [ready("a cat")]
    generated(tmp_path, prompts, [0])
    write_contact(tmp_path, prompts)
    before = (tmp_path / "contact.png").read_bytes()
    generated(tmp_path, prompts, [5])
    (tmp_path / "step-000005" / "0_a_cat_lora.png").write_bytes(b"no image")
    with pytest.raises(OSError, match="cannot identify"):
        write_contact(tmp_path, prompts)
    assert (tmp_path / "contact.png").read_bytes() == before
    assert not list(tmp_path.glob(".contact*"))
