"""Files on this machine and on object storage."""

import functools
import hashlib
import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from upath import UPath

from mpp.files import content_hash
from mpp.media.images import image_size, read_image, read_mask
from mpp.media.paths import as_path, file_fingerprint, join, kinds, list_files, read_all
from mpp.sources.source import FolderSource

FILES = ["a.png", "s/b.png", "s/t/c.png", ".d.png", ".h/e.png", "s/.f.png"]


@pytest.fixture
def bucket():
    """An empty folder on a file system in memory, which stands for object storage."""
    memory = fsspec.filesystem("memory")
    kept, folders = dict(memory.store), list(memory.pseudo_dirs)
    memory.store.clear()
    yield UPath("memory://bucket/set")
    memory.store.clear()
    memory.store.update(kept)
    memory.pseudo_dirs[:] = folders


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def draw(path, value, size=(16, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        Image.new(mode, size, value).save(handle, "PNG")


@pytest.fixture(params=["here", "remote"])
def base(request, tmp_path):
    return tmp_path if request.param == "here" else request.getfixturevalue("bucket")


# ---------------------------------------------------------------- paths


def test_settings_are_paths_of_this_machine_or_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/x") == tmp_path / "x"
    assert as_path("file:///x/y") == Path("/x/y")
    assert type(as_path("x")) is type(Path("x"))
    remote = as_path("memory://bucket/x.png")
    assert not isinstance(remote, Path)
    assert as_path(str(remote)) == remote


@pytest.mark.parametrize(
    ("folder", "text", "expected"),
    [
        ("/data/set", "x/../y.png", "/data/set/y.png"),
        ("/data/set", "../y.png", "/data/y.png"),
        ("/data/set", "/y.png", "/y.png"),
        ("memory://bucket/set", "x/./y.png", "memory://bucket/set/x/y.png"),
        ("memory://bucket/set", "../y.png", "memory://bucket/y.png"),
        ("/data/set", "memory://bucket/y.png", "memory://bucket/y.png"),
        ("memory://bucket/set", "file:///y.png", "/y.png"),
    ],
)
def test_paths_in_a_file_start_at_its_folder(folder, text, expected):
    assert str(join(as_path(folder), text)) == expected


def test_a_file_system_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # also where it is installed
    for url in ("s3://b/photos", "simplecache::s3://b/photos"):
        message = f"{url} needs a package that is not installed \\(.*s3fs.*\\); pip install s3fs"
        with pytest.raises(ValueError, match=message):
            FolderSource(image_dir=url, cache_dir="cache").items()
    with pytest.raises(ValueError, match="nosuch://b/photos cannot be reached"):
        FolderSource(image_dir="nosuch://b/photos", cache_dir="cache").items()


# ---------------------------------------------------------------- listing


def test_a_listing_has_all_files_but_hidden_ones(base):
    for name in FILES:
        write(base / name, "x")
    assert [listed.name for listed in list_files(base)] == ["a.png", "s/b.png", "s/t/c.png"]
    assert list_files(base) == sorted(list_files(base))


def test_a_listing_leaves_out_folders_and_what_only_begins_like_them(base):
    for name in ("a/x.png", "ab/x.png", "c/a/x.png"):
        write(base / name, "x")
    without = {os.path.realpath(base / "a") if isinstance(base, Path) else str(base / "a")}
    assert [listed.name for listed in list_files(base, without)] == ["ab/x.png", "c/a/x.png"]


def test_a_listing_sees_what_was_added_since_the_last_one(bucket, monkeypatch):
    kept, good = {}, type(bucket.fs).find  # clients of object storage keep listings

    def find(self, path, **options):
        return kept.setdefault(path, good(self, path, **options))

    monkeypatch.setattr(type(bucket.fs), "find", find)
    monkeypatch.setattr(type(bucket.fs), "invalidate_cache", lambda self, path=None: kept.clear())
    write(bucket / "a.png", "x")
    list_files(bucket)
    write(bucket / "b.png", "x")
    assert [listed.name for listed in list_files(bucket)] == ["a.png", "b.png"]


def test_a_remote_folder_is_listed_once_however_many_files_it_has(bucket, monkeypatch):
    for number in range(30):
        write(bucket / "photos" / f"{number}.png", "x")
        write(bucket / "photos" / f"{number}.txt", "a caption")
        write(bucket / "masks" / f"{number}.png", "x")
    calls = []
    for name in ("find", "ls", "info", "exists", "isdir", "isfile", "cat", "open"):
        good = getattr(type(bucket.fs), name)
        monkeypatch.setattr(type(bucket.fs), name, lambda *a, _n=name, _f=good, **k: calls.append(_n) or _f(*a, **k))
    FolderSource(image_dir=str(bucket / "photos"), cache_dir="cache", mask_dir=str(bucket / "masks")).items()
    assert calls.count("find") == 2
    assert calls.count("cat") == 1
    assert len([name for name in calls if name in ("info", "exists", "isdir", "isfile")]) < 10


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "photos" / "secret").mkdir(parents=True)
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    scan = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"photos cannot be read \(Permission denied"):
        FolderSource(image_dir=str(tmp_path / "photos"), cache_dir="cache").items()


