"""Caches of musubi-tuner and blissful-tuner, as an independent writer makes them, read for every architecture."""

import functools
import json
import pickle
from dataclasses import dataclass, field

import pytest
import torch

from mpp.batching.batch import Collate, read_sample
from mpp.core.loss import MaskedPriorLoss
from mpp.musubi.cache import MusubiCache, baked_advice
from tests.families import variants
from tests.families.base import architecture
from tests.musubi import stored as fixtures

VARIANTS = {variant.name: variant for variant in variants()}


@functools.cache
def model(name):
    """A variant's architecture; no weights are there."""
    return architecture(VARIANTS[name], "nowhere")


@dataclass(frozen=True)
class Case:
    """What a variant reads: the short name, the files, and numbers that turn stored latents into ours."""

    variant: str
    short: str
    made: fixtures.Made
    text: dict[str, str]
    shift: float = 0.0
    scale: float = 1.0
    images: dict[str, object] = field(default_factory=dict)  # field of the record: key, or from the latents' tensors


def only(tensors, start):
    """The one tensor whose key begins so."""
    (found,) = [tensor for key, tensor in tensors.items() if key.startswith(start)]
    return found


T5, VL = {"text": "varlen_t5_"}, {"text": "varlen_vl_embed_"}
GLYPHS = {**VL, "glyphs": "varlen_byt5_embed_"}
FIRST = {
    # explicit numbers: the VAE's scale, 32 channels, the first of the frames
    "image_latents": lambda raw: only(raw, "latents_image_")[:32, :1] * 1.03682,
    "image_embeds": lambda raw: raw["siglip_float16"],
}
CONDITION = {"condition": lambda raw: only(raw, "latents_image_").float()}
WITH_CLIP = {**CONDITION, "image": lambda raw: raw["clip_bfloat16"].float()}
CONTROLS = {f"controls.{n}": lambda raw, n=n: only(raw, f"latents_control_{n}_").float() for n in range(2)}
BASE = {"condition": lambda raw: only(raw, "latents_3x")[:, :1].float()}
ONE = {"controls.0": CONTROLS["controls.0"]}
CASES = [
    Case("WAN 2.1 T2V", "wan", fixtures.wan(), T5),
    Case("WAN 2.1 T2V", "wan", fixtures.wan(f=1), T5),
    Case("WAN 2.1 T2V", "wan", fixtures.wan(clip=24), T5),  # of image to video: the rest is not looked at
    Case("WAN 2.1 I2V", "wan", fixtures.wan(clip=24), T5, images=WITH_CLIP),
    Case("WAN 2.2 A14B T2V both", "wan", fixtures.wan(), T5),
    Case("WAN 2.2 A14B I2V both", "wan", fixtures.wan(image=True), T5, images=CONDITION),
    Case("WAN 2.2 A14B I2V low", "wan", fixtures.wan(clip=24), T5, images=CONDITION),
    Case("HunyuanVideo T2V", "hv", fixtures.hv(), {"pooled": "clipL_float16"}, scale=0.476986),
    Case("HunyuanVideo 1.5 T2V", "hv15", fixtures.hv15(), GLYPHS, scale=1.03682),
    Case("HunyuanVideo 1.5 T2V", "hv15", fixtures.hv15(f=1, glyphs=0), GLYPHS, scale=1.03682),
    Case("HunyuanVideo 1.5 I2V", "hv15", fixtures.hv15(siglip=20), GLYPHS, scale=1.03682, images=FIRST),
    Case("HunyuanVideo 1.5 I2V", "hv15", fixtures.hv15(f=1), GLYPHS, scale=1.03682),  # stills are text to video
    Case("FLUX.2 dev", "f2d", fixtures.flux2(), {"text": "ctx_vec_"}),
    Case("FLUX.2 dev", "f2d", fixtures.flux2(controls=[(4, 4), (2, 6)]), {"text": "ctx_vec_"}, images=CONTROLS),
    Case("FLUX.2 klein", "f2k4b", fixtures.flux2(tokens=112), {"text": "ctx_vec_"}),
    Case("FLUX.2 klein", "f2k9b", fixtures.flux2(tokens=112, controls=[(4, 4)]), {"text": "ctx_vec_"}, images=ONE),
    Case("Qwen-Image", "qi", fixtures.qwen(), VL),
    Case("Qwen-Image-Edit", "qie", fixtures.qwen(controls=[(4, 4)]), VL, images=ONE),
    Case("Qwen-Image-Edit 2509", "qie", fixtures.qwen(controls=[(4, 4), (2, 6)]), VL, images=CONTROLS),
    Case("Qwen-Image-Edit 2511", "qie", fixtures.qwen(controls=[(4, 4)]), VL, images=ONE),
    Case("Qwen-Image-Layered", "qil", fixtures.qwen(f=3), VL, images=BASE),
    Case("Qwen-Image-Layered", "qil", fixtures.qwen(f=3, controls=[(4, 6)]), VL, images=BASE),  # older: base again
    Case("Qwen-Image-Layered without base frame", "qil", fixtures.qwen(f=3), VL, images=BASE),
    Case("Z-Image", "zi", fixtures.z_image(), {"text": "varlen_llm_embed_"}, shift=0.1159, scale=0.3611),
]
IDS = [f"{case.variant} {number}" for number, case in enumerate(CASES)]


