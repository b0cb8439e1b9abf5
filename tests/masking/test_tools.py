import math

import numpy as np
import pytest
from PIL import Image

from mpp.masking.tools import Combine, FromColor, Tiers
from tests.masking.files import levels, png16, random_mask, run, save


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in", tmp_path / "out"


# ---------------------------------------------------------------- invert


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_inverting_keeps_every_level_and_twice_is_nothing(paths, tmp_path, dtype, top):
    source, output = paths
    every = np.arange(256 if top == 255 else 65536, dtype=dtype).reshape(16, -1)
    save(source / "m.png", every)
    run("invert", source, output)
    assert levels(output / "m.png").dtype == dtype
    np.testing.assert_array_equal(levels(output / "m.png"), top - every)
    run("invert", output, tmp_path / "twice")
    np.testing.assert_array_equal(levels(tmp_path / "twice" / "m.png"), every)


def test_subfolders_and_all_image_formats_are_kept_as_names(paths):
    source, output = paths
    for name in ("a.png", "sub/b.bmp", "sub/deeper/c.d.tif", "e.layer0.webp"):
        save(source / name, random_mask(1), **({"lossless": True} if name.endswith("webp") else {}))
    (source / "a.txt").write_text("a caption")
    save(source / ".hidden" / "x.png", random_mask(1))
    run("invert", source, output)
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert found == ["a.png", "e.layer0.png", "sub/b.png", "sub/deeper/c.d.png"]
    for name in found:
        np.testing.assert_array_equal(levels(output / name), 255 - random_mask(1))


# ---------------------------------------------------------------- combine

RULES = {
    "multiply": lambda a, b: a * b,
    "min": min,
    "max": max,
    "subtract": lambda a, b: max(a - b, 0.0),
}


