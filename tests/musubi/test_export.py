"""Our caches written as musubi-tuner's: against files of an independent writer, and read back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mpp.cache.format import Cache, CacheIdentity, text_name, write_tensors
from mpp.cache.index import Entry
from mpp.cache.provenance import LatentsProvenance
from mpp.models.contract import Identity
from mpp.musubi.cache import MusubiCache
from mpp.musubi.export import export_musubi
from tests import helpers
from tests.musubi import stored as fixtures
from tests.musubi.test_cache import model

MADE = LatentsProvenance((), (640, 480, 48, 32, False), None, None).header()  # original and bucket, mirrored


def metadata(path):
    with safe_open(path, "pt") as handle:
        return handle.metadata()


def our_cache(folder, arch, samples):
    """A cache of ours with the given samples: (entry, latents, mask, record)."""
    cache = Cache(folder)
    cache.write_identity(CacheIdentity.of(arch, Identity(None, None, None)))
    for entry, latents, mask, record in samples:
        write_tensors(cache.latents_path(entry.key), {"latents": latents}, MADE)
        if mask is not None:
            write_tensors(cache.mask_path(entry.key), {"mask": mask}, MADE)
        tensors = record.tensors()
        images = {name: tensors.pop(name) for name in entry.images}
        write_tensors(cache.text_path(entry.text), tensors, {})
        if images:
            write_tensors(cache.images_path(entry.key), images, {})
    cache.write_index([entry for entry, *_ in samples])
    return cache


def taken_over(folder, variant, short, made, mask):
    """Our cache of what the independent writer wrote: one image or clip, with a mask."""
    arch, theirs = model(variant), folder / "theirs"
    made.write(theirs, short)
    source = MusubiCache(theirs, arch)
    (entry,) = source.entries()
    record = source.conditioning(entry, arch.conditioning)
    ours = replace(entry, key="sub/a@flip", text=text_name(entry.caption), mask=None if mask is None else "folder")
    return arch, our_cache(folder / "ours", arch, [(ours, source.latents(entry), mask, record)])


def image_to_video(made):
    """What differs in files of ours: CLIP's features are float16 by name too."""
    return {"clip_float16" if key == "clip_bfloat16" else key: tensor for key, tensor in made.latents.items()}


CASES = [
    # variant, short name, files, name of the latents file, key of the mask
    ("WAN 2.1 T2V", "wan", fixtures.wan(), "_00000-005", "2x4x6"),
    ("WAN 2.1 T2V", "wan", fixtures.wan(f=1), "", "1x4x6"),
    ("WAN 2.1 I2V", "wan", fixtures.wan(clip=24), "_00000-005", "2x4x6"),
    ("WAN 2.2 A14B I2V both", "wan", fixtures.wan(image=True), "_00000-005", "2x4x6"),
    ("HunyuanVideo T2V", "hv", fixtures.hv(f=3), "_00000-009", "3x4x6"),
    ("HunyuanVideo 1.5 T2V", "hv15", fixtures.hv15(glyphs=0), "_00000-005", "2x4x6"),
    ("HunyuanVideo 1.5 I2V", "hv15", fixtures.hv15(siglip=20), "_00000-005", "2x4x6"),
    ("FLUX.2 dev", "f2d", fixtures.flux2(controls=[(4, 4), (2, 6)]), "", "4x6"),
    ("Qwen-Image", "qi", fixtures.qwen(), "", "1x4x6"),
    ("Qwen-Image-Edit 2509", "qie", fixtures.qwen(controls=[(4, 4), (2, 6)]), "", "1x4x6"),
    ("Qwen-Image-Layered", "qil", fixtures.qwen(f=3), "", "3x4x6"),
    ("Z-Image", "zi", fixtures.z_image(), "", "1x4x6"),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]} {number}" for number, case in enumerate(CASES)])