def one_entry(cache):
    (entry,) = cache.entries()
    return entry


def first_latents(case):
    return next(iter(case.made.latents.values()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_architecture_is_read_as_it_was_written(case, tmp_path):
    path = case.made.write(tmp_path, case.short)
    cache = MusubiCache(tmp_path, model(case.variant))
    entry = one_entry(cache)
    raw = first_latents(case).float()
    expected = (raw[:, None] if raw.ndim == 3 else raw).sub(case.shift).mul(case.scale)
    assert (entry.key, entry.shape, entry.mask) == (path.stem, tuple(expected.shape), None)
    assert (entry.caption, entry.split, entry.source) == ("an image of a", "train", "")
    latents = cache.latents(entry)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)
    assert torch.equal(cache.mask(entry), torch.ones(1, *expected.shape[1:]))
    fields = {name: only(case.made.text, start) for name, start in case.text.items()}
    fields |= {name: made(case.made.latents) for name, made in case.images.items()}
    if case.short == "hv":
        fields["text"] = case.made.text["llm_float16"][:5]  # five of its 256 tokens are real
    found = cache.conditioning(entry, model(case.variant).conditioning).tensors()
    assert found.keys() == fields.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, fields[name]), name
        assert tensor.dtype == fields[name].dtype, name
    shapes = {name: tuple(fields[name].shape) for name in case.images}
    assert entry.images == shapes
    cache.check_files(entry)


TRAINED = [case for number, case in enumerate(CASES) if number in (0, 3, 5, 7, 10, 13, 15, 18, 22, 23)]


@pytest.mark.parametrize("case", TRAINED, ids=[f"{case.variant} {number}" for number, case in enumerate(TRAINED)])
def test_what_is_read_trains(case, built, tmp_path):
    for item in ("a", "b"):
        case.made.write(tmp_path / "cache", case.short, item)
    variant = VARIANTS[case.variant]
    arch = architecture(variant, built(variant))
    cache = MusubiCache(tmp_path / "cache", arch)
    cache.identity().check(cache.identity(), cache.folder)
    entries = cache.entries()
    assert len({entry.signature(arch.given_frames) for entry in entries}) == 1
    samples = [read_sample(cache, entry, arch) for entry in entries]
    batch = Collate(arch)(samples)
    transformer = arch.load_transformer()
    with torch.no_grad():
        velocity = arch.velocity(transformer, batch.latents, torch.tensor([0.3, 0.8]), batch.conditioning)
    assert velocity.shape == batch.latents.shape
    assert torch.isfinite(velocity).all()


def test_a_cache_without_fingerprints_says_that_they_were_not_compared(tmp_path, pipeline):
    from mpp.cache.format import CacheIdentity
    from tests.helpers import architecture as tiny

    fixtures.wan().write(tmp_path, "wan")
    arch = tiny(pipeline)
    cache = MusubiCache(tmp_path, arch)
    assert cache.identity().check(CacheIdentity.of(arch, arch.identity()), tmp_path) == ["vae", "text_encoder"]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_eight_bits_are_read_exactly(kind, tmp_path):
    """fp8 text encoders may leave them."""
    small = fixtures.values((5, 24), torch.float32).to(getattr(torch, kind))
    fixtures.Made(fixtures.z_image().latents, {f"varlen_llm_embed_{kind}": small}).write(tmp_path, "zi")
    arch = model("Z-Image")
    cache = MusubiCache(tmp_path, arch)
    text = cache.conditioning(one_entry(cache), arch.conditioning).text
    assert text.dtype == torch.bfloat16
    assert torch.equal(text.float(), small.float())