@pytest.mark.parametrize("count", [3, 40])
def test_files_and_folders_are_told_apart_one_by_one_or_in_one_listing(base, count, monkeypatch):
    names = [f"{number}.png" for number in range(count)]
    for name in (*names, "folder.x/a.png"):
        write(base / name, "x")
    wanted = [base / name for name in (*names, "folder.x", "missing.png", "nowhere/x.png")]
    calls, memory = [], type(fsspec.filesystem("memory"))
    good = memory.info
    monkeypatch.setattr(memory, "info", lambda *a, **k: calls.append(a) or good(*a, **k))
    found = kinds(wanted)
    assert len(calls) < 20
    assert found == dict.fromkeys([base / name for name in names], "file") | {base / "folder.x": "folder"}


def test_many_small_files_are_read_in_order(base):
    for number in range(1100):  # more than are fetched at once
        write(base / f"{number}.txt", str(number))
    paths = [base / f"{number}.txt" for number in range(1099, -1, -1)]
    assert [int(content) for content in read_all(paths)] == list(range(1099, -1, -1))
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read \(it is not there\)"):
        list(read_all([base / "1.txt", base / "gone.txt"]))


# ---------------------------------------------------------------- fingerprints


def test_a_fingerprint_changes_with_the_file_and_not_by_itself(base):
    write(base / "a.png", "one")
    before = file_fingerprint(base / "a.png")
    assert file_fingerprint(base / "a.png") == before == json.loads(json.dumps(before))
    assert (before["source"], before["bytes"]) == (str(base / "a.png"), 3)
    time.sleep(0.01)
    write(base / "a.png", "two")
    after = file_fingerprint(base / "a.png")
    assert after != before
    assert as_path(after["source"]) == base / "a.png"


