import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.media.geometry import Buckets, Geometry, check_aspect, crop_image, image_tensor, latent_mask, overlaps
from mpp.media.images import image_size, is_video, read_image, read_mask
from tests import reference


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("source", [(640, 427), (451, 300), (100, 333), (64, 64), (37, 41)])
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (48, 96)])
@pytest.mark.parametrize("flip", [False, True])
def test_latent_masks_match_a_slow_area_average(source, size, flip):
    random = np.random.default_rng(source[0])
    mask = random.random((source[1], source[0])).astype(np.float32)
    geometry = Geometry(source, size, flip)
    cells = (size[1] // 8, size[0] // 8)
    got = latent_mask(mask, geometry, cells)[0, 0]
    want = np.array(reference.area_average(mask.tolist(), geometry.box(*source), cells))
    np.testing.assert_allclose(got.numpy(), want[:, ::-1] if flip else want, rtol=0, atol=1e-6)


def test_a_cell_beside_an_area_takes_no_trace_of_it_and_a_constant_stays_what_it_is():
    width, height, cells = 208, 215, (10, 8)
    geometry = Geometry((width, height), (64, 80))
    mask = np.zeros((height, width), np.float32)
    for edge in range(width):  # the area ends at some of the cells' edges
        mask[:, edge] = 1
        found = latent_mask(mask, geometry, cells)
        assert found[(found > 0) & (found < 1)].tolist() == found[(found > 1e-6) & (found < 1 - 1e-6)].tolist()
    for value in np.array([1, 128 / 255, 80 / 255, 0.3], np.float32):
        constant = latent_mask(np.full((height, width), value), geometry, cells)
        assert (constant == torch.tensor(value)).all()


def test_a_mask_at_another_resolution_covers_the_same_cells():
    big = np.zeros((300, 400), np.float32)
    big[60:180, 100:300] = 1
    small = big[::2, ::2]
    geometry = Geometry((400, 300), (128, 96))
    torch.testing.assert_close(latent_mask(big, geometry, (12, 16)), latent_mask(small, geometry, (12, 16)))


def test_masks_smaller_than_the_latent_grid_keep_their_values():
    mask = np.array([[0.0, 1.0], [0.25, 0.5]], np.float32)
    got = latent_mask(mask, Geometry((200, 200), (64, 64)), (8, 8))[0, 0]
    assert got[:4, :4].unique().tolist() == [0.0]
    assert got[4:, 4:].unique().tolist() == [0.5]


@pytest.mark.parametrize("source", [(331, 127), (97, 203), (160, 120)])
@pytest.mark.parametrize("flip", [False, True])
def test_image_and_mask_go_through_one_geometry(source, flip):
    # An image that is its own mask: where the image is white after prepare, the mask must be too.
    random = np.random.default_rng(1)
    blocks = (random.random((6, 8)) > 0.5).astype(np.uint8) * 255
    mask = np.array(Image.fromarray(blocks).resize(source, Image.Resampling.NEAREST))
    geometry = Geometry(source, (96, 64), flip)
    pixels = image_tensor(crop_image(Image.fromarray(mask).convert("RGB"), geometry))[0, 0]
    pooled = torch.nn.functional.avg_pool2d(((pixels + 1) / 2)[None], 8)[0]
    cells = latent_mask(mask.astype(np.float32) / 255, geometry, (8, 12))[0, 0]
    assert float((pooled - cells).abs().max()) < 0.12  # Lanczos rings a little at edges
    assert float((pooled - cells.flip(1)).abs().max()) > 0.5


def test_crop_covers_the_bucket_and_is_centred():
    geometry = Geometry((400, 100), (64, 64))
    assert geometry.scale == pytest.approx(0.64)
    assert geometry.box(400, 100) == pytest.approx((150, 0, 250, 100))
    assert crop_image(Image.new("RGB", (400, 100)), geometry).size == (64, 64)


def test_overlap_shares_add_up():
    weights = overlaps(3.3, 17.9, 7, 20)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights >= 0).all()


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_exif_orientation_turns_image_and_size(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.zeros((20, 40, 3), np.uint8)
    array[:5, :5] = 255  # a bright top left corner as stored
    path = save(tmp_path / "p.jpg", array, exif=exif, quality=95)
    assert image_size(path) == ((20, 40) if turned else (40, 20))
    image = np.asarray(read_image(path).rgb)
    corner = {1: (0, 0), 3: (-1, -1), 6: (0, -1), 8: (-1, 0)}[orientation]
    assert image[corner].mean() > 200
    assert (image.shape[1], image.shape[0]) == image_size(path)


def test_colour_under_a_transparent_alpha_is_kept_exactly(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    array[:4, :, 3] = 0
    image = read_image(save(tmp_path / "p.png", array))
    np.testing.assert_array_equal(np.asarray(image.rgb), array[..., :3])
    np.testing.assert_allclose(image.alpha, array[..., 3] / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    image.save(path)
    pixels = np.asarray(read_image(path).rgb).astype(int)
    assert pixels.shape == (16, 16, 3)
    if mode not in ("1", "CMYK"):
        assert np.abs(pixels - grey[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_any_mode_have_the_same_values(tmp_path, mode):
    tiers = np.repeat(np.array([[0, 80, 128, 255]], np.uint8), 4, axis=0)
    image = Image.fromarray(tiers.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(tiers).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_allclose(read_mask(tmp_path / "m.png"), tiers / 255, atol=1e-6)


def test_a_mask_with_a_transparent_alpha_is_refused(tmp_path):
    array = np.full((4, 4, 4), 255, np.uint8)
    array[0, 0, 3] = 0
    with pytest.raises(ValueError, match="unclear whether its grey or its alpha"):
        read_mask(save(tmp_path / "m.png", array))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_truncated_images_are_named(tmp_path, suffix):
    random = np.random.default_rng(0)
    path = save(tmp_path / f"p.{suffix}", random.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"p\.{suffix}: not a readable image, or truncated"):
        read_image(path)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "p.png").write_text("hello")
    for read in (image_size, read_image, read_mask):
        with pytest.raises(ValueError, match=r"p\.png: not a readable"):
            read(tmp_path / "p.png")


@pytest.mark.parametrize(
    ("mask", "image", "fine"),
    [
        ((50, 50), (100, 100), True),
        ((640, 426), (640, 427), True),
        ((100, 98), (100, 100), False),
        ((50, 80), (80, 50), False),
    ],
)
def test_aspect_ratios_may_differ_by_one_percent(mask, image, fine):
    if fine:
        check_aspect(mask, image, "p")
    else:
        with pytest.raises(ValueError, match=f"the mask is {mask[0]}x{mask[1]}, its image {image[0]}x{image[1]}"):
            check_aspect(mask, image, "p")


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(512, 16, 2.0), (480, 32, 1.5), (64, 16, 4.0), (256, 16, 1.0)]
)
def test_buckets_fit_area_step_and_aspect(resolution, step, aspect):
    sizes = Buckets(resolution, step, aspect).sizes()
    assert (resolution // step * step,) * 2 in sizes
    for width, height in sizes:
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution**2
        assert max(width / height, height / width) <= aspect


def test_an_image_goes_to_the_bucket_of_its_shape():
    buckets = Buckets(512, 16)
    assert buckets.choose(1000, 1000) == (512, 512)
    width, height = buckets.choose(1920, 1080)
    assert width / height == pytest.approx(16 / 9, rel=0.03)
    assert buckets.choose(1080, 1920) == (height, width)
    assert buckets.choose(4000, 100)[0] / buckets.choose(4000, 100)[1] == pytest.approx(2, rel=0.05)


def test_bucket_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="data.resolution must be at least 16"):
        Buckets(8, 16)


# ---------------------------------------------------------------- masks that mean something else than their grey


@pytest.mark.parametrize(
    ("array", "brightest", "white"),
    [
        (np.array([[0, 1]], np.uint8), 1, 255),
        (np.array([[1, 1]], np.uint8), 1, 255),
        (np.array([[0, 255]], np.uint16), 255, 65535),
        (np.array([[0, 1]], np.uint16), 1, 65535),
    ],
)
def test_masks_of_label_numbers_are_refused(tmp_path, array, brightest, white):
    with pytest.raises(ValueError, match=rf"m\.png: the brightest value of this mask is {brightest} of {white}, as in"):
        read_mask(save(tmp_path / "m.png", array))


def test_black_masks_are_ordinary_also_with_the_noise_of_lossy_formats(tmp_path):
    assert read_mask(save(tmp_path / "m.png", np.zeros((4, 4), np.uint8))).max() == 0
    assert read_mask(save(tmp_path / "d.png", np.zeros((4, 4), np.uint16))).max() == 0
    noisy = save(tmp_path / "m.jpg", np.ones((16, 16), np.uint8), quality=100)
    assert read_mask(noisy).max() == pytest.approx(1 / 255)


def test_palette_masks_count_by_their_greys_not_by_their_numbers(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0, 51, 51, 51])
    image.save(tmp_path / "m.png")
    np.testing.assert_allclose(read_mask(tmp_path / "m.png"), [[1, 0, 0.2]], atol=1e-6)


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_masks_with_colours_are_refused(tmp_path, mode):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0])  # as in maps of labels: 1 is dark red
    image.convert(mode).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png: this mask has colours, as maps of labels have"):
        read_mask(tmp_path / "m.png")