# ---------------------------------------------------------------- videos, masks


def test_clips_of_a_video_share_its_text(tmp_path):
    arch = model("WAN 2.1 T2V")
    made = fixtures.wan()
    for start in (0, 40):
        fixtures.latents_file(tmp_path, "wan", "my_name", made.latents, size=(1280, 720), window=(start, 5))
    fixtures.text_file(tmp_path, "wan", "my_name", made.text, caption="running")
    entries = list(MusubiCache(tmp_path, arch).entries())
    assert [entry.key for entry in entries] == ["my_name_00000-005_1280x0720_wan", "my_name_00040-005_1280x0720_wan"]
    assert {(entry.text, entry.caption, entry.source) for entry in entries} == {
        ("my_name_wan_te", "running", "my_name")
    }


def test_an_image_that_is_called_like_a_clip_has_its_own_text(tmp_path):
    made = fixtures.wan(f=1)
    fixtures.latents_file(tmp_path, "wan", "x_00000-001", made.latents)
    fixtures.text_file(tmp_path, "wan", "x", made.text, caption="the video's")
    fixtures.text_file(tmp_path, "wan", "x_00000-001", made.text, caption="its own")
    entry = one_entry(MusubiCache(tmp_path, model("WAN 2.1 T2V")))
    assert (entry.caption, entry.source) == ("its own", "")


MASKS = [
    # blissful-tuner: key, shape
    ("WAN 2.1 T2V", "wan", fixtures.wan(), "mask_weights_2x4x6_float16", (1, 2, 4, 6)),
    ("WAN 2.1 T2V", "wan", fixtures.wan(), "mask_weights_2x4x6_float32", (1, 2, 4, 6)),
    ("WAN 2.1 T2V", "wan", fixtures.wan(), "mask_weights_2x4x6_bfloat16", (1, 2, 4, 6)),
    ("HunyuanVideo T2V", "hv", fixtures.hv(), "mask_weights_2x4x6_float16", (1, 2, 4, 6)),
    ("FLUX.2 dev", "f2d", fixtures.flux2(), "mask_weights_4x6_float16", (1, 1, 4, 6)),
    ("FLUX.2 dev", "f2d", fixtures.flux2(), "mask_weights_1x4x6_float32", (1, 1, 4, 6)),
    ("Qwen-Image", "qi", fixtures.qwen(), "mask_weights_1x4x6_float16", (1, 1, 4, 6)),
    ("Qwen-Image", "qi", fixtures.qwen(), "mask_weights_1x4x6_float32", (1, 4, 6)),
    ("Qwen-Image-Layered", "qil", fixtures.qwen(f=3), "mask_weights_3x4x6_float16", (1, 3, 4, 6)),
    ("Z-Image", "zi", fixtures.z_image(), "mask_weights_1x4x6_float16", (1, 1, 4, 6)),
    ("Z-Image", "zi", fixtures.z_image(), "mask_weights_4x6_float32", (4, 6)),
]


@pytest.mark.parametrize(("variant", "short", "made", "key", "shape"), MASKS)
def test_masks_of_any_dtype_and_both_kinds_of_sizes_are_read(variant, short, made, key, shape, tmp_path):
    mask = fixtures.mask_values(shape, getattr(torch, key.rsplit("_", 1)[1]))
    fixtures.latents_file(tmp_path, short, "a", {**made.latents, key: mask}, baked=(1.0, 0.0))
    fixtures.latents_file(tmp_path, short, "b", made.latents)
    for item in "ab":
        fixtures.text_file(tmp_path, short, item, made.text)
    cache = MusubiCache(tmp_path, model(variant))
    masked, bare = cache.entries()
    found = cache.mask(masked)
    assert found.dtype == torch.float32
    assert torch.equal(found.flatten(), mask.float().flatten())
    assert found.shape == (1, *masked.shape[1:])
    assert (masked.mask, bare.mask) == ("cache", None)
    assert cache.mask(bare).min() == 1
    assert cache.baked == {(1.0, 0.0): 1}


