"""Which checkpoint a run goes on from, and what it may not overwrite."""

import random
from pathlib import Path

import pytest
import torch

from mpp.training.runs import asked_checkpoint, begun, folder_of, newest, resumed


def save(path, step):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}}, path)


def test_a_folder_means_its_newest_checkpoint_and_a_file_itself():
    last = Path("runs/a/checkpoints/last.ckpt")
    assert asked_checkpoint(None, None, Path("o")) is None
    assert asked_checkpoint("runs/a", None, Path("o")) == last
    assert asked_checkpoint("runs/a/", None, Path("o")) == last
    assert asked_checkpoint("x/y.ckpt", None, Path("o")) == Path("x/y.ckpt")
    assert asked_checkpoint(None, "x/y.ckpt", Path("o")) == Path("x/y.ckpt")
    assert asked_checkpoint(None, "last", Path("runs/a")) == last
    assert folder_of(last) == Path("runs/a")
    assert folder_of(Path("elsewhere/y.ckpt")) is None
    with pytest.raises(ValueError, match="resume=a and ckpt_path=last say the same thing"):
        asked_checkpoint("a", "last", Path("o"))


def test_a_run_begins_only_where_there_is_none(tmp_path):
    begun(tmp_path)
    save(newest(tmp_path), 3)
    with pytest.raises(ValueError, match=f"holds a run already; go on with resume={tmp_path}, or"):
        begun(tmp_path)


@pytest.mark.parametrize("seed", range(25))
def test_what_a_run_has_done_since_is_not_overwritten(tmp_path, seed):
    draw = random.Random(seed)
    end = draw.randint(2, 90)
    save(newest(tmp_path / "a"), end)
    step = draw.randint(1, end)
    earlier = tmp_path / "a" / "checkpoints" / f"step-{step:06d}.ckpt"
    save(earlier, step)
    save(newest(tmp_path / "other"), draw.randint(0, 99))
    assert resumed(newest(tmp_path / "a"), tmp_path / "a")["global_step"] == end
    assert resumed(earlier, tmp_path / "fresh")["global_step"] == step
    if step < end:
        with pytest.raises(ValueError, match=f"of step {step}, and the run in .* has come to step {end}"):
            resumed(earlier, tmp_path / "a")
    else:
        assert resumed(earlier, tmp_path / "a")["global_step"] == end
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert resumed(newest(tmp_path / "linked"), tmp_path / "other" / ".." / "a")["global_step"] == end
    for checkpoint in (earlier, newest(tmp_path / "a")):
        with pytest.raises(ValueError, match="holds another run, not that of"):
            resumed(checkpoint, tmp_path / "other")


def test_what_is_not_there_is_said_with_the_way(tmp_path):
    with pytest.raises(
        ValueError, match=f"there is no checkpoint at {newest(tmp_path)}; resume= takes the output folder"
    ):
        resumed(newest(tmp_path), tmp_path)