def test_what_was_read_is_written_as_it_was(case, tmp_path):
    variant, short, made, clip, cells = case
    frames, rows, columns = (1, *map(int, cells.split("x")))[-3:]
    mask = fixtures.mask_values((1, frames, rows, columns)).float()  # representable in half precision
    arch, cache = taken_over(tmp_path, variant, short, made, mask)
    summary = export_musubi(cache, arch, tmp_path / "out")
    latents, text = tmp_path / "out" / f"sub%2Fa@flip{clip}_0640x0480_{short}.safetensors", None
    text = tmp_path / "out" / f"sub%2Fa@flip_{short}_te.safetensors"
    assert sorted(tmp_path.glob("out/*")) == sorted([latents, text])
    assert (summary.folders, summary.short, summary.masks, summary.notes) == ({tmp_path / "out": 1}, short, 1, ())

    written = load_file(latents)
    assert torch.equal(written.pop(f"mask_weights_{cells}_float16"), mask.half())
    wanted = image_to_video(made)
    assert written.keys() == wanted.keys()
    for key, tensor in written.items():
        assert tensor.dtype == wanted[key].dtype, key
        if tensor.dtype == torch.float32:  # to our normalisation and back rounds
            assert torch.allclose(tensor, wanted[key], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, wanted[key]), key

    wanted = dict(made.text)
    if short == "hv":
        assert wanted.pop("clipL_mask") is not None  # nothing trains with it
        wanted["llm_float16"][5:] = 0  # padding, which the mask hides
    written = load_file(text)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) and written[key].dtype == wanted[key].dtype for key in written)

    said = {"architecture": fixtures.FULL[short], "format_version": "1.0.1"}
    assert metadata(text) == {**said, "caption1": "an image of a"}
    counted = {"frame_count": str(int(clip[-3:]))} if clip else {}
    plain = {"cache_mask_gamma": "1", "cache_mask_min_weight": "0"}
    assert metadata(latents) == {**said, "width": "640", "height": "480", **counted, **plain}

    back = MusubiCache(tmp_path / "out", arch)
    (entry,), (before,) = back.entries(), cache.entries()
    assert (entry.shape, entry.images, entry.caption) == (before.shape, before.images, before.caption)
    assert torch.allclose(back.latents(entry), cache.latents(before), rtol=1e-6, atol=1e-6)
    assert torch.equal(back.mask(entry), mask)
    record, old = (c.conditioning(e, arch.conditioning).tensors() for c, e in ((back, entry), (cache, before)))
    assert record.keys() == old.keys()
    assert all(torch.equal(record[name], old[name]) for name in record)


def test_a_prepared_cache_keeps_its_values_to_the_dtype_that_is_written(prepared, pipeline, tmp_path):
    arch = helpers.architecture(pipeline)
    cache = Cache(prepared)
    summary = export_musubi(cache, arch, tmp_path)
    back = MusubiCache(tmp_path, arch)
    pairs = list(zip(cache.entries(), back.entries(), strict=True))
    assert [entry.key.split("_")[0] for _, entry in pairs] == [entry.key for entry, _ in pairs]
    sizes = {
        entry.key: json.loads(metadata(cache.latents_path(entry.key))["made_from"])["geometry"] for entry, _ in pairs
    }
    for before, after in pairs:
        width, height = sizes[before.key][:2]
        assert after.key == f"{before.key}_{width:04d}x{height:04d}_wan"
        assert (after.shape, after.caption, after.mask is None) == (before.shape, before.caption, before.mask is None)
        assert torch.equal(back.latents(after), cache.latents(before).bfloat16().float())
        assert torch.equal(back.mask(after), cache.mask(before).half().float())
        text, old = (c.conditioning(e, arch.conditioning).text for c, e in ((back, after), (cache, before)))
        assert torch.equal(text, old)
    assert summary.lines() == [f"{tmp_path}: 8 samples of the architecture wan", "masks: 6 of 8"]
    written = sorted(path.name for path in tmp_path.iterdir())
    export_musubi(cache, arch, tmp_path)  # again: in their place
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def four(tmp_path, **more):
    """A cache with an image and a clip, both for training and for validation."""
    arch, samples = model("WAN 2.1 T2V"), []
    made = fixtures.wan()
    for split, prefix in (("train", ""), ("val", "@val/")):
        for key, frames in (("picture", 1), ("clip", 2)):
            entry = Entry(f"{prefix}{key}", split, (16, frames, 4, 6), text_name("x"), "x", None, **more)
            record = arch.conditioning(text=made.text["varlen_t5_bfloat16"])
            samples.append((entry, torch.randn(16, frames, 4, 6), None, record))
    return arch, our_cache(tmp_path / "ours", arch, samples)


def test_images_clips_and_validation_go_into_folders_of_their_own(tmp_path):
    arch, cache = four(tmp_path)
    summary = export_musubi(cache, arch, tmp_path / "out")
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors"))
    assert found == [
        "images/picture_0640x0480_wan.safetensors",
        "images/picture_wan_te.safetensors",
        "val/images/@val%2Fpicture_0640x0480_wan.safetensors",
        "val/images/@val%2Fpicture_wan_te.safetensors",
        "val/videos/@val%2Fclip_00000-005_0640x0480_wan.safetensors",
        "val/videos/@val%2Fclip_wan_te.safetensors",
        "videos/clip_00000-005_0640x0480_wan.safetensors",
        "videos/clip_wan_te.safetensors",
    ]
    assert set(summary.folders.values()) == {1}