def test_masks_that_rounding_takes_over_one_are_cut(tmp_path):
    mask = fixtures.mask_values((1, 2, 4, 6), torch.float32)
    mask[0, 0, 0, 0], mask[0, 0, 0, 1] = 1.0002, -0.0001
    write_masked(tmp_path, mask=mask)
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    found = cache.mask(one_entry(cache))
    assert (found.max(), found.min()) == (1, 0)


def write_masked(folder, item="a", mask=None, **more):
    made = fixtures.wan()
    mask = fixtures.mask_values((1, 2, 4, 6)) if mask is None else mask
    key = f"mask_weights_2x4x6_{str(mask.dtype).removeprefix('torch.')}"
    path = fixtures.latents_file(folder, "wan", item, {**made.latents, key: mask}, **more)
    fixtures.text_file(folder, "wan", item, made.text)
    return path


# ---------------------------------------------------------------- gamma and floor that masks have already


def advice(folder, **loss):
    cache = MusubiCache(folder, model("WAN 2.1 T2V"))
    cache.entries()
    return cache.advice(MaskedPriorLoss(**loss))


def test_a_gamma_applied_twice_is_said_with_both(tmp_path):
    write_masked(tmp_path, baked=(0.5, 0.0))
    (line,) = advice(tmp_path, mask_gamma=0.7)
    assert line == (
        "masks were cached with gamma 0.5, and loss.mask_gamma=0.7 applies a second one, 0.35 in all; set "
        "loss.mask_gamma=1"
    )
    assert advice(tmp_path, mask_gamma=1.0) == []


@pytest.mark.parametrize(
    ("floor", "loss", "said"),
    [
        (0.1, {}, None),
        (0.0, {"prior_weight": 1.0, "prior_threshold": 0.1, "mask_min_weight": 0.2}, None),
        (0.1, {"mask_min_weight": 0.05}, "applies a second one; set loss.mask_min_weight=0"),
        (0.25, {"prior_weight": 1.0}, "the prior has only 0.75 of its weight"),
        (
            0.1,
            {"prior_weight": 1.0, "prior_threshold": 0.1},
            "below loss.prior_threshold=0.1: the prior region is empty",
        ),
        (0.2, {"prior_weight": 1.0, "prior_threshold": 0.1}, "the prior region is empty; raise the threshold above"),
        (0.05, {"prior_weight": 1.0, "prior_threshold": 0.1}, None),
        (0.2, {"prior_threshold": 0.1}, None),  # without a prior the threshold does nothing
    ],
)
def test_a_floor_in_the_masks_is_said_where_it_matters(floor, loss, said, tmp_path):
    write_masked(tmp_path, baked=(1.0, floor))
    lines = advice(tmp_path, **loss)
    assert len(lines) == (said is not None)
    if said:
        assert said in lines[0]


def test_an_empty_prior_region_is_what_the_loss_finds_too(tmp_path):
    """The witness of the warning: with a floor at the threshold no cell is preserved, below it some are."""
    raw = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) ** 4
    loss = MaskedPriorLoss(prior_weight=1.0, prior_threshold=0.1)
    for floor in (0.05, 0.1, 0.3):
        empty = not loss.weights(raw * (1 - floor) + floor).needs_prior().any()
        assert empty == any("region is empty" in line for line in baked_advice({(1.0, floor): 1}, loss))


def test_masks_cached_in_different_ways_are_said(tmp_path):
    write_masked(tmp_path, "a", baked=(0.5, 0.0))
    write_masked(tmp_path, "b", baked=(1.0, 0.1))
    write_masked(tmp_path, "c")  # musubi-tuner states neither
    (line,) = advice(tmp_path)
    assert line.startswith(
        "masks were cached in different ways: gamma 0.5 and floor 0 (1 samples), gamma 1 and floor 0 (1"
    )


def test_gamma_and_floor_of_files_without_masks_do_not_count(tmp_path):
    made = fixtures.wan()
    fixtures.latents_file(tmp_path, "wan", "a", made.latents, baked=(0.5, 0.2))
    fixtures.text_file(tmp_path, "wan", "a", made.text)
    assert advice(tmp_path, mask_gamma=0.7, prior_weight=1.0) == []


# ---------------------------------------------------------------- bad input


def refused(folder, match, variant="WAN 2.1 T2V", read=False):
    with pytest.raises(ValueError, match=match):
        cache = MusubiCache(folder, model(variant))
        entries = cache.entries()
        assert read, "the headers alone say it"
        for entry in entries:
            cache.latents(entry), cache.mask(entry), cache.conditioning(entry, model(variant).conditioning)


