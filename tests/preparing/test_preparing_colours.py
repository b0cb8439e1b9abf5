"""Colour profiles through prepare: what is encoded is what a viewer shows, and only what they concern is made anew."""

import json
import random

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mpp.prepare
from mpp.cache.format import Cache, write_tensors
from tests.helpers import config
from tests.media import profiles
from tests.media.test_colours import drawn_image

KINDS = {  # by name: profile (matrix and curve), whether it converts, whether it fits
    "none": (None, False, True),
    "srgb": ((profiles.SRGB, "srgb"), False, True),
    "p3": ((profiles.P3, "srgb"), True, True),
    "adobe": ((profiles.ADOBE, 2.2), True, True),
    "grey": (1.8, False, False),
    "broken": (b"no profile", False, False),
}


def prepare(root, *overrides):
    paths = {"data.image_dir": "photos", "data.mask_dir": "masks", "data.cache_dir": "cache"}
    settings = ["model=toy", "data.resolution=28", "device=cpu"]
    cfg = config("prepare", [*settings, *(f"{key}={root / name}" for key, name in paths.items()), *overrides])
    return mpp.prepare.run(cfg)


def draw_set(root, draw, count):
    """Images in their bucket's size with drawn profiles and masks; the kinds of profile by key."""
    for folder in ("photos", "masks"):
        (root / folder).mkdir()
    kinds = {f"p{number:02d}": draw.choice(list(KINDS)) for number in range(count)}
    for key, kind in kinds.items():
        made = KINDS[kind][0]
        profile = made if isinstance(made, bytes | None) else None
        if isinstance(made, tuple):
            profile = profiles.rgb_profile(*made)
        elif isinstance(made, float):
            profile = profiles.grey_profile(made)
        image = drawn_image(draw, draw.choice(["RGB", "RGBA"])).resize((28, 28))
        image.save(root / "photos" / f"{key}.png", icc_profile=profile)
        Image.fromarray(np.full((28, 28), 200, np.uint8)).save(root / "masks" / f"{key}.png", icc_profile=profile)
    return kinds


def encoded(cache, entry):
    """The pixels that the toy's latents hold, `(height, width, 3)` in levels."""
    pixels = torch.nn.functional.pixel_shuffle(cache.latents(entry)[:, 0], 2)
    return ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()


def as_before(cache, keys, root):
    """Let the samples be what earlier versions encoded: the file's own numbers, and a header that says nothing."""
    for key in keys:
        path = cache.latents_path(key)
        with safe_open(path, "pt") as handle:
            header = json.loads(handle.metadata()["made_from"])
        assert header.pop("srgb") is True
        pixels = torch.from_numpy(np.asarray(Image.open(root / "photos" / f"{key}.png").convert("RGB")).copy())
        latents = torch.nn.functional.pixel_unshuffle((pixels.permute(2, 0, 1) / 127.5 - 1)[None], 2)
        write_tensors(path, {"latents": latents[0][:, None].contiguous()}, header)


def test_only_samples_with_a_profile_that_matters_are_encoded_anew(tmp_path):
    kinds = draw_set(tmp_path, random.Random(0), 24)
    converted = {key for key, kind in kinds.items() if KINDS[kind][1]}
    misfits = {key for key, kind in kinds.items() if not KINDS[kind][2]}
    assert converted
    assert misfits
    first = prepare(tmp_path)
    cache = Cache(tmp_path / "cache")
    for entry in cache.entries():
        file = np.asarray(Image.open(tmp_path / "photos" / f"{entry.key}.png").convert("RGB"))
        found, (made, converts, _) = encoded(cache, entry), KINDS[kinds[entry.key]]
        if converts:
            assert np.abs(found - profiles.shown(file, made[1], made[0])).max() <= 1.01
            assert np.abs(found - file).max() > 4
        else:
            np.testing.assert_allclose(found, file, rtol=0, atol=1e-4)
        assert torch.equal(cache.mask(entry), torch.full_like(cache.mask(entry), 200 / 255))

    whole = {key: load_file(cache.latents_path(key))["latents"] for key in kinds}
    as_before(cache, converted, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*.safetensors")}
    for summary, anew in ((prepare(tmp_path), converted), (prepare(tmp_path), set())):
        assert summary.encoded == len(anew)
        assert summary.masks_written == summary.texts_encoded == 0
        said = "\n".join(summary.lines())
        assert f"colours: {len(converted)} images have a profile and are converted to sRGB\n" in said
        names = ", ".join(sorted(misfits))
        assert f"colours: {len(misfits)} images have a profile that does not fit them, ignored: {names}\n" in said
    now = {path: path.stat().st_mtime_ns for path in files}
    assert {path.stem for path in files if files[path] != now[path]} == converted
    assert all(torch.equal(load_file(cache.latents_path(key))["latents"], whole[key]) for key in kinds)
    assert first.encoded == len(kinds)
