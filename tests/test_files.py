import os
import stat

import pytest

from mpp.files import content_hash, weights_fingerprint, write_atomically


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