def test_the_slight_colours_of_lossy_masks_are_no_matter(tmp_path):
    tinted = np.repeat(np.array([[0, 128, 255]], np.uint8), 3, 0)[..., None].repeat(3, 2)
    tinted[..., 0] = np.clip(tinted[..., 0].astype(int) - 10, 0, 255)
    assert read_mask(save(tmp_path / "m.png", tinted)).shape == (3, 3)


@pytest.mark.parametrize("clear", [1000, 5])
def test_one_transparent_grey_of_16_bits_is_alpha(tmp_path, clear):
    array = np.array([[0, 1000, 65535]], np.uint16)
    Image.fromarray(array).save(tmp_path / "p.png", transparency=clear)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").alpha, [[1, clear != 1000, 1]])
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "p.png").rgb)[0, :, 0], [0, 4, 255])
    if clear == 1000:
        with pytest.raises(ValueError, match="unclear whether its grey or its alpha"):
            read_mask(tmp_path / "p.png")
    else:
        np.testing.assert_allclose(read_mask(tmp_path / "p.png"), array / 65535, atol=1e-6)


@pytest.mark.parametrize("values", [[0, 255.0], [-0.1, 1], [0, float("nan")], [0, float("inf")]])
def test_floating_point_files_beyond_one_are_refused(tmp_path, values):
    path = save(tmp_path / "m.tif", np.array([values], np.float32))
    for read in (read_mask, read_image):
        with pytest.raises(ValueError, match=r"m\.tif has values from .* go from 0 to 1; save it with 8 or 16 bits"):
            read(path)