def test_families_that_are_not_read_are_refused_with_the_way(tmp_path):
    for name in ("LTX-2", "WAN 2.2 TI2V-5B T2V", "HunyuanVideo I2V concat", "FLUX.1 dev"):
        with pytest.raises(ValueError, match=r"know \w+, of which musubi-tuner has none; .* `python -m mpp.prepare`"):
            MusubiCache(tmp_path, model(name))
    # ARCHITECTURE_FLUX_KONTEXT and ARCHITECTURE_KANDINSKY5 of musubi-tuner's dataset/architectures.py
    for name, short in (("FLUX.1 Kontext", "fk"), ("Kandinsky 5 T2V Lite", "k5")):
        with pytest.raises(
            ValueError, match=rf"of which musubi-tuner has caches \({short}\); .* `python -m mpp.prepare`"
        ):
            MusubiCache(tmp_path, model(name))


def test_other_architectures_beside_the_wanted_are_left_out_and_said(tmp_path):
    fixtures.wan().write(tmp_path, "wan")
    for item in "ab":
        fixtures.qwen().write(tmp_path, "qi", item)
    fixtures.qwen().write(tmp_path, "new1")
    (tmp_path / "notes.safetensors").write_bytes(b"")
    fixtures.text_file(tmp_path, "wan", "orphan", fixtures.wan().text)
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    assert len(cache.entries()) == 1
    assert [line.removeprefix(f"{tmp_path}: left out ") for line in cache.left_out] == [
        "1 latents files of the architecture new1",
        "2 latents files of the architecture qi",
        "orphan_wan_te: text without latents",
        "notes: not named as files of a cache",
    ]
    assert cache.advice(MaskedPriorLoss()) == list(cache.left_out)


def test_a_folder_without_the_wanted_lists_what_it_holds(tmp_path):
    fixtures.qwen().write(tmp_path, "qi")
    fixtures.qwen().write(tmp_path, "new1")
    held = r"holds no latents of wan, which are called NAME_WIDTHxHEIGHT_wan.safetensors: its latents files are of "
    with pytest.raises(ValueError, match=held + r"new1 \(1\), qi \(1\)"):
        MusubiCache(tmp_path, model("WAN 2.1 T2V")).identity()


def test_empty_missing_and_other_folders_are_said(tmp_path):
    arch = model("WAN 2.1 T2V")
    with pytest.raises(ValueError, match="it has no latents files"):
        MusubiCache(tmp_path, arch).identity()
    with pytest.raises(ValueError, match="no folder"):
        MusubiCache(tmp_path / "none", arch).identity()
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match="is a cache of `python -m mpp.prepare`; choose data.layout=mpp"):
        MusubiCache(tmp_path, arch).identity()


def test_both_sizes_of_klein_in_one_folder_are_refused(tmp_path):
    for short in ("f2k4b", "f2k9b"):
        fixtures.flux2(tokens=112).write(tmp_path, short)
    both = r"f2k4b \(.*_f2k4b.safetensors\) and f2k9b \(.*_f2k9b.safetensors\)"
    refused(tmp_path, rf"holds latents of {both}, different sizes of flux2_klein", "FLUX.2 klein")


def test_a_missing_text_file_names_both_it_could_be(tmp_path):
    fixtures.latents_file(tmp_path, "wan", "a", fixtures.wan().latents)
    refused(tmp_path, r"a_0640x0480_wan.safetensors has no text file a_wan_te.safetensors beside it")
    fixtures.latents_file(tmp_path, "wan", "a", fixtures.wan().latents, window=(0, 5))
    (tmp_path / "a_0640x0480_wan.safetensors").unlink()
    refused(tmp_path, r"no text file a_00000-005_wan_te.safetensors or a_wan_te.safetensors")


def test_two_originals_of_one_item_are_refused(tmp_path):
    fixtures.wan().write(tmp_path, "wan", "a_b", size=(100, 80))
    fixtures.wan().write(tmp_path, "wan", "a", size=(100, 80))
    fixtures.wan().write(tmp_path, "wan", "a", size=(64, 80))
    refused(tmp_path, r"a_0100x0080_wan.safetensors and a_0064x0080_wan.safetensors are latents of one item")


