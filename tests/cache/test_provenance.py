"""What cache files say of how they were made, and whether that is how they would be made now."""

import json
from dataclasses import replace
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpp.cache.fingerprints import Fingerprints
from mpp.cache.format import made_from, write_tensors
from mpp.cache.provenance import LatentsProvenance, MaskProvenance, PromptProvenance, Source, TextProvenance

FILE = Source({"source": "/p/a.png", "bytes": 9, "mtime_ns": 5, "inode": 7}, "aa")
FOLDER = Source({"source": "/p/a", "bytes": 9, "files": "ff"}, "bb")
# what caches of format 3 hold, letter for letter
STORED = [
    (
        LatentsProvenance((FILE, FOLDER), (96, 64, 80, 48, True), (0, 2, 2), "vv", True, {"controls.0": (16, 1, 4, 4)}),
        '{"alpha": true, "frames": [0, 2, 2], "geometry": [96, 64, 80, 48, true], "pictures": {"controls.0": '
        '[16, 1, 4, 4]}, "sources": [{"bytes": 9, "content": "aa", "inode": 7, "mtime_ns": 5, "source": "/p/a.png"}, '
        '{"bytes": 9, "content": "bb", "files": "ff", "source": "/p/a"}], "vae": "vv"}',
    ),
    (
        MaskProvenance((FILE,), (64, 64, 64, 64, False), None, "folder", (1, 8, 8), invert=True),
        '{"frames": null, "geometry": [64, 64, 64, 64, false], "invert": true, "kind": "folder", "shape": [1, 8, 8], '
        '"sources": [{"bytes": 9, "content": "aa", "inode": 7, "mtime_ns": 5, "source": "/p/a.png"}]}',
    ),
    (
        TextProvenance("a b\u00f6x", ("cc [64, 64, 64, 64, False]",)),
        '{"caption": "a b\\u00f6x", "seen": ["cc [64, 64, 64, 64, False]"]}',
    ),
    (
        PromptProvenance("a box", "wan", {"text_length": 64}, None, "tt"),
        '{"caption": "a box", "family": "wan", "settings": {"text_length": 64}, "text_encoder": "tt", "vae": null}',
    ),
]


@pytest.fixture
def two(tmp_path):
    """Two files of equal size and other contents."""
    for name, text in (("a", "1234"), ("b", "5678")):
        (tmp_path / name).write_text(text)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize(("record", "stored"), STORED, ids=lambda value: type(value).__name__)
def test_headers_are_those_of_earlier_caches_and_come_back_as_records(record, stored, tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(1)}, record.header())
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert header["__metadata__"] == {
        "format": "3",
        "made_from": stored,
        "crc32": f"{crc32(torch.ones(1).numpy()):08x}",
    }
    found = made_from(path, type(record))
    assert vars(found) == vars(record)


@pytest.mark.parametrize("stored", ["{}", "[]", "3", "not JSON", '{"sources": [3]}', '{"sources": null}'])
@pytest.mark.parametrize("kind", [type(record) for record, _ in STORED])
def test_a_header_that_says_something_else_is_none(kind, stored, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"format": "3", "made_from": stored})
    assert made_from(path, kind) is None
    assert load_file(path)


@pytest.mark.parametrize(
    ("change", "current"),
    [
        ({}, True),
        ({"vae": "other"}, False),
        ({"frames": (0,)}, False),
        ({"geometry": (64, 64, 64, 64, True)}, False),
        ({"alpha": True, "images": {"x": (1,)}}, True),  # seen on the way
    ],
)
def test_what_is_made_in_another_way_is_not_current(two, change, current):
    made = LatentsProvenance(Fingerprints().sources(two), (64, 64, 64, 64, False), None, "vv")
    assert Fingerprints().current(made, replace(made, sources=(), **change), two) is current
    assert not Fingerprints().current(None, made, two)


def test_sources_are_current_by_content_wherever_they_lie(two, tmp_path):
    first, second = two
    made = MaskProvenance(Fingerprints().sources(two), (8, 8, 8, 8, False), None, "folder", (1, 1, 1), invert=False)
    moved = first.rename(tmp_path / "moved")
    assert Fingerprints().current(made, made, (moved, second))
    assert not Fingerprints().current(made, made, (second, moved))
    assert not Fingerprints().current(made, made, (moved,))
    second.write_text("5679")
    assert not Fingerprints().current(made, made, (moved, second))