def test_32_bit_files_beyond_16_bits_are_refused(tmp_path):
    path = save(tmp_path / "m.tif", np.array([[0, 70000]], np.int32))
    with pytest.raises(ValueError, match=r"m\.tif has values from 0 to 70000"):
        read_image(path)


# ---------------------------------------------------------------- files that hold more or less than one image


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animations_and_pages_are_refused_not_cut_to_their_first(tmp_path, suffix):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"p.{suffix}", save_all=True, append_images=[second])
    for read in (image_size, read_image, read_mask):
        with pytest.raises(ValueError, match=rf"p\.{suffix} holds 2 images, and it is unclear which is meant"):
            read(tmp_path / f"p.{suffix}")
    first.save(tmp_path / f"one.{suffix}", save_all=True)
    assert image_size(tmp_path / f"one.{suffix}") == (16, 16)


def test_the_preview_inside_a_cameras_jpeg_is_left_alone(tmp_path):
    first, second = Image.new("RGB", (32, 16), (200, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 200))
    first.save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[second])
    assert image_size(tmp_path / "p.jpg") == (32, 16)
    assert np.asarray(read_image(tmp_path / "p.jpg").rgb)[8, 16].tolist() == pytest.approx([200, 0, 0], abs=3)


def test_an_image_that_fills_only_part_of_its_canvas_is_refused(tmp_path):
    save(tmp_path / "p.gif", np.full((8, 8), 255, np.uint8))
    data = bytearray((tmp_path / "p.gif").read_bytes())
    data[6:8] = (16).to_bytes(2, "little")  # the canvas's width
    (tmp_path / "p.gif").write_bytes(data)
    with pytest.raises(ValueError, match=r"p\.gif is 16x8 and holds 64 of its 128 pixels"):
        read_image(tmp_path / "p.gif")


# ---------------------------------------------------------------- damaged and hostile files


