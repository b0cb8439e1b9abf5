import numpy as np
import pytest
import torch
from PIL import Image

from mpp.data.media import (
    Buckets,
    Geometry,
    check_aspect,
    crop_picture,
    latent_mask,
    overlaps,
    picture_size,
    picture_tensor,
    read_mask,
    read_picture,
)
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
def test_picture_and_mask_go_through_one_geometry(source, flip):
    # A picture that is its own mask: where the picture is white after prepare, the mask must be too.
    random = np.random.default_rng(1)
    blocks = (random.random((6, 8)) > 0.5).astype(np.uint8) * 255
    mask = np.array(Image.fromarray(blocks).resize(source, Image.Resampling.NEAREST))
    geometry = Geometry(source, (96, 64), flip)
    pixels = picture_tensor(crop_picture(Image.fromarray(mask).convert("RGB"), geometry))[0, 0]
    pooled = torch.nn.functional.avg_pool2d(((pixels + 1) / 2)[None], 8)[0]
    cells = latent_mask(mask.astype(np.float32) / 255, geometry, (8, 12))[0, 0]
    assert float((pooled - cells).abs().max()) < 0.12  # Lanczos rings a little at edges
    assert float((pooled - cells.flip(1)).abs().max()) > 0.5


def test_crop_covers_the_bucket_and_is_centred():
    geometry = Geometry((400, 100), (64, 64))
    assert geometry.scale == pytest.approx(0.64)
    assert geometry.box(400, 100) == pytest.approx((150, 0, 250, 100))
    assert crop_picture(Image.new("RGB", (400, 100)), geometry).size == (64, 64)


def test_overlap_shares_add_up():
    weights = overlaps(3.3, 17.9, 7, 20)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights >= 0).all()


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_exif_orientation_turns_picture_and_size(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.zeros((20, 40, 3), np.uint8)
    array[:5, :5] = 255  # a bright top left corner as stored
    path = save(tmp_path / "p.jpg", array, exif=exif, quality=95)
    assert picture_size(path) == ((20, 40) if turned else (40, 20))
    picture = np.asarray(read_picture(path).rgb)
    corner = {1: (0, 0), 3: (-1, -1), 6: (0, -1), 8: (-1, 0)}[orientation]
    assert picture[corner].mean() > 200
    assert (picture.shape[1], picture.shape[0]) == picture_size(path)


def test_colour_under_a_transparent_alpha_is_kept_exactly(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    array[:4, :, 3] = 0
    picture = read_picture(save(tmp_path / "p.png", array))
    np.testing.assert_array_equal(np.asarray(picture.rgb), array[..., :3])
    np.testing.assert_allclose(picture.alpha, array[..., 3] / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    image.save(path)
    pixels = np.asarray(read_picture(path).rgb).astype(int)
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
def test_truncated_pictures_are_named(tmp_path, suffix):
    random = np.random.default_rng(0)
    path = save(tmp_path / f"p.{suffix}", random.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"p\.{suffix}: not a readable picture, or truncated"):
        read_picture(path)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "p.png").write_text("hello")
    for read in (picture_size, read_picture, read_mask):
        with pytest.raises(ValueError, match=r"p\.png: not a readable"):
            read(tmp_path / "p.png")


@pytest.mark.parametrize(
    ("mask", "picture", "fine"),
    [
        ((50, 50), (100, 100), True),
        ((640, 426), (640, 427), True),
        ((100, 98), (100, 100), False),
        ((50, 80), (80, 50), False),
    ],
)
def test_aspect_ratios_may_differ_by_one_percent(mask, picture, fine):
    if fine:
        check_aspect(mask, picture, "p")
    else:
        with pytest.raises(ValueError, match=f"the mask is {mask[0]}x{mask[1]}, its picture {picture[0]}x{picture[1]}"):
            check_aspect(mask, picture, "p")


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


def test_a_picture_goes_to_the_bucket_of_its_shape():
    buckets = Buckets(512, 16)
    assert buckets.choose(1000, 1000) == (512, 512)
    width, height = buckets.choose(1920, 1080)
    assert width / height == pytest.approx(16 / 9, rel=0.03)
    assert buckets.choose(1080, 1920) == (height, width)
    assert buckets.choose(4000, 100)[0] / buckets.choose(4000, 100)[1] == pytest.approx(2, rel=0.05)


def test_bucket_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="data.resolution must be at least 16"):
        Buckets(8, 16)
    with pytest.raises(ValueError, match="data.max_aspect must be at least 1"):
        Buckets(512, 16, 0.5)
