"""Thousands of damaged files: each is refused by name, or is a sound sample; nothing crashes or takes long."""

import io
import json
import random
import time

import numpy as np
import pytest
from PIL import Image

from mpp.media.images import image_size, read_image, read_mask
from mpp.sources.source import FolderSource

IMAGES = 3000
TABLES = 200  # of each kind
SLOW = 5.0  # seconds for one tiny file: far above what any of them takes, also on a busy machine
SPANS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\x01"]


def encoded(image, kind, second=None, **options):
    buffer = io.BytesIO()
    if second is not None:
        options |= {"save_all": True, "append_images": [second.copy()]}
    image.copy().save(buffer, kind, **options)  # a copy, since saving leaves traces on an image
    return buffer.getvalue()


def seeds():
    """Small sound images of many kinds by name, and the pixels of those with checksums."""
    noise = np.random.default_rng(0)
    rgb = noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    rgb[4:12] = 80
    rgba = noise.integers(0, 255, (24, 32, 4), dtype=np.uint8)
    grey = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None], 24, 0)
    colour, clear, plain, deep = (Image.fromarray(a) for a in (rgb, rgba, grey, grey.astype(np.uint16) * 257))
    other = Image.fromarray(rgb[::-1].copy())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    found = {
        "rgb.png": encoded(colour, "PNG", exif=exif), "rgba.png": encoded(clear, "PNG"),
        "grey.png": encoded(plain, "PNG"),
        "deep.png": encoded(deep, "PNG"), "palette.png": encoded(plain.convert("P"), "PNG", transparency=3),
        "bits.png": encoded(plain.convert("1"), "PNG"), "moving.png": encoded(colour, "PNG", other),
        "a.jpg": encoded(colour, "JPEG", exif=exif), "steps.jpg": encoded(colour, "JPEG", progressive=True),
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"), "grey.jpg": encoded(plain, "JPEG"),
        "two.jpg": encoded(colour, "MPO", other), "a.webp": encoded(colour, "WEBP", exif=exif),
        "exact.webp": encoded(clear, "WEBP", lossless=True), "moving.webp": encoded(colour, "WEBP", other),
        "a.tif": encoded(colour, "TIFF", exif=exif), "deep.tif": encoded(deep, "TIFF"),
        "float.tif": encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "two.tif": encoded(colour, "TIFF", other), "a.bmp": encoded(colour, "BMP"),
        "palette.bmp": encoded(plain.convert("P"), "BMP"), "bits.bmp": encoded(plain.convert("1"), "BMP"),
        "a.gif": encoded(colour, "GIF"), "grey.gif": encoded(plain, "GIF"), "moving.gif": encoded(colour, "GIF", other),
        "a.avif": encoded(colour, "AVIF"),
    }  # fmt: skip
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        found[f"{kind}.tif"] = encoded(colour, "TIFF", compression=kind)
    greys = {"grey.png": grey, "deep.png": grey, "palette.png": grey, "bits.png": np.asarray(plain.convert("1")) * 255}
    pixels = {"rgb.png": np.rot90(rgb, -1), "rgba.png": rgba[..., :3]}  # orientation 6: a quarter turn clockwise
    return found, pixels | {name: np.stack([array] * 3, axis=-1) for name, array in greys.items()}


def mutated(data, draw):
    """The bytes with one kind of damage."""
    data = bytearray(data)
    path, length = draw.randrange(len(data)), draw.randrange(1, 32)
    kind = draw.randrange(7)
    if kind == 0:
        del data[path:]
    elif kind == 1:
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == 2:
        data[path] ^= 1 << draw.randrange(8)
    elif kind == 3:
        del data[path : path + length]
    elif kind == 4:
        data[path:path] = draw.randbytes(length)
    elif kind == 5:  # sizes and offsets stand at the head
        head, span = draw.randrange(min(200, len(data))), draw.choice(SPANS)
        data[head : head + len(span)] = span
    else:
        other = draw.randrange(len(data))
        data[path : path + length] = data[other : other + length]
    return bytes(data)