def test_a_wrong_bit_anywhere_in_a_png_never_changes_its_pixels(tmp_path):
    grey = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None], 24, 0)
    path = save(tmp_path / "m.png", grey)
    data = path.read_bytes()
    slipped = 0  # what decoding alone would have let through
    for number, bit in itertools.product(range(len(data)), range(8)):
        path.write_bytes(data[:number] + bytes([data[number] ^ 1 << bit]) + data[number + 1 :])
        try:
            assert np.array_equal(np.asarray(read_image(path).rgb)[..., 0], grey)
        except ValueError as error:
            assert "m.png: not a readable image" in str(error)
            try:
                with Image.open(path) as image:
                    slipped += np.asarray(image).shape != grey.shape or bool((np.asarray(image) != grey).any())
            except Exception:  # noqa: BLE001
                pass
    assert slipped


def png(width, height):
    """A PNG that claims a size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 16)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (0, 0), (5000, 5000)])
def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, width, height):
    (tmp_path / "p.png").write_bytes(png(width, height))
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"p\.png: not a readable"):
            read(tmp_path / "p.png")


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp", "p.tif", "p.gif", "p.bmp", "p.avif"])
def test_empty_files_and_folders_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for read in (image_size, read_image, read_mask):
        with pytest.raises(ValueError, match=rf"{name}: not a readable"):
            read(tmp_path / name)
        with pytest.raises(ValueError, match=r"folder cannot be read \(Is a directory\)"):
            read(tmp_path / "folder")


def test_programs_in_files_are_not_run(tmp_path):
    (tmp_path / "p.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")  # ghostscript's
    with pytest.raises(ValueError, match=r"p\.png: not a readable image"):
        image_size(tmp_path / "p.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of what it reads
@pytest.mark.parametrize(
    "garbage", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 99]
)
def test_garbage_for_exif_is_either_refused_or_without_effect(tmp_path, garbage):
    path = save(tmp_path / "p.jpg", np.zeros((16, 32, 3), np.uint8), exif=garbage)
    try:
        assert image_size(path) == read_image(path).rgb.size == (32, 16)
    except ValueError as error:
        assert "p.jpg: not a readable image" in str(error)


def test_unknown_orientations_turn_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    path = save(tmp_path / "p.jpg", np.zeros((16, 32, 3), np.uint8), exif=exif)
    assert image_size(path) == read_image(path).rgb.size == (32, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("number", range(1, 9))
def test_all_orientations_turn_as_the_standard_says_in_all_formats(tmp_path, suffix, number):
    corners = np.zeros((32, 48, 3), np.uint8)  # as stored: red, green over blue, white
    corners[:16, :24], corners[:16, 24:], corners[16:, :24], corners[16:, 24:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        255,
    )
    exif = Image.Exif()
    exif[0x0112] = number
    path = save(tmp_path / f"p.{suffix}", corners, exif=exif, quality=95)
    shown = np.asarray(read_image(path).rgb)
    assert (shown.shape[1], shown.shape[0]) == image_size(path)
    h, w = shown.shape[:2]
    seen = [shown[y, x] for y, x in ((4, 4), (4, w - 5), (h - 5, 4), (h - 5, w - 5))]
    names = "".join("W" if c.min() > 128 else "RGB"[int(c.argmax())] for c in seen)
    # EXIF 2.3, tag 274: where the stored first row and first column are to be shown
    assert names == ["RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"][number - 1]


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    plain = save(tmp_path / "a.png", np.zeros((16, 32, 3), np.uint8)).read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    end = plain.index(b"IEND") - 4
    (tmp_path / "b.png").write_bytes(plain[:end] + chunk + plain[end:])
    assert image_size(tmp_path / "b.png") == read_image(tmp_path / "b.png").rgb.size == (16, 32)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp"])
def test_the_size_is_known_without_decoding(tmp_path, monkeypatch, suffix):
    from PIL import ImageFile

    path = save(tmp_path / f"p.{suffix}", np.zeros((16, 32, 3), np.uint8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path) == (32, 16)


def test_a_folder_with_an_images_name_is_no_video(tmp_path):
    for name in ("a.png", "frames", "frames.v1"):
        (tmp_path / name).mkdir()
    assert [is_video(tmp_path / name) for name in ("a.png", "frames", "frames.v1", "b.MP4", "b.mask")] == [
        False, True, True, True, False]  # fmt: skip