@pytest.mark.parametrize("which", ["latents", "text"])
@pytest.mark.parametrize(("damage", "said"), [("cut", "is damaged or cut short"), ("noise", "is damaged or cut short")])
def test_damaged_files_are_named(which, damage, said, tmp_path):
    path = fixtures.wan().write(tmp_path, "wan")
    path = path if which == "latents" else tmp_path / "a_wan_te.safetensors"
    path.write_bytes(path.read_bytes()[:-4] if damage == "cut" else b"\xff" * 300)
    refused(tmp_path, rf"{path.name} {said}")


def test_a_file_that_is_gone_when_it_is_read_is_named(tmp_path):
    path = fixtures.wan().write(tmp_path, "wan")
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    entry = one_entry(cache)
    path.unlink()
    for look in (cache.latents, cache.check_files):
        with pytest.raises(ValueError, match=rf"{path.name} is missing"):
            look(entry)


def test_a_file_that_changes_under_the_run_is_said(tmp_path):
    fixtures.wan().write(tmp_path, "wan")
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    entry = one_entry(cache)
    fixtures.wan(h=8).write(tmp_path, "wan")
    with pytest.raises(ValueError, match="has changed since this run looked at it"):
        cache.check_files(entry)
    with pytest.raises(ValueError, match=r"holds latents of shape \(16, 2, 8, 6\) and held \(16, 2, 4, 6\)"):
        cache.latents(entry)


WAN = fixtures.wan()
LATENTS = WAN.latents["latents_2x4x6_bfloat16"]
MASK = fixtures.mask_values((1, 2, 4, 6))
BAD_LATENTS = [
    (
        "sizes in the key",
        {"latents_2x4x8_bfloat16": LATENTS},
        {},
        r"holds latents_2x4x8_bfloat16 of shape \(16, 2, 4, 6\)",
    ),
    ("channels", {"latents_2x4x6_bfloat16": LATENTS[:8]}, {}, "this model has 16 channels"),
    ("patches", {"latents_2x3x6_bfloat16": LATENTS[:, :, :3]}, {}, "patches of 1x2x2 cells"),
    ("dtype in the key", {"latents_2x4x6_float16": LATENTS}, {}, "holds latents_2x4x6_float16 as bfloat16"),
    ("axes", {"latents_4x6_bfloat16": LATENTS[:, 0]}, {}, "wanted are 4 axes"),
    ("no latents", {"clip_bfloat16": LATENTS}, {}, "holds no latents"),
    ("integers", {"latents_2x4x6_int32": LATENTS.int()}, {}, "holds latents as torch.int32, wanted are floats"),
    ("twice", {**WAN.latents, "latents_2x4x6_float16": LATENTS.half()}, {}, "holds latents twice"),
    ("unknown", {**WAN.latents, "audio_bfloat16": LATENTS}, {}, "holds audio, which this model knows nothing of"),
    ("one frame training", {**WAN.latents, "f_indices_int32": torch.arange(2)}, {}, "holds f_indices, which"),
    (
        "mask's key",
        {**WAN.latents, "mask_weights_2x6x4_float16": MASK},
        {},
        "has mask_weights_2x6x4_float16 beside latents",
    ),
    (
        "mask's cells",
        {**WAN.latents, "mask_weights_float16": MASK[:, :1]},
        {},
        r"mask of shape \(1, 1, 4, 6\) for",
    ),
    ("mask's dtype", {**WAN.latents, "mask_weights_2x4x6_float32": MASK}, {}, "mask_weights_2x4x6_float32 as float16"),
    (
        "two masks",
        {**WAN.latents, "mask_weights_2x4x6_float16": MASK, "mask_weights_float32": MASK.float()},
        {},
        "twice",
    ),
    ("stated", WAN.latents, {"stated": "qwen_image"}, r"states architecture=qwen_image .* its name says wan \(wan\)"),
    ("version", WAN.latents, {"format_version": "2.0"}, "has format_version=2.0"),
    ("size", WAN.latents, {"width": "64"}, "states width=64 in its metadata, its name says 640"),
    ("frames", WAN.latents, {"window": (0, 5), "frame_count": "9"}, "states frame_count=9"),
    ("gamma", {**WAN.latents, "mask_weights_2x4x6_float16": MASK}, {"cache_mask_gamma": "x"}, "cache_mask_gamma=x"),
    ("gamma 0", {**WAN.latents, "mask_weights_2x4x6_float16": MASK}, {"baked": (0.0, 0.0)}, "cache_mask_gamma=0"),
    ("floor", {**WAN.latents, "mask_weights_2x4x6_float16": MASK}, {"baked": (1.0, 1.0)}, "cache_mask_min_weight=1"),
]


