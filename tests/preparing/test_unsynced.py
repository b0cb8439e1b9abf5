"""Files that were written and not synced: what a power failure leaves of them is not trusted."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from mpp.cache.format import Cache
from mpp.preparing.preparation import Preparation
from mpp.preparing.shards import Shard
from mpp.preparing.unsynced import Unsynced
from tests.helpers import draw_photos, held_by, prepare


def truncated(content, draws):
    return content[: draws.randrange(len(content))]


def empty(content, draws):
    return b""


def zeros(content, draws):
    return bytes(len(content))


def tail_of_zeros(content, draws):
    for _ in range(100):
        count = draws.randint(1, len(content) - 1)
        if any(content[-count:]):
            return content[:-count] + bytes(count)
    return bytes(len(content))


def hole(content, draws):
    start = draws.randrange(len(content) // 2, len(content) - 1)
    stop = next(n for n in range(start + 1, len(content) + 1) if any(content[start:n]) or n == len(content))
    return content[:start] + bytes(stop - start) + content[stop:]


@pytest.fixture(scope="module")
def root(tmp_path_factory, pipeline):
    root = tmp_path_factory.mktemp("unsynced")
    draw_photos(root / "photos", root / "masks", count=4)
    prepare(pipeline, root, "data.flip=true")
    return root


@pytest.mark.slow
def test_what_a_power_failure_leaves_is_made_again(root, pipeline):
    draws, cache = random.Random(13), root / "cache"
    whole = held_by(cache)
    files = {p.relative_to(cache).as_posix(): p.read_bytes() for p in cache.rglob("*.*")}
    files = {name: content for name, content in files.items() if name.endswith((".safetensors", ".jpg"))}
    kinds = [truncated, empty, zeros, tail_of_zeros, hole]
    for turn in range(10):
        Unsynced(cache, Shard()).begin()
        if turn % 2:
            (cache / "index.jsonl").unlink()
        for name in draws.sample(sorted(files), draws.randint(1, 4)):
            if name.endswith(".jpg") and kinds[turn % 5] is hole:
                continue  # a preview is looked at, not learned from
            (cache / name).write_bytes(kinds[turn % 5](files[name], draws))
        prepare(pipeline, root, "data.flip=true")
        now = held_by(cache)
        assert now.keys() == whole.keys()
        assert [name for name in whole if now[name] != whole[name]] == []


def test_every_file_is_synced_before_an_index_names_it_also_those_of_a_run_that_was_interrupted(
    root, pipeline, tmp_path, monkeypatch
):
    draws, sync, rename = random.Random(14), os.fsync, os.replace
    synced: set[str] = set()
    at_index: list[set[str]] = []

    def watched_sync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def watched_rename(old, new):
        if Path(new).name == "index.jsonl":
            at_index.append(set(synced))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_rename)
    for turn in range(3):
        own = tmp_path / str(turn)
        for name in ("photos", "masks"):
            shutil.copytree(root / name, own / name)
        synced.clear()
        stage = draws.choice(["_encode_latents", "_write_masks", "_finish"])
        with monkeypatch.context() as patch:
            patch.setattr(Preparation, stage, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(pipeline, own)
        assert not any("/latents/" in name for name in synced)  # none waited for the disk
        assert list((own / "cache" / "unsynced").iterdir())
        prepare(pipeline, own)
        named = {str(p) for p in (own / "cache").rglob("*") if p.suffix in (".safetensors", ".jpg") or p.is_dir()}
        named = {name for name in named if "/samples" not in name and "/parts" not in name}
        assert named <= at_index[-1], named - at_index[-1]
        assert not (own / "cache" / "unsynced").exists()


def named(caption):
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


@pytest.mark.slow
def test_embeddings_of_captions_that_are_gone_are_removed_and_no_others(pipeline, tmp_path):
    draws = random.Random(15)
    for turn in range(3):
        root = tmp_path / str(turn)
        draw_photos(root / "photos", root / "masks", count=2)
        dropout, other = draws.random() < 0.5, draws.random() < 0.5
        settings = [
            f"data.empty_caption={str(dropout).lower()}",
            "data.preservation.caption=" + ("sea" if other else "null"),
        ]
        expected = set()
        for _ in range(3):
            captions = [f"box {draws.randrange(6)}" for _ in range(2)]
            for number, caption in enumerate(captions):
                (root / "photos" / f"p{number}.txt").write_text(caption)
            gone = expected - {*captions}
            expected = {*captions, *([""] if dropout else []), *(["sea"] if other else [])}
            summary = prepare(pipeline, root, *settings)
            assert summary.texts_removed == len(gone - expected)
            assert {p.stem for p in (root / "cache" / "text").iterdir()} == set(map(named, expected))
            cache = Cache(root / "cache")
            assert all(cache.has_text(entry.text) for entry in cache.entries())


@pytest.mark.slow
def test_a_shard_removes_nothing_that_another_has_made(pipeline, tmp_path):
    draws = random.Random(16)
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=6)
    captions: list[str] = []
    for _ in range(3):
        before, captions = captions, [f"box {draws.randrange(9)}" for _ in range(6)]
        for number, caption in enumerate(captions):
            (tmp_path / "photos" / f"p{number}.txt").write_text(caption)
        order = draws.sample(range(3), 3)
        for index in order:
            prepare(pipeline, tmp_path, f"prepare.shard={index}/3")
            there = {path.stem for path in (tmp_path / "cache" / "text").iterdir()}
            own = captions[index::3]
            assert set(map(named, own if index != order[-1] else captions)) <= there
            assert index == order[-1] or set(map(named, before)) <= there
        assert there == set(map(named, captions))
        assert not (tmp_path / "cache" / "unsynced").exists()