def test_what_the_files_cannot_hold_is_said(tmp_path):
    arch, cache = four(tmp_path, repeats=3, variants=("y",))
    repeated, varied = export_musubi(cache, arch, tmp_path / "out").notes
    assert repeated.startswith("4 samples repeat, which the files do not say: set num_repeats")
    assert varied == "4 samples have several captions, of which the files hold the first"


def test_no_two_keys_make_one_name(tmp_path):
    arch, made = model("WAN 2.1 T2V"), fixtures.wan(f=1)
    keys = ["a/b", "a%2Fb", "a_b", "a:b", "a\\b", "a b", "a.b", 'a"b', "a?b", "日本"]
    record = arch.conditioning(text=made.text["varlen_t5_bfloat16"])
    samples = [
        (
            Entry(key, "train", (16, 1, 4, 6), text_name("x"), "x", None),
            torch.full((16, 1, 4, 6), float(n)),
            None,
            record,
        )
        for n, key in enumerate(keys)
    ]
    export_musubi(our_cache(tmp_path / "ours", arch, samples), arch, tmp_path / "out")
    back = MusubiCache(tmp_path / "out", arch)
    assert sorted(float(back.latents(entry).mean()) for entry in back.entries()) == list(range(len(keys)))
    assert all(not set(path.name) & set('/\\:*?"<>|') for path in (tmp_path / "out").iterdir())


# ---------------------------------------------------------------- bad input


def test_families_that_are_not_written_are_refused(prepared, tmp_path):
    for name, theirs in (("LTX-2", "has none"), ("Kandinsky 5 T2V Lite", r"has caches \(k5\)")):
        with pytest.raises(ValueError, match=f"export=musubi do not know .*, of which musubi-tuner {theirs}"):
            export_musubi(Cache(prepared), model(name), tmp_path)


def test_a_cache_of_another_model_is_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="was made with another family"):
        export_musubi(Cache(prepared), model("Qwen-Image"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_klein_is_told_by_its_text(tmp_path):
    arch, cache = taken_over(tmp_path, "FLUX.2 klein", "f2k9b", fixtures.flux2(tokens=112), None)
    with pytest.raises(
        ValueError, match=r"text is 48 wide, .* flux2_klein with 7680 \(f2k4b\) or 12288 \(f2k9b\); pre"
    ):
        export_musubi(cache, arch, tmp_path / "out")
    for short, width in (("f2k4b", 7680), ("f2k9b", 12288)):
        path = tmp_path / short
        arch, cache = taken_over(path, "FLUX.2 klein", short, fixtures.flux2(tokens=112, dim=width), None)
        assert export_musubi(cache, arch, path / "out").short == short


def test_a_folder_with_samples_of_others_is_refused(prepared, pipeline, tmp_path):
    fixtures.wan(f=1).write(tmp_path, "wan", "stale")
    with pytest.raises(ValueError, match="stale_0640x0480_wan.safetensors is there already and is no sample of this"):
        export_musubi(Cache(prepared), helpers.architecture(pipeline), tmp_path)
    fixtures.qwen().write(tmp_path / "other", "qi")  # another architecture disturbs nobody
    assert export_musubi(Cache(prepared), helpers.architecture(pipeline), tmp_path / "other").masks == 6


def test_damaged_and_empty_caches_are_named(prepared, pipeline, tmp_path):
    arch = helpers.architecture(pipeline)
    shutil.copytree(prepared, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    path = cache.latents_path(cache.entries()[3].key)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged"):
        export_musubi(cache, arch, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cache.write_index([])
    with pytest.raises(ValueError, match="has no samples"):
        export_musubi(cache, arch, tmp_path / "out")


def test_a_text_longer_than_musubi_takes_names_the_sample(tmp_path):
    arch = model("HunyuanVideo T2V")
    record = arch.conditioning(text=torch.randn(257, 32), pooled=torch.randn(24))
    entry = Entry("long", "train", (16, 1, 4, 6), text_name("x"), "x", None)
    cache = our_cache(tmp_path / "ours", arch, [(entry, torch.randn(16, 1, 4, 6), None, record)])
    with pytest.raises(ValueError, match="long has 257 tokens of text, musubi-tuner takes at most 256"):
        export_musubi(cache, arch, tmp_path / "out")


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    arch, made = model("WAN 2.1 T2V"), fixtures.wan(f=1)
    key = "/".join(["x" * 100] * 3)
    record = arch.conditioning(text=made.text["varlen_t5_bfloat16"])
    samples = [(Entry(key, "train", (16, 1, 4, 6), text_name("x"), "x", None), torch.randn(16, 1, 4, 6), None, record)]
    with pytest.raises(ValueError, match="makes a file name of more than 255 bytes"):
        export_musubi(our_cache(tmp_path / "ours", arch, samples), arch, tmp_path / "out")