@pytest.mark.parametrize(
    ("tensors", "more", "said"), [row[1:] for row in BAD_LATENTS], ids=[row[0] for row in BAD_LATENTS]
)
def test_latents_files_that_disagree_with_themselves_or_the_model_are_named(tensors, more, said, tmp_path):
    path = fixtures.latents_file(tmp_path, "wan", "a", tensors, **more)
    fixtures.text_file(tmp_path, "wan", "a", WAN.text)
    refused(tmp_path, rf"{path.name} .*{said}")


T = WAN.text["varlen_t5_bfloat16"]
BAD_TEXT = [
    ("no text", {"varlen_vl_embed_bfloat16": T}, {}, "holds vl_embed, which this model knows nothing of"),
    ("axes", {"varlen_t5_bfloat16": T[0]}, {}, r"holds t5 of shape \(32,\), wanted are 2 axes"),
    ("too long", {"varlen_t5_bfloat16": T.repeat(13, 1)}, {}, "holds 65 tokens of t5, this model takes 1 to 64"),
    ("no token", {"varlen_t5_bfloat16": T[:0]}, {}, "holds 0 tokens of t5"),
    ("twice", {"varlen_t5_bfloat16": T, "varlen_t5_float16": T.half()}, {}, "holds t5 twice"),
    ("stated", {"varlen_t5_bfloat16": T}, {"stated": "hunyuan_video"}, "states architecture=hunyuan_video"),
    ("dtype in the key", {"varlen_t5_float16": T}, {}, "holds varlen_t5_float16 as bfloat16"),
    ("integers", {"varlen_t5_int32": T.int()}, {}, "holds t5 as torch.int32"),
]


@pytest.mark.parametrize(("tensors", "more", "said"), [row[1:] for row in BAD_TEXT], ids=[row[0] for row in BAD_TEXT])
def test_text_files_that_are_not_the_models_are_named(tensors, more, said, tmp_path):
    fixtures.latents_file(tmp_path, "wan", "a", WAN.latents)
    path = fixtures.text_file(tmp_path, "wan", "a", tensors, **more)
    refused(tmp_path, rf"{path.name} .*{said}")


def test_text_without_a_caption_in_its_metadata_is_named(tmp_path):
    from safetensors.torch import save_file

    WAN.write(tmp_path, "wan")
    save_file(WAN.text, tmp_path / "a_wan_te.safetensors", metadata={"architecture": "wan"})
    refused(tmp_path, "a_wan_te.safetensors states no caption1")


def test_texts_of_several_widths_are_refused(tmp_path):
    fixtures.wan().write(tmp_path, "wan", "a")
    fixtures.wan(dim=24).write(tmp_path, "wan", "b")
    refused(tmp_path, "b_wan_te.safetensors holds t5 24 wide and a_wan_te.safetensors 32")


def test_images_of_several_encoders_are_refused(tmp_path):
    for item, width in (("a", 20), ("b", 24)):
        fixtures.hv15(siglip=width).write(tmp_path, "hv15", item)
    said = "b_0640x0480_hv15.safetensors holds image_embeds 24 wide and a_0640x0480_hv15.safetensors 20"
    refused(tmp_path, said, "HunyuanVideo 1.5 I2V")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "which", ["latents_2x4x6_bfloat16", "latents_image_2x4x6_bfloat16", "mask", "varlen_t5_bfloat16"]
)
def test_values_that_are_not_finite_are_named(which, value, tmp_path):
    made = fixtures.wan(image=True, clip=24)
    mask = {"mask_weights_2x4x6_float16": MASK.clone()}
    tensor = {**made.latents, **made.text, "mask": mask["mask_weights_2x4x6_float16"]}[which]
    tensor[(0,) * tensor.ndim] = value
    fixtures.latents_file(tmp_path, "wan", "a", {**made.latents, **mask})
    fixtures.text_file(tmp_path, "wan", "a", made.text)
    refused(tmp_path, r"\.safetensors holds NaN or infinity in ", "WAN 2.1 I2V", read=True)


