"""Formats by their suffixes: JPEG under its other names, AVIF, and HEIC by a package of its own."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from mpp.media.images import SUFFIXES, image_size, read_image, read_mask, read_raw_mask


def smooth(draw, width, height):
    """An image that lossy formats keep nearly as it is."""
    across, down = np.linspace(0, draw.integers(100, 255), width), np.linspace(0, draw.integers(0, 100), height)
    grey = (across[None, :] + down[:, None]).clip(0, 255)
    return Image.fromarray(np.stack([grey, grey * 0.5, 255 - grey], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".jif", ".JFIF"])
def test_jpeg_is_read_under_its_other_names(tmp_path, suffix):
    assert suffix.lower() in SUFFIXES
    image = smooth(np.random.default_rng(0), 33, 21)
    image.save(tmp_path / "a.jpg")
    (tmp_path / f"b{suffix}").write_bytes((tmp_path / "a.jpg").read_bytes())
    known, other = (np.asarray(read_image(tmp_path / name).rgb) for name in ("a.jpg", f"b{suffix}"))
    assert np.array_equal(known, other)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_show_what_was_saved_in_any_size_upright(tmp_path, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    draw = np.random.default_rng(1)
    for number in range(12):
        width, height = draw.integers(8, 90, 2).tolist()
        image, turn = smooth(draw, width, height), int(draw.integers(1, 9))
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"{number}.{kind.lower()}"
        image.save(path, kind, quality=95, exif=exif.tobytes())
        wanted = image.copy()
        for step in {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (4,), 7: (6,), 8: (2,)}[turn]:
            wanted = wanted.transpose(Image.Transpose(step))
        found = read_image(path).rgb
        assert image_size(path) == found.size == wanted.size
        assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < 5


def test_a_mask_in_heic_is_a_mask(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((16, 16))).astype(np.uint8)).save(tmp_path / "m.heic", "HEIF")
    assert read_raw_mask(tmp_path / "m.heic").lossy
    assert read_mask(tmp_path / "m.heic")[:8, :8].max() < 0.1


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_its_package_is_refused_with_the_way(tmp_path, brand, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64))
    for look in (read_image, image_size, read_raw_mask):
        with pytest.raises(ValueError, match=r"a\.HEIC is HEIC, .*not installed; pip install 'mpp\[heic\]', or save"):
            look(tmp_path / "a.HEIC")


def test_other_formats_than_those_are_not_opened(tmp_path):
    """Pillow has formats that start programs."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "TGA")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(tmp_path / "a.png")
