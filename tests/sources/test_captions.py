"""Captions beside the media and in tables; trigger word and shuffled tags."""

import itertools
import json

import pytest

from mpp.sources.captions import CaptionVariants
from mpp.sources.source import FolderSource


@pytest.fixture
def root(tmp_path):
    for name in ("photos/a.png", "photos/s/b.png", "photos/s/c.mp4", "held/v.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root / name)


def source(root, **settings):
    return FolderSource(image_dir=str(root / "photos"), cache_dir="cache", val_image_dir=str(root / "held"), **settings)


def captions(root, **settings):
    return {item.key: item.caption if item.captioned else None for item in source(root, **settings).items()}


def table(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


# ---------------------------------------------------------------- text files


def test_captions_lie_beside_their_media_on_one_line(root):
    write(root, "photos/a.txt", "  red box\r\n on   grass \n")
    write(root, "photos/s/b.TXT", b"\xef\xbb\xbfk\xc3\xa4se")  # with a byte order mark
    write(root, "held/v.txt", "")
    assert captions(root) == {"a": "red box on grass", "s/b": "käse", "s/c": None, "@val/v": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("käse".encode("latin-1"), r"a\.txt is not UTF-8 \(invalid .* at byte 1: 0xe4\); save it as UTF-8"),
        ("red".encode("utf-16"), r"a\.txt is not UTF-8 .*byte 0: 0xff; it looks like UTF-16\)"),
        ("red".encode("utf-16-le"), r"a\.txt holds a zero byte \(byte 1\), as UTF-16 does"),
    ],
)  # fmt: skip
def test_captions_in_another_encoding_are_refused_with_file_byte_and_remedy(root, content, message):
    write(root, "photos/a.txt", content)
    with pytest.raises(ValueError, match=message):
        source(root).items()


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", table({"file": "a.png", "caption": "one"}, {"file": "s/b", "caption": "two, 2"})),
        ("c.jsonl", table({"media": "./a", "text": "one"}, {"media": "s/b.png", "text": "two, 2", "width": 3})),
        ("photos/metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "s/b.png", "text": "two, 2"}'),
        ("photos/s/c.jsonl", table({"file": "../a.png", "caption": "one"}, {"file": "b.png", "caption": "two, 2"})),
        ("c.csv", 'file_name,caption\r\na.png,one\r\n\r\ns/b,"two, 2"\r\n'),
        ("c.csv", '\ufeffid,file,text\n1,a,one\n2,s/b.png,"two,\n2"\n'),
        ("c.tsv", "media\ttext\na\tone\ns/b\ttwo, 2\n"),
    ],
)  # fmt: skip
def test_a_table_names_media_in_several_ways(root, name, content):
    write(root, "photos/a.txt", "not read")
    chosen = source(root, captions=write(root, name, content))
    assert {item.key: item.caption if item.captioned else None for item in chosen.items()} == {
        "a": "one", "s/b": "two, 2", "s/c": None, "@val/v": None}  # fmt: skip
    assert chosen.left_over(chosen.items(), with_layers=False).unused == []


def test_absolute_paths_and_validation_media_may_be_named(root):
    rows = table({"file": str(root / "photos" / "a.png"), "caption": "one"}, {"file": "v", "caption": "two"})
    assert captions(root, captions=write(root, "c.jsonl", rows)) == {
        "a": "one",
        "s/b": None,
        "s/c": None,
        "@val/v": "two",
    }


def test_rows_without_media_are_named_with_their_line(root):
    rows = table({"file": "a.png", "caption": "one"}, {"file": "s/typo.png", "caption": "two"})
    chosen = source(root, captions=write(root, "c.jsonl", rows))
    assert chosen.left_over(chosen.items(), with_layers=False).unused == ["c.jsonl:2 (s/typo.png)"]


def test_a_name_that_fits_two_media_is_refused_unless_the_path_from_the_table_says_which(root):
    (root / "held" / "a.png").write_bytes(b"x")
    row = table({"file": "a.png", "caption": "one"})
    with pytest.raises(
        ValueError, match=r"c\.jsonl:1: 'a\.png' may be .*photos/a\.png or .*held/a\.png; write its path"
    ):
        captions(root, captions=write(root, "c.jsonl", row))
    assert captions(root, captions=write(root, "held/c.jsonl", row))["@val/a"] == "one"
    row = table({"file": "photos/a.png", "caption": "one"})
    assert captions(root, captions=write(root, "c.jsonl", row))["a"] == "one"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", table({"file": "a", "caption": "1"}, {"file": "a.png", "caption": "2"}),
         r"c\.jsonl:2 and line 1 are both about .*a\.png"),
        ("c.jsonl", table({"file": "z.png", "caption": "1"}),
         r"none of its 1 rows names one of the 4 media, such as .*; line 1 names 'z\.png'"),
        ("c.jsonl", '{"file": "a", "caption": "1"}\n{"file": \n', r"c\.jsonl:2 is not JSON"),
        ("c.jsonl", "\n[1]\n", r"c\.jsonl:2 is \[1\], not an object"),
        ("c.jsonl", '{"file": "a", "file": "b", "caption": "1"}', r"c\.jsonl:1 .*names 'file' twice"),
        ("c.jsonl", '{"file": "a", "caption": "\\ud800"}', r"c\.jsonl:1 is not JSON in UTF-8"),
        ("c.jsonl", "[" * 100_000, r"c\.jsonl:1 is not JSON in UTF-8 \(too deeply nested"),
        ("c.jsonl", table({"file": "a", "caption": 3}), r"c\.jsonl:1: caption should be text, got 3"),
        ("c.jsonl", table({"file": "a"}), r"c\.jsonl:1 needs one field of caption, text and has none of them \(file\)"),
        ("c.jsonl", table({"file": "a", "media": "a", "text": "1"}), r"c\.jsonl:1 needs .* has both file and media"),
        ("c.jsonl", table({"file": " ", "caption": "1"}), r"c\.jsonl:1 names no media"),
        ("c.jsonl", "\n\n", r"data.captions=.*c\.jsonl has no rows"),
        ("c.jsonl", '{"file": "a", "caption": "k\xe4se"}'.encode("latin-1"), r"c\.jsonl is not UTF-8 .*0xe4"),
        ("c.csv", "file;caption\na;1\n", r"c\.csv:2 needs one field of file, .* and has none of them \(file;"),
        ("c.csv", "file,caption\na,1,2\n", r"c\.csv:2 has 3 cells, its header 2 \(file, caption\); put text"),
        ("c.csv", 'file,caption\na,"1\n', r"c\.csv:2 is not CSV"),
        ("c.csv", "file,file\na,1\n", r"c\.csv:1 names the column 'file' twice"),
        ("c.txt", "a: 1", r"data.captions=.*c\.txt must be a .jsonl, .csv or .tsv file"),
    ],
)  # fmt: skip
def test_damaged_tables_are_refused_with_file_and_line(root, name, content, message):
    with pytest.raises(ValueError, match=message):
        captions(root, captions=write(root, name, content))