def test_masks_outside_their_range_are_named(tmp_path):
    write_masked(tmp_path, mask=fixtures.mask_values((1, 2, 4, 6)) * 255)
    refused(tmp_path, r"a_0640x0480_wan.safetensors holds a mask from [\d.]+ to 2\d\d.*, wanted is 0 to 1", read=True)


def test_a_text_mask_that_leaves_no_token_is_named(tmp_path):
    fixtures.hv(tokens=0).write(tmp_path, "hv")
    refused(tmp_path, "a_hv_te.safetensors holds llm_mask that leaves no token", "HunyuanVideo T2V", read=True)


def test_a_text_mask_of_another_length_is_named(tmp_path):
    made = fixtures.hv()
    made.text["llm_mask"] = made.text["llm_mask"][:200]
    made.write(tmp_path, "hv")
    refused(tmp_path, "a_hv_te.safetensors holds 256 tokens of llm and a mask of 200", "HunyuanVideo T2V")


@pytest.mark.parametrize("shape", [[0, 2**63], [2**62, 2**62, 0], [0, 2**40, 2**40]])
def test_a_shape_that_cannot_be_is_named(shape, tmp_path):
    """safetensors takes it, as it has no elements."""
    path = WAN.write(tmp_path, "wan")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:start]), "latents_x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    refused(tmp_path, path.name)


@pytest.mark.parametrize(
    ("variant", "short", "made", "said"),
    [
        ("WAN 2.1 I2V", "wan", fixtures.wan(), "holds no latents_image, which this model sees"),
        ("WAN 2.1 I2V", "wan", fixtures.wan(image=True), "holds no clip, which this model sees"),
        ("WAN 2.1 I2V", "wan", fixtures.wan(clip=20), "holds clip 20 wide, model.clip_dim is 24"),
        ("WAN 2.2 A14B I2V both", "wan", fixtures.wan(), "holds no latents_image"),
        ("HunyuanVideo 1.5 I2V", "hv15", fixtures.hv15(), "holds no latents_image"),
        ("FLUX.2 dev", "f2d", fixtures.flux2(tokens=512), "holds 512 tokens of ctx_vec, this model takes 224"),
        (
            "Qwen-Image",
            "qi",
            fixtures.qwen(controls=[(4, 4)]),
            "holds latents_control_0, which this model knows nothing",
        ),
        ("Qwen-Image-Edit", "qie", fixtures.qwen(), "holds 0 control images, this model takes 1;"),
        (
            "Qwen-Image-Edit",
            "qie",
            fixtures.qwen(controls=[(4, 4)] * 2),
            "holds 2 control images, this model takes 1;",
        ),
        ("Qwen-Image-Edit 2509", "qie", fixtures.qwen(controls=[(4, 4)] * 4), "this model takes 1 to 3"),
        ("Z-Image", "zi", fixtures.qwen(), "wanted are 3 axes"),
    ],
)
def test_what_the_model_config_cannot_see_or_do_without_is_refused(variant, short, made, said, tmp_path):
    if short == "zi":
        made = fixtures.Made(made.latents, fixtures.z_image().text)
    made.write(tmp_path, short)
    refused(tmp_path, said, variant)


def test_control_images_are_numbered_without_gaps(tmp_path):
    made = fixtures.qwen(controls=[(4, 4), (4, 4), (2, 6)])
    del made.latents["latents_control_1_1x4x4_bfloat16"]
    made.write(tmp_path, "qie")
    refused(tmp_path, "holds control images 0, 2, wanted are 0, 1", "Qwen-Image-Edit 2509")


def test_other_captions_are_refused_in_words(tmp_path):
    from mpp.batching.preservation import Preservation
    from mpp.cache.format import text_name

    WAN.write(tmp_path, "wan")
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    entries = cache.entries()
    said = "holds each sample's own caption and no other: leave data.caption_dropout at 0"
    with pytest.raises(ValueError, match=said):
        Preservation(rate=0.5, caption="").pool(cache, entries)
    with pytest.raises(ValueError, match=said):
        cache.text_path(text_name(""))


def test_it_reads_on_in_another_process(tmp_path):
    WAN.write(tmp_path, "wan")
    cache = MusubiCache(tmp_path, model("WAN 2.1 T2V"))
    entry = one_entry(cache)
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.latents(entry), cache.latents(entry))
