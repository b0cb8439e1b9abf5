import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpp.cache.format import Cache, CacheIdentity, Notes, write_tensors
from mpp.models.contract import Identity, LatentSpec
from mpp.models.families.wan import WanConditioning
from mpp.sources.captions import CaptionVariants
from mpp.sources.source import FolderSource
from tests import helpers

OLD = Path(__file__).parents[1] / "fixtures" / "v0"


@pytest.fixture
def cache(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "cache")
    return Cache(tmp_path / "cache")


def first(cache):
    return next(entry for entry in cache.entries() if entry.mask is not None)


def test_a_missing_cache_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no cache at .*; make one with `python -m mpp.prepare"):
        Cache(tmp_path / "none").identity()


def test_another_format_version_is_refused(cache):
    path = cache.folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="format version 99, this mpp reads 3"):
        cache.identity()


@pytest.mark.parametrize(
    ("family", "latents", "identity", "what"),
    [
        ("flux2", None, Identity(None, None, None), "family"),
        ("wan", LatentSpec(48, 16, 4, (1, 2, 2)), Identity(None, None, None), "latents"),
        ("wan", None, Identity(None, "other", None), "vae"),
        ("wan", None, Identity(None, None, "other"), "text_encoder"),
    ],
)
def test_a_cache_of_another_model_is_refused(cache, family, latents, identity, what):
    cached = cache.identity()
    with pytest.raises(ValueError, match=f"was made with another {what}"):
        cached.check(
            CacheIdentity(family, latents or cached.latents, identity.vae, identity.text_encoder), cache.folder
        )


def test_encoders_that_are_not_at_hand_are_reported_as_not_compared(cache):
    identity = cache.identity()
    assert identity.check(replace(identity, vae=None, text_encoder=None), cache.folder) == ["vae", "text_encoder"]
    assert identity.check(identity, cache.folder) == []


def test_a_cache_made_with_another_setting_is_refused(cache, pipeline):
    identity = cache.identity()
    assert identity.settings == {"text_length": 64}
    other = CacheIdentity.of(helpers.architecture(pipeline, "model.text_length=32"), Identity(None, None, None))
    with pytest.raises(ValueError, match=r"another settings .*'text_length': 64.*'text_length': 32"):
        identity.check(other, cache.folder)


@pytest.mark.parametrize("kind", ["latents", "mask", "text"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damaged_files_are_named(cache, kind, damage):
    entry = first(cache)
    paths = {
        "latents": cache.latents_path(entry.key),
        "mask": cache.mask_path(entry.key),
        "text": cache.text_path(entry.text),
    }
    path = paths[kind]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * 200)
    state = "missing" if damage == "gone" else "damaged or cut short"
    with pytest.raises(ValueError, match=rf"{path.name} is {state}; run `python -m mpp.prepare` again"):
        cache.check_files(entry)


def test_mask_and_latents_that_disagree_are_refused_with_both_shapes(cache):
    entry = first(cache)
    write_tensors(cache.mask_path(entry.key), {"mask": torch.ones(1, 1, 3, 3)}, {})
    for action in (cache.check_files, cache.mask):
        with pytest.raises(
            ValueError, match=r"mask is \(1, 1, 3, 3\), the sample's latents call for \(1, 1, \d+, \d+\)"
        ):
            action(entry)


def test_values_that_are_not_finite_are_named_with_sample_and_file_when_read(cache, tmp_path):
    draws = random.Random(17)
    entries = [entry for entry in cache.entries() if entry.mask is not None]
    images = {"image": torch.rand(3, 8), "condition": torch.rand(20, 1, 8, 8)}
    for _ in range(30):
        entry = draws.choice(entries)
        entry = replace(entry, images={name: tuple(tensor.shape) for name, tensor in images.items()})
        write_tensors(cache.images_path(entry.key), images, {})
        read = [
            (cache.latents_path(entry.key), "latents hold", cache.latents),
            (cache.mask_path(entry.key), "mask holds", cache.mask),
            (cache.text_path(entry.text), "text embeddings hold", lambda e: cache.conditioning(e, WanConditioning)),
            (
                cache.images_path(entry.key),
                "image conditioning holds",
                lambda e: cache.conditioning(e, WanConditioning),
            ),
        ]
        for _, _, action in read:
            action(entry)
        path, what, action = draws.choice(read)
        content, tensors = path.read_bytes(), load_file(path)
        tensor = tensors[draws.choice(sorted(tensors))]
        tensor.view(-1)[draws.randrange(tensor.numel())] = draws.choice([math.nan, math.inf, -math.inf])
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"{entry.key}: its {what} NaN or infinity") as caught:
            action(entry)
        assert str(path) in str(caught.value)
        assert "delete the file and run `python -m mpp.prepare` again" in str(caught.value)
        path.write_bytes(content)


def test_values_that_are_not_finite_are_never_written(tmp_path):
    draws, path = random.Random(18), tmp_path / "x.safetensors"
    for _ in range(20):
        dtype = draws.choice([torch.float32, torch.bfloat16, torch.float16])
        tensors = {f"{n}": torch.rand(draws.randint(1, 9), 4).to(dtype) for n in range(draws.randint(1, 3))}
        tensors["mask"] = torch.ones(3, dtype=torch.bool)
        write_tensors(path, tensors, {})
        before = path.read_bytes()
        wrong = tensors[draws.choice(sorted(tensors.keys() - {"mask"}))]
        wrong.view(-1)[draws.randrange(wrong.numel())] = draws.choice([math.nan, math.inf, -math.inf])
        with pytest.raises(ValueError, match=r"NaN or infinity is not written into .*x\.safetensors"):
            write_tensors(path, tensors, {})
        assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{not json", "[1]", '{"key": "x"}'])
def test_a_damaged_index_is_named(cache, line):
    (cache.folder / "index.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"index\.jsonl is damaged"):
        cache.entries()


def test_text_of_another_family_is_refused(cache):
    entry = first(cache)
    write_tensors(cache.text_path(entry.text), {"pooled": torch.ones(3)}, {})
    with pytest.raises(ValueError, match="not this model's conditioning .holds \\['pooled'\\], wanted are"):
        cache.conditioning(entry, WanConditioning)


def test_tensors_survive_writing_exactly(tmp_path):
    tensor = torch.randn(3, 4).t()
    write_tensors(tmp_path / "x.safetensors", {"x": tensor}, {"source": "y"})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


# ---------------------------------------------------------------- notes


@pytest.mark.parametrize("seed", range(20))
def test_notes_know_the_trigger_words_of_all_datasets(tmp_path, seed):
    draw = random.Random(seed)
    words = [draw.choice([None, "zarp", "sks  dog", "ohwx"]) for _ in range(draw.randint(1, 4))]
    own = draw.choice([None, "zarp", "qux"])
    settings = {"image_dir": "photos"} if draw.random() < 0.5 else {}
    if not settings:  # a dataset that says no trigger has that of all
        settings["datasets"] = {
            f"d{n}": {"image_dir": f"p{n}", **({"caption_variants": {"trigger": word}} if word else {})}
            for n, word in enumerate(words)
        }
    source = FolderSource(cache_dir=str(tmp_path), caption_variants=CaptionVariants(trigger=own), **settings)
    cache = Cache(tmp_path)
    cache.write_notes(Notes(source.sources_record()))
    given = [word or own for word in words] if "datasets" in settings else [own]
    assert cache.notes().triggers == list(dict.fromkeys(word.replace("  ", " ") for word in given if word))


def test_notes_of_earlier_versions_know_them_as_well_and_empty_ones_none():
    assert Notes().triggers == []
    assert Cache(OLD / "cache").notes().triggers == []
    sources = Cache(OLD / "cache").notes().sources
    assert Notes({**sources, "caption_variants": {**sources["caption_variants"], "trigger": "zarp"}}).triggers == [
        "zarp"
    ]
