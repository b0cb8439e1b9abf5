"""The index of a cache: rows parsed where they are looked at."""

import json
import pickle
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mpp.cache.index import Entry, Index, line_of, write_index

SHAPES = [(16, 1, 8, 8), (16, 1, 4, 8), (16, 3, 8, 8)]


def entry(number, **settings):
    defaults = {
        "key": f"set/p{number:03d}",
        "split": "val" if number % 5 == 4 else "train",
        "shape": SHAPES[number % 3],
        "text": f"{number:032x}",
        "caption": f"ein Käse {number}\n☃",
        "mask": None if number % 4 == 3 else "folder",
        "images": {"image": (16, 1, number % 2 + 1)} if number % 2 else {},
        "seen": ("abc",) * (number % 2),
        "repeats": 1 + number % 3,
        "variants": ("a, b", "b, a") if number % 7 == 0 else (),
    }
    return Entry(**(defaults | settings))


@pytest.fixture
def index(tmp_path):
    write_index(tmp_path / "index.jsonl", [entry(n) for n in range(40)])
    return Index.open(tmp_path / "index.jsonl")


def test_rows_come_back_as_they_were_written(index):
    expected = sorted((entry(n) for n in range(40)), key=lambda e: (e.split != "train", e.key))
    assert list(index) == expected
    assert [index[i] for i in (-1, 0, 7)] == [expected[i] for i in (-1, 0, 7)]
    assert list(index[3:30:4]) == expected[3:30:4]
    with pytest.raises(IndexError):
        index[40]


def test_columns_agree_with_the_rows(index):
    rows = list(index)
    assert index.masked.tolist() == [row.mask is not None for row in rows]
    assert index.repeats.tolist() == [row.repeats for row in rows]
    assert index.signatures() == [row.signature() for row in rows]
    assert index.signatures(1) == [row.signature(1) for row in rows]
    val = index.of_split("val")
    assert list(val) == [row for row in rows if row.split == "val"]
    chosen = val.where(~val.masked)[:3]
    assert list(chosen) == [row for row in rows if row.split == "val" and row.mask is None][:3]


def test_the_order_of_a_written_index_does_not_depend_on_who_prepared_what(tmp_path):
    rows = [
        entry(0, key="a@00000-005@flip", source="a", flip=True),
        entry(1, key="a@00000-005", source="a"),
        entry(2, key="a-b"),
        entry(3, key="p@flip", flip=True),
        entry(5, key="p"),
        entry(4, key="@val/a"),
    ]
    texts = set()
    for seed in range(20):
        shuffled = rows[:]
        random.Random(seed).shuffle(shuffled)
        write_index(tmp_path / "index.jsonl", shuffled)
        texts.add((tmp_path / "index.jsonl").read_bytes())
    assert len(texts) == 1
    keys = [row.key for row in Index.open(tmp_path / "index.jsonl")]
    assert keys == ["a@00000-005", "a@00000-005@flip", "a-b", "p", "p@flip", "@val/a"]


def test_an_index_travels_to_a_worker_process(index):
    again = pickle.loads(pickle.dumps(index.of_split("train")))
    assert list(again) == list(index.of_split("train"))


def test_an_empty_index_is_one_of_no_rows(tmp_path):
    (tmp_path / "index.jsonl").write_bytes(b"")
    empty = Index.open(tmp_path / "index.jsonl")
    assert len(empty) == 0
    assert list(empty.of_split("train")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [16, 1, 8]},
        {"shape": [16, 1, 8, 0]},
        {"shape": [16, 1, 8, 1.5]},
        {"shape": "16188"},
        {"split": "test"},
        {"repeats": 0},
        {"repeats": 2**40},
        {"mask": 3},
        {"flip": 1},
        {"key": None},
        {"caption": 7},
        {"pictures": {"image": [1, "x"]}},
        {"pictures": []},
        {"seen": [1]},
        {"variants": 4},
        {"more": 1},
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, change):
    rows = [json.loads(line_of(entry(n))) for n in range(3)]
    rows[1] |= change
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"index\.jsonl is damaged in line 2 .*run `python -m mpp.prepare` again"):
        Index.open(tmp_path / "index.jsonl")


def test_thousands_of_mutations_give_an_error_or_a_whole_index(tmp_path):
    """Bytes changed, cut out, doubled: either the file is named, or all rows parse to entries."""
    good = b"".join(line_of(entry(n)) for n in range(4))
    chance = random.Random(0)
    path = tmp_path / "index.jsonl"
    outcomes = Counter()
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            location = chance.randrange(len(data))
            kind = chance.randrange(4)
            if kind == 0:
                data[location] = chance.randrange(256)
            elif kind == 1:
                del data[location : location + chance.randint(1, 40)]
            elif kind == 2:
                data[location:location] = data[location : location + chance.randint(1, 40)]
            else:
                del data[location:]
            if not data:
                break
        path.write_bytes(data)
        try:
            found = list(Index.open(path))
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert all(len(row.shape) == 4 and isinstance(row.caption, str) for row in found)
            outcomes["read"] += 1
    assert outcomes["refused"] > 1000
    assert outcomes["read"] > 100  # a changed letter of a caption is another caption


def test_rows_are_not_kept_in_memory(tmp_path):
    """What is kept of a row is a few numbers, however long its caption."""
    write_index(tmp_path / "index.jsonl", [replace(entry(n), caption="x" * 10_000, images={}) for n in range(200)])
    index = Index.open(tmp_path / "index.jsonl")
    columns = [value for value in vars(index._columns).values() if isinstance(value, np.ndarray)]
    assert sum(column.nbytes for column in columns if not isinstance(column, np.memmap)) < 200 * 40


def test_another_process_maps_the_file_itself_and_is_not_sent_its_text(tmp_path):
    draws = random.Random(5)
    for number in range(8):
        path = tmp_path / f"{number}.jsonl"
        rows = [entry(n, caption="words " * draws.randint(100, 900)) for n in range(draws.randint(1, 60))]
        write_index(path, rows)
        chosen = Index.open(path)[draws.randrange(len(rows)) :: draws.randint(1, 3)]
        sent = pickle.dumps(chosen)
        assert len(sent) < 1500 + 100 * len(rows)
        expected = list(chosen)
        assert list(pickle.loads(sent)) == expected
        told = pickle.loads(sent)
        write_index(path, [replace(row, caption=f"{row.caption}!") for row in rows])
        with pytest.raises(ValueError, match="written anew since this run began: start it again"):
            told[0]
        assert list(chosen) == expected  # who has the old file goes on with it