@pytest.mark.parametrize("how", RULES)
def test_masks_combine_pixel_by_pixel(paths, tmp_path, how):
    source, output = paths
    first, second = random_mask(1), random_mask(2)
    save(source / "sub" / "m.png", first)
    save(tmp_path / "other" / "sub" / "m.webp", second, lossless=True)
    run("combine", source, output, f"tool.masks={tmp_path / 'other'}", f"tool.how={how}")
    want = [
        [round(255 * RULES[how](a / 255, b / 255)) for a, b in zip(*rows, strict=True)]
        for rows in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert np.abs(levels(output / "sub" / "m.png").astype(int) - want).max() <= 1e-9


def test_tiers_times_an_instance_mask_are_the_tiers_of_one_person(paths, tmp_path):
    source, output = paths
    tiers = np.repeat(np.array([[255, 128, 80, 0]], np.uint8), 6, axis=0)
    person = np.zeros_like(tiers)
    person[:3] = 255
    save(source / "m.png", tiers)
    save(tmp_path / "persons" / "m.png", person)
    run("combine", source, output, f"tool.masks={tmp_path / 'persons'}")
    got = levels(output / "m.png")
    np.testing.assert_array_equal(got[:3], tiers[:3])
    assert not got[3:].any()


def test_a_deep_mask_stays_deep(paths, tmp_path):
    source, output = paths
    deep = random_mask(3, top=65536, dtype=np.uint16)
    save(source / "m.png", deep)
    save(tmp_path / "other" / "m.png", np.full(deep.shape, 255, np.uint8))
    run("combine", source, output, f"tool.masks={tmp_path / 'other'}")
    np.testing.assert_array_equal(levels(output / "m.png"), deep)
    run("combine", tmp_path / "other", tmp_path / "out2", f"tool.masks={source}")
    np.testing.assert_array_equal(levels(tmp_path / "out2" / "m.png"), deep)


def test_one_mask_for_all_takes_a_watermark_out(paths, tmp_path):
    source, output = paths
    mark = np.zeros((9, 13), np.uint8)
    mark[:2] = 255
    save(tmp_path / "mark.png", mark)
    for name in ("a.png", "b/c.png"):
        save(source / name, random_mask(4))
    run("combine", source, output, f"tool.masks={tmp_path / 'mark.png'}", "tool.how=subtract")
    for name in ("a.png", "b/c.png"):
        np.testing.assert_array_equal(levels(output / name)[2:], random_mask(4)[2:])
        assert not levels(output / name)[:2].any()


def test_another_size_is_an_error_until_resizing_is_asked_for(paths, tmp_path):
    source, output = paths
    save(source / "m.png", np.full((20, 30), 255, np.uint8))
    half = np.zeros((10, 15), np.uint8)
    half[:, :6] = 255
    save(tmp_path / "other" / "m.png", half)
    other = f"tool.masks={tmp_path / 'other'}"
    with pytest.raises(ValueError, match=r"m\.png and .*m\.png: sizes differ, 15x10 and 30x20; .*tool.resize=true"):
        run("combine", source, output, other)
    assert not list(output.rglob("*.png"))
    run("combine", source, output, other, "tool.resize=true")
    got = levels(output / "m.png")
    assert got.shape == (20, 30)
    assert (got[:, :11] == 255).all()
    assert not got[:, 13:].any()


def test_resizing_does_not_bend_another_shape(paths, tmp_path):
    source, output = paths
    save(source / "m.png", random_mask(1, (20, 30)))
    save(tmp_path / "other" / "m.png", random_mask(1, (20, 20)))
    with pytest.raises(ValueError, match="another aspect ratio"):
        run("combine", source, output, f"tool.masks={tmp_path / 'other'}", "tool.resize=true")


def test_masks_without_a_second_one_fail_or_are_kept(paths, tmp_path):
    source, output = paths
    for name in ("a", "b"):
        save(source / f"{name}.png", random_mask(5))
    save(tmp_path / "other" / "a.png", np.zeros((9, 13), np.uint8))
    save(tmp_path / "other" / "misspelt.png", np.zeros((9, 13), np.uint8))
    other = f"tool.masks={tmp_path / 'other'}"
    with pytest.raises(
        ValueError, match=r"1 failed, the others are done(?s:.*)b\.png has nothing of its name in tool\.m"
    ):
        run("combine", source, output, other)
    assert not levels(output / "a.png").any()
    summary = run("combine", source, output, other, "tool.missing=keep")
    assert [path.name for path in summary.unused] == ["misspelt.png"]
    assert "misspelt.png" in "\n".join(summary.lines())
    np.testing.assert_array_equal(levels(output / "b.png"), random_mask(5))


# ---------------------------------------------------------------- tiers


def test_levels_become_what_the_table_says(paths):
    source, output = paths
    grey = np.random.default_rng(0).choice(np.array([255, 128, 80, 0], np.uint8), (9, 13))
    save(source / "m.png", grey)
    run("tiers", source, output, "tool.table={255:1.0,128:0.6,hair:[80,0.2],0:0}")
    want = {255: 255, 128: round(0.6 * 255), 80: round(0.2 * 255), 0: 0}
    np.testing.assert_array_equal(levels(output / "m.png"), np.vectorize(want.get)(grey))


def test_tolerance_takes_the_neighbours_and_no_more(paths):
    source, output = paths
    save(source / "m.png", np.array([[120, 128, 136, 247, 255, 0, 8]], np.uint8))
    table = "tool.table={255:1.0,128:0.5,0:0}"
    run("tiers", source, output, table, "tool.tolerance=8")
    assert levels(output / "m.png").tolist() == [[128, 128, 128, 255, 255, 0, 0]]
    with pytest.raises(ValueError, match=r"m\.png: 4 levels are not in the table: 8 \(1 pixels\), 120 .1 pixels"):
        run("tiers", source, output, table, "tool.tolerance=7", "overwrite=true")


def test_other_levels_are_named_with_their_file_or_get_a_value(paths):
    source, output = paths
    save(source / "sub" / "m.png", np.array([[0, 0, 77, 255]], np.uint8))
    with pytest.raises(ValueError, match=r"sub/m\.png: 1 levels are not in the table: 77 \(1 pixels\); add them"):
        run("tiers", source, output, "tool.table={255:1.0,0:0}")
    run("tiers", source, output, "tool.table={255:1.0}", "tool.other=0.2")
    assert levels(output / "sub" / "m.png").tolist() == [[51, 51, 51, 255]]


def test_palette_indices_are_labels_where_that_is_said(paths, tmp_path):
    source, output = paths
    labels = np.array([[0, 1, 2, 13]], np.uint8)
    image = Image.fromarray(labels)
    image.putpalette([channel for index in range(256) for channel in (index * 7 % 256, 200, index)])
    source.mkdir()
    image.save(source / "m.png")
    table = "tool.table={background:[0,0],hat:[1,0.2],hair:[2,0.4],face:[13,1]}"
    with pytest.raises(
        ValueError, match=r"m\.png: this mask has colours.*palettes' indices \(tool=tiers tool.values=index\)"
    ):
        run("tiers", source, output, table)
    run("tiers", source, output, table, "tool.values=index")
    assert levels(output / "m.png").tolist() == [[0, 51, 102, 255]]
    save(tmp_path / "grey" / "m.png", labels)
    with pytest.raises(ValueError, match="has no palette"):
        run("tiers", tmp_path / "grey", tmp_path / "out2", table, "tool.values=index")


def test_palettes_of_greys_are_greys(paths):
    source, output = paths
    grey = np.array([[0, 80, 128, 255]], np.uint8)
    source.mkdir()
    Image.fromarray(grey).convert("P").save(source / "m.png")
    run("tiers", source, output, "tool.table={255:1,128:0.5,80:0,0:0}")
    assert levels(output / "m.png").tolist() == [[0, 0, 128, 255]]


def test_deep_masks_have_deep_levels(paths):
    source, output = paths
    save(source / "m.png", np.array([[65535, 1000, 0]], np.uint16))
    run("tiers", source, output, "tool.table={65535:1,1000:0.5,0:0}")
    got = levels(output / "m.png")
    assert got.dtype == np.uint16
    assert got.tolist() == [[65535, 32768, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tool.table is missing"),
        ({"table": {"face": 1.0}}, "'face': 1.0 has no level"),
        ({"table": {70000: 1.0}}, "has no level; write LEVEL: VALUE"),
        ({"table": {-1: 1.0}}, "has no level"),
        ({"table": {255: 1.5}}, "the value of 255 must be between 0 and 1, got 1.5"),
        ({"table": {"face": [255, -1]}}, "the value of 'face' must be between 0 and 1"),
        ({"table": {255: 1}, "tolerance": -1}, "tool.tolerance must be at least 0, got -1"),
        ({"table": {255: 1}, "other": 2.0}, "tool.other must be between 0 and 1"),
        ({"table": {255: 1, 128: 0.5, 120: 0}, "tolerance": 4}, "too much for a table with 120 and 128.*at most 3"),
        ({"table": {255: 1, "a": [255, 0]}}, "names the level 255 twice"),
        ({"table": {255: 1}, "values": "colour"}, "tool.values must be grey or index, got 'colour'"),
    ],
)
def test_tables_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Tiers(**settings)


# ---------------------------------------------------------------- from_color


@pytest.mark.parametrize("keep", ["color", "rest"])
@pytest.mark.parametrize(("tolerance", "softness"), [(0, 0), (60, 0), (60, 80), (0, 200)])
def test_a_key_colour_becomes_a_mask(paths, keep, tolerance, softness):
    source, output = paths
    rgb = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    rgb[2:5, 3:9] = (10, 240, 30)
    rgb[0, :4] = [(10, 240, 30 + step) for step in (0, 59, 60, 61)]
    save(source / "p.png", rgb)
    run(
        "from_color", source, output, "tool.color=[10,240,30]", f"tool.tolerance={tolerance}",
        f"tool.softness={softness}", f"tool.keep={keep}",
    )  # fmt: skip
    for y, row in enumerate(rgb.tolist()):
        for x, pixel in enumerate(row):
            away = math.dist(pixel, (10, 240, 30))
            key = 1.0 if away <= tolerance else 0.0 if not softness else max(0.0, 1 - (away - tolerance) / softness)
            want = 255 * (key if keep == "color" else 1 - key)
            assert abs(int(levels(output / "p.png")[y, x]) - want) <= 0.5 + 1e-3, (x, y)


def test_colours_under_a_transparent_alpha_count_and_turned_images_are_upright(paths):
    source, output = paths
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:2, :, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(source / "p.png", rgba, exif=exif)
    run("from_color", source, output, "tool.color=[0,255,0]")
    got = levels(output / "p.png")
    assert got.shape == (6, 4)
    assert (got[:, 2:] == 255).all()  # the top of the file is on the right
    assert not got[:, :2].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"tool.color must be red, green and blue from 0 to 255, as \[0,255,0\], got None"),
        ({"color": [0, 255]}, r"got \[0, 255\]"),
        ({"color": [0, 256, 0]}, r"got \[0, 256, 0\]"),
        ({"color": [0, 0, 0], "tolerance": -1.0}, "tool.tolerance must be between 0 and 442, got -1"),
        ({"color": [0, 0, 0], "tolerance": 500.0}, "got 500"),
        ({"color": [0, 0, 0], "softness": -0.5}, "tool.softness must be between 0 and 442"),
        ({"color": [0, 0, 0], "keep": "both"}, "tool.keep must be color or rest, got 'both'"),
    ],
)
def test_colour_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FromColor(**settings)


def test_combine_needs_a_second_mask_and_a_known_rule():
    with pytest.raises(ValueError, match="tool.masks=... is missing"):
        Combine()
    with pytest.raises(ValueError, match="tool.how must be multiply or min or max or subtract, got 'add'"):
        Combine(masks="x", how="add")


def test_a_mask_with_a_transparent_alpha_is_refused(paths):
    source, output = paths
    array = np.zeros((4, 4, 2), np.uint16)
    png16(source / "m.png", array)
    with pytest.raises(ValueError, match="unclear whether its grey or its alpha"):
        run("invert", source, output)
