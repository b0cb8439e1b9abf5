import errno
import fcntl
import os
import random
import stat
from unicodedata import normalize

import pytest
import torch
from safetensors.torch import save_file

import mpp.files
from mpp.files import (
    check_writable,
    content_hash,
    is_out_of_space,
    names_told_apart,
    read_record,
    sync,
    weights_fingerprint,
    write_atomically,
    write_folder,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_no_space_is_said_in_one_message_also_behind_another_error(tmp_path):
    def full(temporary):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="no space left to write"):
        write_atomically(tmp_path / "x", full)


@pytest.mark.parametrize("seed", range(8))
def test_causes_that_go_round_in_a_ring_are_looked_at_once(seed):
    draw = random.Random(seed)
    errors = [ValueError(str(number)) for number in range(draw.randint(1, 6))]
    for error, cause in zip(errors, [*errors[1:], draw.choice(errors)], strict=True):
        setattr(error, draw.choice(["__cause__", "__context__"]), cause)
    assert not is_out_of_space(errors[0])
    draw.choice(errors).__context__ = OSError(errno.EDQUOT, "quota exceeded")
    assert is_out_of_space(errors[0]) == reaches_an_os_error(errors[0])


def reaches_an_os_error(error, depth=20):
    return isinstance(error, OSError) or bool(
        depth and (after := error.__cause__ or error.__context__) and reaches_an_os_error(after, depth - 1)
    )


def test_the_file_is_synced_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b))[1])
    write_atomically(tmp_path / "a" / "x", lambda temporary: temporary.write_text("new"))
    assert events[:2] == ["sync", "rename"]
    assert (tmp_path / "a" / "x").read_text() == "new"


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "x", lambda temporary: temporary.write_text("new"))
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
def test_whoever_may_read_other_files_may_read_those_of_safetensors(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "other").write_text("x")
        write_atomically(tmp_path / "a.safetensors", lambda path: save_file({"a": torch.ones(2)}, path))
        write_folder(tmp_path / "folder", lambda path: save_file({"a": torch.ones(2)}, path / "b.safetensors"))
    finally:
        os.umask(before)
    files = [tmp_path / name for name in ("other", "a.safetensors", "folder/b.safetensors")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


def test_any_name_that_the_disk_takes_can_be_written(tmp_path):
    draws = random.Random(6)
    for _ in range(40):
        letter = draws.choice(["x", "\u00e9", "\u4eba", "\U0001f600"])
        most = 255 // len(letter.encode())
        path = tmp_path / (letter * draws.choice([1, most // 2, most - 1, most]))
        write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert path.read_text() == "new"
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- Windows, by stand-ins for what it refuses


@pytest.fixture
def windows(monkeypatch):
    """What Windows refuses, on this machine: to open folders, to sync what was opened for reading."""
    opened, synced = os.open, os.fsync

    def no_folders(path, *arguments, **settings):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    def no_readers(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced(descriptor)

    monkeypatch.setattr(mpp.files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", no_folders)
    monkeypatch.setattr(os, "fsync", no_readers)


def test_what_is_written_is_synced_by_windows_own_way(windows, tmp_path):
    draws = random.Random(7)
    for number in range(12):
        content = {"n": [draws.random() for _ in range(draws.randint(0, 99))]}
        write_json(tmp_path / f"folder {number}" / "x.json", content)
        assert read_record(tmp_path / f"folder {number}" / "x.json") == content
        sync(tmp_path / f"folder {number}" / "x.json")
    check_writable(tmp_path / "folder 1", "output_dir")


def test_a_file_that_is_open_elsewhere_for_a_moment_is_replaced_after_it(windows, tmp_path, monkeypatch):
    draws, rename = random.Random(8), os.replace
    monkeypatch.setattr(mpp.files, "_WAIT", 0)
    for _ in range(10):
        refusals = draws.choice([0, 1, 5, 100])
        left = [refusals]

        def scanned(old, new, left=left):
            if left[0]:
                left[0] -= 1
                raise PermissionError(errno.EACCES, "Access is denied", str(new))
            rename(old, new)

        monkeypatch.setattr(os, "replace", scanned)
        path = tmp_path / "lora.safetensors"
        path.write_text("old")
        if refusals < 20:
            write_atomically(path, lambda temporary: temporary.write_text("new"))
            assert path.read_text() == "new"
        else:
            with pytest.raises(PermissionError, match=r"lora.safetensors cannot be replaced, another program has it"):
                write_atomically(path, lambda temporary: temporary.write_text("new"))
            assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["lora.safetensors"]


def test_names_are_told_apart_as_the_disk_does(tmp_path, monkeypatch):
    draws = random.Random(9)
    exact = names_told_apart(tmp_path)
    names = ["".join(draws.choice("aAbB\u00e9\u00c9") for _ in range(3)) for _ in range(40)]
    names += [normalize("NFD", name) for name in names]
    assert len(set(map(exact, names))) == len(set(names))  # this disk takes any two for two
    there = type(tmp_path).exists
    monkeypatch.setattr(
        type(tmp_path), "exists", lambda path: there(path) or any(_alike(path, p) for p in tmp_path.iterdir())
    )
    folded = names_told_apart(tmp_path)
    for name in names:
        assert [folded(name) == folded(other) for other in names] == [
            normalize("NFC", name).lower() == normalize("NFC", other).lower() for other in names
        ]


def _alike(one, other):
    return normalize("NFC", one.name).lower() == normalize("NFC", other.name).lower()


def test_fingerprints_follow_content(tmp_path):
    for name, data in (("a", b"x" * 900_000), ("b", b"x" * 450_000 + b"y" + b"x" * 449_999)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    assert content_hash(tmp_path / "a" / "model.safetensors") != content_hash(tmp_path / "b" / "model.safetensors")
    first = weights_fingerprint(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"layers": 3, "_name_or_path": "here", "torch_version": "1"}')
    second = weights_fingerprint(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"layers": 3, "_name_or_path": "there", "torch_version": "2"}')
    assert weights_fingerprint(tmp_path / "a") == second != first
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no .safetensors weights"):
        weights_fingerprint(tmp_path / "none")
