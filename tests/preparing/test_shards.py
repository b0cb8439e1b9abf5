"""Preparing shared out among processes, machines and workers, and what survives a kill."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mpp.cache.format import Cache, read_tensors
from mpp.files import remove_leftovers
from mpp.preparing.shards import Shard, Sharding
from tests.helpers import draw_photos, prepare

REPOSITORY = Path(__file__).parents[2]


def launch(pipeline, root, *overrides, **environment):
    """`python -m mpp.prepare` as a process of its own."""
    command = [
        sys.executable, "-m", "mpp.prepare", "model=tiny_wan", f"model.pretrained={pipeline}", "device=cpu",
        f"data.image_dir={root / 'photos'}", f"data.mask_dir={root / 'masks'}", f"data.cache_dir={root / 'cache'}",
        "data.resolution=64", "prepare.workers=0", *overrides,
    ]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_same(found, expected):
    """All that training reads is the same."""
    assert list(found.entries()) == list(expected.entries())
    for entry in expected.entries():
        assert torch.equal(found.latents(entry), expected.latents(entry))
        assert torch.equal(found.mask(entry), expected.mask(entry))
        texts = [read_tensors(cache.text_path(entry.text))["text"] for cache in (found, expected)]
        torch.testing.assert_close(*texts, rtol=1e-5, atol=1e-5)  # captions are encoded several at once


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """Six images prepared by one process."""
    root = tmp_path_factory.mktemp("whole")
    draw_photos(root / "photos", root / "masks", 6)
    prepare(pipeline, root)
    return root


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(ValueError, match=r"prepare.shard must be i/n with i from 0 to n - 1"):
        Sharding(shard=shard)


TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("shard", "environment", "own"),
    [
        ("1/3", TORCHRUN, Shard(1, 3, "prepare.shard")),
        (None, TORCHRUN | SLURM, Shard(2, 4, "torchrun")),
        (None, SLURM, Shard(5, 8, "SLURM")),
        (None, {}, Shard()),
        # A batch script that srun did not start is one process, whatever the allocation is for.
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Shard()),
    ],
)
def test_the_share_is_said_by_the_setting_then_torchrun_then_slurm(shard, environment, own, monkeypatch):
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Sharding(shard=shard).own_shard() == own


def test_shards_together_make_the_same_cache_in_whatever_order_they_finish(whole, pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 6)
    for shard in ("2/3", "0/3"):
        summary = prepare(pipeline, tmp_path, f"prepare.shard={shard}")
        with pytest.raises(ValueError, match="is not finished"):
            Cache(tmp_path / "cache").entries()
    assert summary.waiting == (1,)
    assert "the index is written when these shards have finished too: 1/3" in summary.lines()
    assert summary.lines()[0] == "shard 0/3 (from prepare.shard)"
    summary = prepare(pipeline, tmp_path, "prepare.shard=1/3")
    assert summary.waiting == ()
    assert (tmp_path / "cache" / "index.jsonl").read_bytes() == (whole / "cache" / "index.jsonl").read_bytes()
    assert_same(Cache(tmp_path / "cache"), Cache(whole / "cache"))


@pytest.mark.slow
def test_parts_of_another_set_are_not_mixed_in(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 4)
    prepare(pipeline, tmp_path, "prepare.shard=0/2")
    (tmp_path / "photos" / "p0.png").unlink()
    assert prepare(pipeline, tmp_path, "prepare.shard=1/2").waiting == (0,)
    assert prepare(pipeline, tmp_path, "prepare.shard=0/2").waiting == ()
    assert [entry.key for entry in Cache(tmp_path / "cache").entries()] == ["p1", "p2", "p3"]


@pytest.mark.slow
def test_more_shards_than_images_finish_too_and_skipped_ones_are_noted(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 2)
    (tmp_path / "photos" / "p1.png").write_text("no image")
    for shard in range(3):
        prepare(pipeline, tmp_path, f"prepare.shard={shard}/3", "data.on_error=skip")
    cache = Cache(tmp_path / "cache")
    assert [entry.key for entry in cache.entries()] == ["p0"]
    assert len(cache.notes().skipped) == 1
    assert "p1.png" in cache.notes().skipped[0]


@pytest.mark.slow
def test_two_at_once_on_one_cache_make_the_same_cache(whole, pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 6)
    both = [launch(pipeline, tmp_path) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert_same(Cache(tmp_path / "cache"), Cache(whole / "cache"))


# ---------------------------------------------------------------- workers and batches


@pytest.mark.slow
def test_workers_and_batches_make_the_same_cache(whole, pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 6)
    prepare(pipeline, tmp_path, "prepare.workers=2", "prepare.batch_size=2")
    found, expected = Cache(tmp_path / "cache"), Cache(whole / "cache")
    assert list(found.entries()) == list(expected.entries())
    for entry in expected.entries():
        # the VAE sums in another order where it encodes several at once
        torch.testing.assert_close(found.latents(entry), expected.latents(entry), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.mask(entry), expected.mask(entry))


@pytest.mark.slow
def test_what_breaks_in_a_worker_is_named_or_skipped(pipeline, tmp_path, monkeypatch):
    import mpp.preparing.encoding

    draw_photos(tmp_path / "photos", tmp_path / "masks", 4)
    read = mpp.preparing.encoding.read_item_frames

    def breaks(item, cut):
        if item.key == "p2":
            raise OSError(f"{item.media}: the network share is gone")
        return read(item, cut)

    monkeypatch.setattr(mpp.preparing.encoding, "read_item_frames", breaks)
    settings = ["prepare.workers=1", "prepare.batch_size=2"]
    with pytest.raises(ValueError, match=r"p2\.png: the network share is gone"):
        prepare(pipeline, tmp_path, *settings)
    summary = prepare(pipeline, tmp_path, *settings, "data.on_error=skip")
    assert len(summary.skipped) == 1
    assert sorted(entry.key for entry in Cache(tmp_path / "cache").entries()) == ["p0", "p1", "p3"]


@pytest.mark.parametrize("setting", ["prepare.workers=-1", "prepare.batch_size=0"])
def test_numbers_out_of_range_are_refused(pipeline, tmp_path, setting):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 1)
    with pytest.raises(ValueError, match=r"prepare.workers must be at least 0 and prepare.batch_size at least 1"):
        prepare(pipeline, tmp_path, setting)


# ---------------------------------------------------------------- kills and folders


@pytest.mark.slow
def test_a_cache_killed_at_any_moment_holds_no_half_sample_and_is_finished_later(whole, pipeline, tmp_path):
    """SIGKILL at random moments, over and over, until one run gets through."""
    draw_photos(tmp_path / "photos", tmp_path / "masks", 6)
    cache, chance, kills = Cache(tmp_path / "cache"), random.Random(0), 0
    while True:
        process = launch(pipeline, tmp_path)
        started = time.monotonic()
        patience = chance.uniform(0, 1.5) if kills < 3 else 1e9
        while process.poll() is None and time.monotonic() - started < 100:
            # the moments that matter come once the first file is there
            if (cache.folder / "cache.json").exists():
                time.sleep(patience if patience < 1e9 else 0.05)
                if patience < 1e9:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        process.communicate()
        for path in cache.folder.rglob("*.safetensors"):
            with safe_open(path, "pt") as handle:
                assert all(torch.isfinite(handle.get_tensor(name)).all() for name in handle.keys())  # noqa: SIM118
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 2
    assert_same(cache, Cache(whole / "cache"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*cache cannot be written \(.*\); choose another folder"):
        prepare(pipeline, tmp_path)
    assert (tmp_path / "cache").read_text() == "a file where the folder should be"


def test_a_read_only_cache_is_refused_for_preparing_and_serves_training(whole, pipeline, architecture, monkeypatch):
    import mpp.files
    from mpp.batching.datamodule import LatentDataModule

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mpp.files, "NamedTemporaryFile", refuses)  # root may write anywhere
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
        prepare(pipeline, whole)
    data = LatentDataModule(architecture=architecture, cache_dir=str(whole / "cache"))
    data.setup()
    assert len(list(data.train_dataloader())) == 6


def test_only_old_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "latents").mkdir()
    old, young, other = (tmp_path / "latents" / name for name in (".a.safetensors.x1.tmp", ".b.y2.tmp", "c.tmp"))
    for path in (old, young, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    remove_leftovers(tmp_path)
    assert [path.exists() for path in (old, young, other)] == [False, True, True]


@pytest.mark.slow
def test_a_sharded_change_of_captions_is_not_half_in_use(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", 2)
    prepare(pipeline, tmp_path)
    assert len(Cache(tmp_path / "cache").entries()) == 2
    trigger = "data.caption_variants.trigger=ohwx"
    prepare(pipeline, tmp_path, trigger, "prepare.shard=0/2")
    with pytest.raises(ValueError, match="is not finished"):
        Cache(tmp_path / "cache").entries()
    prepare(pipeline, tmp_path, trigger, "prepare.shard=1/2")
    assert all("ohwx" in entry.caption for entry in Cache(tmp_path / "cache").entries())
    prepare(pipeline, tmp_path, trigger, "prepare.shard=1/2")  # nothing to do: the index stays
    assert len(Cache(tmp_path / "cache").entries()) == 2