def attempt(read, path):
    """What a reader gives, or None where it refuses the file as it should."""
    start = time.monotonic()
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < len(str(path)) + 300
        return None
    finally:
        assert time.monotonic() - start < SLOW


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it reads all the same; as errors they would hide it
@pytest.mark.parametrize("part", range(4))
def test_damaged_images_are_refused_by_name_or_are_sound(tmp_path, part):
    files, pixels = seeds()
    counts = {"refused": 0, "read": 0}
    for number in range(part, IMAGES, 4):
        draw = random.Random(number)
        name = draw.choice(sorted(files))
        path = tmp_path / name
        path.write_bytes(mutated(files[name], draw))
        size, image, mask = (attempt(read, path) for read in (image_size, read_image, read_mask))
        counts["refused" if image is None else "read"] += 1
        if image is not None:
            assert image.rgb.mode == "RGB"
            assert image.rgb.size == size
            if image.alpha is not None:
                assert image.alpha.shape == size[::-1]
                assert 0 <= image.alpha.min() <= image.alpha.max() <= 1
            if name in pixels:  # damage that leaves them as they were is no damage
                np.testing.assert_array_equal(np.asarray(image.rgb), pixels[name])
        if mask is not None:
            assert mask.shape == size[::-1]
            assert mask.dtype == np.float32
            assert 0 <= mask.min() <= mask.max() <= 1
    assert min(counts.values()) > IMAGES // 40  # the damage is neither too small nor too large to test anything


def tables():
    """Sound captions, tables and manifests, by the setting that names them."""
    rows = [
        {"media": "a.png", "mask": "m.png", "caption": "käse, red \u2603", "repeats": 2, "layers": [], "starts": []},
        {"media": "s/b.png", "key": "x/y", "split": "val", "invert_mask": True, "controls": ["a.png"]},
    ]
    captions = [{"file": "a.png", "caption": 'one "two", käse'}, {"file": "s/b", "caption": "three"}]
    settings = {"mask_dir": None, "repeats": 2, "caption_variants": {"trigger": "ohwx"}}
    yaml = "one:\n  image_dir: s\n  invert_mask: true\n  repeats: 2\ntwo: &x {image_dir: t, mask_sources: [alpha]}\n"
    return {
        "manifest.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "captions.jsonl": "\r\n".join(json.dumps(row) for row in captions),
        "captions.csv": 'file_name,text,extra\na.png,"one ""two"", käse\nnext line",1\ns/b,three,2\n',
        "captions.tsv": "file\tcaption\na.png\tkäse\ns/b\tthree\n",
        "a.txt": "käse, red, \u2603",
        "datasets.yaml": yaml,
        "sets.yml": json.dumps({"one": {"image_dir": ".", **settings}}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", tables())
def test_damaged_text_files_are_refused_by_name_or_give_sound_items(tmp_path, name):
    for file in ("a.png", "m.png", "s/b.png", "b.png", "t/c.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    path, data = tmp_path / name, tables()[name].encode()
    option = {"manifest.jsonl": "manifest", "datasets.yaml": "datasets", "sets.yml": "datasets"}.get(name, "captions")
    settings = {} if name == "a.txt" else {option: str(path)}
    source = FolderSource(image_dir=str(tmp_path) if option == "captions" else None, cache_dir="cache", **settings)
    path.write_bytes(data)
    assert source.items()
    read = 0
    for number in range(TABLES):
        path.write_bytes(mutated(data, random.Random(number)))
        start = time.monotonic()
        try:
            found = source.items()
        except ValueError as error:
            known = (str(path), str(tmp_path / "s"), str(tmp_path))  # or of the media that it names
            assert any(location in str(error) for location in known) or name in str(error)
            assert len(str(error)) < 1500
        else:
            read += 1
            for item in found:
                assert item.key
                assert item.key.encode()
                assert item.caption.encode().decode() == item.caption == " ".join(item.caption.split())
                assert item.repeats >= 1
                assert item.split in ("train", "val")
        assert time.monotonic() - start < SLOW
    assert read < TABLES