def test_a_table_that_is_not_there_is_named(root):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read \(it is not there\)"):
        captions(root, captions=str(root / "none.jsonl"))


def test_line_breaks_of_unicode_do_not_split_a_row(root):
    row = '{"file": "a", "caption": "one\u2028two\x85three"}\n'
    assert captions(root, captions=write(root, "c.jsonl", row))["a"] == "one two three"


# ---------------------------------------------------------------- trigger word and tags


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "ohwx, a dog"),
        ("ohwx, a dog", "ohwx, a dog"),
        ("a photo of ohwx.", "a photo of ohwx."),
        ("the ohwxes", "ohwx, the ohwxes"),
        ("Ohwx", "ohwx, Ohwx"),
        ("", "ohwx"),
    ],
)
def test_the_trigger_stands_in_front_once(caption, expected):
    assert CaptionVariants("ohwx").caption(caption) == expected
    assert CaptionVariants("ohwx").caption(expected) == expected
    assert CaptionVariants().caption(caption) == caption


def test_a_trigger_of_several_words_and_signs_is_taken_literally():
    assert CaptionVariants(" s.k  [x] ", separator=";").caption("a sxk x") == "s.k [x]; a sxk x"


@pytest.mark.parametrize("caption", ["t, a, b, c", "t,a ,b,, c,", "t, a, a, b", "t, a", "t", "", "a, a, a, a, a, a, b"])
@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_variants_are_distinct_other_orders_of_the_free_tags(caption, keep):
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    orders = {tuple(order) for order in itertools.permutations(tags[keep:])} - {tuple(tags[keep:])}
    everything = {", ".join([*tags[:keep], *order]) for order in orders}
    most = CaptionVariants(shuffles=100, keep_tags=keep).variants(caption, "key")
    assert len(most) == min(100, len(everything)) == len(set(most))
    assert set(most) <= everything
    few = CaptionVariants(shuffles=2, keep_tags=keep).variants(caption, "key")
    assert few == most[:2]  # more of them leave prepared ones in use
    assert CaptionVariants(keep_tags=keep).variants(caption, "key") == []


def test_variants_depend_on_the_key_and_on_nothing_else():
    make, caption = CaptionVariants(shuffles=3), "a, b, c, d, e, f, g"
    assert make.variants(caption, "one") == make.variants(caption, "one")
    assert make.variants(caption, "one") != make.variants(caption, "two")


def test_all_orders_are_drawn_about_equally_often():
    make = CaptionVariants(shuffles=1, keep_tags=0)
    drawn = [make.variants("a, b, c", str(key))[0] for key in range(1000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 5
    assert all(140 < count < 260 for count in counts)  # 200 each, standard deviation 13


@pytest.mark.parametrize(("separator", "caption", "expected"), [(";", "a; b", "b; a"), (" ", "a b", "b a"),
                                                                (" | ", "a | b", "b | a")])  # fmt: skip
def test_other_separators(separator, caption, expected):
    assert CaptionVariants(shuffles=5, keep_tags=0, separator=separator).variants(caption, "k") == [expected]


def test_items_carry_the_final_caption_and_only_training_has_variants(root):
    write(root, "photos/a.txt", "x, y")
    write(root, "held/v.txt", "x, y")
    found = {item.key: item for item in source(root, caption_variants=CaptionVariants("ohwx", shuffles=4)).items()}
    assert (found["a"].caption, found["a"].variants) == ("ohwx, x, y", ("ohwx, y, x",))
    assert (found["@val/v"].caption, found["@val/v"].variants) == ("ohwx, x, y", ())
    assert (found["s/b"].caption, found["s/b"].captioned, found["s/b"].variants) == ("ohwx", False, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": " "}, "trigger is empty"),
        ({"shuffles": 101}, "shuffles must be 0 to 100, got 101"),
        ({"shuffles": -1}, "shuffles must be 0 to 100, got -1"),
        ({"keep_tags": -1}, "keep_tags must be at least 0, got -1"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_settings_of_captions_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"data.caption_variants.{message}"):
        CaptionVariants(**settings)