def test_a_fingerprint_on_this_machine_is_what_the_system_says(tmp_path):
    write(tmp_path / "a.png", "one")
    status = os.stat(tmp_path / "a.png")
    assert file_fingerprint(tmp_path / "a.png") == {
        "source": str(tmp_path / "a.png"),
        "bytes": 3,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_the_fingerprint_and_hash_of_a_folder_change_with_any_file_in_it(base, change):
    for name in ("0.png", "1.png", ".hidden"):
        write(base / "frames" / name, f"old {name}")
    before, content = file_fingerprint(base / "frames"), content_hash(base / "frames")
    assert (file_fingerprint(base / "frames"), content_hash(base / "frames")) == (before, content)
    time.sleep(0.01)
    if change == "edit":
        write(base / "frames" / "1.png", "new 1.png")  # as long as before
    elif change == "add":
        write(base / "frames" / "2.png", "")
    else:
        if change == "rename":
            write(base / "frames" / "2.png", "old 1.png")
        (base / "frames" / "1.png").unlink()
    assert file_fingerprint(base / "frames") != before
    assert content_hash(base / "frames") != content


def test_frames_that_trade_names_change_the_fingerprint_of_their_folder(tmp_path):
    for name in ("0.png", "1.png"):
        write(tmp_path / name, name)
        os.utime(tmp_path / name, (1, 1))
    before = file_fingerprint(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "x")
    (tmp_path / "1.png").rename(tmp_path / "0.png")
    (tmp_path / "x").rename(tmp_path / "1.png")
    after = file_fingerprint(tmp_path)
    assert (after["bytes"], after["mtime_ns"]) == (before["bytes"], before["mtime_ns"])
    assert after != before


def test_contents_are_hashed_alike_everywhere(base):
    write(base / "a.png", b"\0\1\2" * 100_000)
    assert content_hash(base / "a.png") == hashlib.sha256(b"\0\1\2" * 100_000).hexdigest()


def test_what_a_storage_says_of_a_file_is_kept_as_json(bucket, monkeypatch):
    """Answers as S3 (s3fs) and Google (gcsfs) give them."""
    from datetime import UTC, datetime

    path = bucket / "a.png"
    write(path, "one")
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    answers = {
        "s3": ({"size": 3, "ETag": '"abc"', "LastModified": moment, "type": "file"}, 1767323045678901000, '"abc"'),
        "gs": (
            {"size": 3, "etag": "x=", "updated": "2026-01-02T03:04:05Z", "type": "file"},
            "2026-01-02T03:04:05Z",
            "x=",
        ),
        "http": ({"size": 3, "type": "file"}, None, hashlib.sha256(b"one").hexdigest()),
    }
    for info, changed, tag in answers.values():
        monkeypatch.setattr(type(path.fs), "info", lambda *_, _info=info: dict(_info))
        assert file_fingerprint(path) == {"source": str(path), "bytes": 3, "mtime_ns": changed, "inode": tag}


def test_a_file_that_is_gone_is_named(base):
    with pytest.raises(ValueError, match=r"gone\.png cannot be read \(it is not there\)"):
        file_fingerprint(base / "gone.png")
    for read in (image_size, read_image, read_mask):
        with pytest.raises(ValueError, match=r"gone\.png cannot be read \(it is not there\)"):
            read(base / "gone.png")


# ---------------------------------------------------------------- whole sources


def fill(base):
    draw(base / "photos" / "a.png", (10, 20, 30))
    draw(base / "photos" / "s" / "b.png", (40, 50, 60, 0), mode="RGBA")
    draw(base / "masks" / "a.png", 255, mode="L")
    draw(base / "photos" / "s" / "b.mask.png", 128, mode="L")
    write(base / "photos" / "c.mp4", "x")
    write(base / "masks" / "c" / "0.png", "x")
    write(base / "photos" / "a.txt", "red, box")
    rows = [
        {"media": "photos/a.png", "mask": "masks/a.png", "caption": "red, box"},
        {"media": "photos/s/b.png", "mask": "photos/s/b.mask.png"},
        {"media": "photos/c.mp4", "mask": "masks/c"},
    ]
    write(base / "m.jsonl", "\n".join(map(json.dumps, rows)))
    write(base / "c.csv", 'file,caption\na.png,"red, box"\n')
    write(base / "sets.yaml", "one: {image_dir: photos, mask_dir: masks}\n")


@pytest.mark.parametrize("form", ["folder", "captions", "manifest", "datasets"])
def test_a_source_is_the_same_on_object_storage(tmp_path, bucket, form):
    found = []
    for base in (tmp_path, bucket):
        fill(base)
        settings = {
            "folder": {"image_dir": f"{base}/photos", "mask_dir": f"{base}/masks"},
            "captions": {"image_dir": f"{base}/photos", "mask_dir": f"{base}/masks", "captions": f"{base}/c.csv"},
            "manifest": {"image_dir": None, "manifest": f"{base}/m.jsonl"},
            "datasets": {"image_dir": None, "datasets": f"{base}/sets.yaml"},
        }[form]
        chosen = FolderSource(**settings, cache_dir="cache")
        chosen = FolderSource.from_record(chosen.sources_record())
        names = [(str(item.media).removeprefix(str(base)), str(item.mask).removeprefix(str(base)), item.caption,
                  item.captioned, item.video) for item in chosen.items()]  # fmt: skip
        images = [item for item in chosen.items() if not item.video]
        pixels = [(read_image(item.media).rgb.getpixel((0, 0)), image_size(item.media)) for item in images]
        found.append(
            (
                names,
                pixels,
                [float(read_mask(item.mask).max()) for item in images],
                chosen.left_over(chosen.items(), with_layers=False).unused,
            )
        )
    assert found[0] == found[1]
    assert found[0][1] == [((10, 20, 30), (16, 12)), ((40, 50, 60), (16, 12))]
    assert len(found[0][0]) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec leaves its HTTP session to the end of the process
def test_a_manifest_over_http(tmp_path):
    fill(tmp_path)
    (tmp_path / "photos" / "c.mp4").unlink()
    (tmp_path / "m.jsonl").write_text("\n".join((tmp_path / "m.jsonl").read_text().split("\n")[:2]))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = FolderSource(cache_dir="cache", manifest=f"http://127.0.0.1:{server.server_port}/m.jsonl").items()
        assert [item.key for item in found] == ["photos/a", "photos/s/b"]
        for item, name in zip(found, ("photos/a.png", "photos/s/b.png"), strict=True):
            here = read_image(tmp_path / name)
            np.testing.assert_array_equal(np.asarray(read_image(item.media).rgb), np.asarray(here.rgb))
            assert file_fingerprint(item.media)["inode"] == content_hash(
                tmp_path / name
            )  # the server says neither tag nor time
        assert read_mask(found[1].mask).max() == pytest.approx(128 / 255)
    finally:
        server.shutdown()
        server.server_close()
