"""Text encoders in fewer bits or on the CPU, VAEs in tiles, and what decoding takes."""

import os
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from torch import nn
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

import mpp.prepare
import mpp.sample
from mpp.cache.format import Cache, made_from
from mpp.cache.provenance import LatentsProvenance, PromptProvenance
from mpp.memory.bases import dequantise, is_quantised
from mpp.memory.counting import Meter
from mpp.memory.settings import EncoderMemory
from mpp.models.text_encoders import load_quantised
from tests import helpers
from tests.families import variants, wan_first
from tests.families.base import architecture, conditioning, pixels

TEXT = "a red box by the sea"
TILE, STRIDE = 8, 6  # latent cells of a tile, and from one to the next


@pytest.fixture(scope="module", params=wan_first())
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def arch(variant, built):
    return architecture(variant, built(variant))


def text_models(encoders):
    """The text encoders that are loaded, by their folders; LTX-2's connectors behind one are none."""
    names = set(encoders.model.text_components) - {"connectors", "image_encoder"}
    return {name: part for name, part in encoders._loaded.items() if name in names}


def encode(arch, variant, device="cpu", **memory):
    """Encoders with a caption's record, their text encoders loaded."""
    encoders = arch.load_encoders(device, EncoderMemory(**memory))
    return encoders, conditioning(arch, variant, encoders, TEXT).tensors()


# ---------------------------------------------------------------- text encoders


@pytest.mark.parametrize("base", ["fp8", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_text_encoder_is_one_with_the_dequantised_weights(arch, variant, base):
    encoders, found = encode(arch, variant, text_encoder=base)
    plain, before = encode(arch, variant)
    assert text_models(encoders).keys() == text_models(plain).keys() != set()
    for name, model in text_models(encoders).items():
        theirs, exact = text_models(plain)[name], dict(model.named_parameters())
        layers = [
            layer for layer, module in model.named_modules() if isinstance(module, nn.Linear) and is_quantised(module)
        ]
        assert layers
        for layer in layers:
            del exact[f"{layer}.weight"]
            theirs.get_submodule(layer).weight.data = dequantise(model.get_submodule(layer))
        weights = dict(theirs.named_parameters())
        assert all(torch.equal(tensor, weights[key]) for key, tensor in exact.items())
        inside = {m for list_ in theirs.modules() if isinstance(list_, nn.ModuleList) for m in list_.modules()}
        linear = {n for n, module in theirs.named_modules() if type(module) is nn.Linear and module in inside}
        assert linear == set(layers)
    wanted = conditioning(arch, variant, plain, TEXT).tensors()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(found[key], before[key]) for key in wanted)


def test_a_text_encoder_on_the_cpu_gives_the_same_whatever_the_device(arch, variant):
    _, wanted = encode(arch, variant)
    encoders = arch.load_encoders("meta", EncoderMemory("cpu"))  # a tensor that went there would be lost
    (record,) = encoders.encode_text([read_prompt(arch, variant)])
    found = record.tensors()
    assert found
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


@pytest.mark.parametrize("name", ["WAN 2.1 I2V", "HunyuanVideo 1.5 I2V"])
def test_an_image_encoder_is_no_text_encoder(name, built):
    variant = next(variant for variant in variants() if variant.name == name)
    arch = architecture(variant, built(variant))
    kind = CLIPVisionModel if name.startswith("WAN") else SiglipVisionModel
    layers = arch.load_encoders("cpu", EncoderMemory("int8")).encoder(kind, "image_encoder").modules()
    assert not any(is_quantised(layer) for layer in layers)
    assert arch.load_encoders("meta", EncoderMemory("cpu")).encoder(kind, "image_encoder").device.type == "meta"


def read_prompt(arch, variant):
    """What `conditioning` gives the text encoder."""
    seen = []

    class Reads:
        def encode_text(self, prompts):
            seen.extend(prompts)
            raise StopIteration

    with pytest.raises(StopIteration):
        conditioning(arch, variant, Reads(), TEXT)
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["fp8", "int8", "nf4"])
def test_t5_multiplies_by_the_dequantised_weights_in_every_precision(tmp_path, dtype, base):
    config = T5Config(
        vocab_size=40, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(tmp_path)
    found = load_quantised(T5EncoderModel, tmp_path, dtype, base).eval()
    wanted = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
    exact = dtype == torch.float16  # in which transformers keeps `wo` in float32
    for name, module in found.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(module):
            assert not (exact and name.endswith(".wo"))
            wanted.get_submodule(name).weight.data = dequantise(module)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids)[0].float() for model in (found, wanted))
    assert torch.equal(ours, theirs)


LOAD = """
import re, sys, threading, time
from pathlib import Path
import bitsandbytes, torch
from transformers import LlamaModel
from mpp.models.text_encoders import load_quantised

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before, most, ended = own(), [0], threading.Event()
def watch():
    while not ended.is_set():
        most[0] = max(most[0], own())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
folder, base = sys.argv[1:]
if base == "bf16":
    model = LlamaModel.from_pretrained(folder, dtype=torch.bfloat16)
else:
    model = load_quantised(LlamaModel, Path(folder), torch.bfloat16, base)
ended.set()
thread.join()
print((most[0] - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own memory here")
def test_a_quantised_text_encoder_never_takes_more_than_itself_and_one_weight(tmp_path):
    config = LlamaConfig(
        vocab_size=100, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    model = LlamaModel(config)
    model.save_pretrained(tmp_path)  # in float32, as WAN's text encoder is published
    count, largest = sum(p.numel() for p in model.parameters()), 4096 * 1024
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that what is freed is given back at once

    def peak(base):
        words = [sys.executable, "-c", LOAD, str(tmp_path), base]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout.split()[-1])

    assert peak("bf16") > 1.9 * count
    for base, size in (("fp8", 1), ("int8", 1), ("nf4", 4.5 / 8)):
        assert size * count < peak(base) < size * count + 20 * largest  # of one weight copies in float32


# ---------------------------------------------------------------- one after the other


@pytest.fixture
def loads(monkeypatch):
    """For each model that was loaded, which kinds of models there were then."""
    alive, found = [], []

    def watching(load):
        def from_pretrained(cls, *args, **kwargs):
            model = load(cls, *args, **kwargs)
            kind = (
                "text" if isinstance(model, PreTrainedModel) else "vae" if hasattr(model, "decode") else "transformer"
            )
            alive.append((kind, weakref.ref(model)))
            found.append({name for name, known in alive if known() is not None})
            return model

        return classmethod(from_pretrained)

    for owner in (PreTrainedModel, ModelMixin):
        monkeypatch.setattr(owner, "from_pretrained", watching(owner.from_pretrained.__func__))
    return found


def model_words(pipeline):
    return ["model=tiny_wan", f"model.pretrained={pipeline}", "device=cpu"]


SAMPLED = ["sampling.prompts=[a photo, a cat]", "sampling.width=48", "sampling.height=32", "sampling.steps=1"]


@pytest.fixture
def prepare(pipeline, tmp_path):
    """Prepares two images into a cache, with more settings."""
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", count=2)

    def run(*more, cache="cache"):
        words = [*model_words(pipeline), f"data.image_dir={tmp_path / 'photos'}", "data.resolution=48"]
        mpp.prepare.run(helpers.config("prepare", [*words, f"data.cache_dir={tmp_path / cache}", *more]))
        return Cache(tmp_path / cache)

    return run


def test_text_encoder_vae_and_transformer_are_never_there_together(prepare, loads, pipeline, tmp_path):
    prepare(*SAMPLED)
    assert loads == [{"text"}, {"vae"}, {"text"}]
    del loads[:]
    mpp.sample.run(helpers.config("sample", [*model_words(pipeline), *SAMPLED, f"output_dir={tmp_path / 'out'}"]))
    assert loads == [{"text"}, {"transformer"}, {"transformer", "vae"}]


# ---------------------------------------------------------------- what caches say


def test_a_cache_does_not_mix_embeddings_of_text_encoders_in_other_bits(prepare):
    first = prepare("memory.text_encoder=fp8", *SAMPLED)
    assert first.identity().text_weights == "fp8"
    name = first.entries()[0].text
    assert made_from(next((first.folder / "samples").iterdir()), PromptProvenance).text_weights == "fp8"
    for other in ("int8", "bf16", "cpu"):
        with pytest.raises(
            ValueError, match=r"a text encoder in fp8, which do not mix .*memory\.text_encoder=\w+8?; set"
        ):
            prepare(f"memory.text_encoder={other}")
    prepare("memory.text_encoder=fp8")
    whole = prepare(cache="plain")
    assert whole.text_path(name).read_bytes() != first.text_path(name).read_bytes()
    assert prepare("memory.text_encoder=cpu", cache="plain").identity().text_weights == "bf16"


def test_latents_say_whether_they_were_made_in_tiles_and_stay(prepare):
    tiled, whole = prepare("memory.vae=tiled", cache="tiled"), prepare()
    for cache, said in ((tiled, True), (whole, False)):
        assert [made_from(cache.latents_path(e.key), LatentsProvenance).tiled for e in cache.entries()] == [said] * 2
    for entry in whole.entries():  # smaller than a tile
        assert torch.equal(whole.latents(entry), tiled.latents(entry))
    before = [tiled.latents_path(entry.key).stat().st_mtime_ns for entry in tiled.entries()]
    prepare(cache="tiled")
    assert [tiled.latents_path(entry.key).stat().st_mtime_ns for entry in tiled.entries()] == before


def test_prompts_are_encoded_anew_for_a_text_encoder_in_other_bits(pipeline, tmp_path, loads):
    for base, count in (("fp8", 3), ("fp8", 2), ("int8", 3)):
        del loads[:]
        words = [*model_words(pipeline), *SAMPLED, f"output_dir={tmp_path / 'out'}", f"memory.text_encoder={base}"]
        mpp.sample.run(helpers.config("sample", words))
        assert len(loads) == count


@pytest.mark.parametrize("word", ["memory.text_encoder=fp8", "memory.text_encoder=cpu", "memory.vae=tiled"])
def test_the_toy_refuses_what_would_do_nothing(word, tmp_path):
    words = ["model=toy", "device=cpu", f"data.image_dir={tmp_path}", f"data.cache_dir={tmp_path / 'c'}", word]
    with pytest.raises(ValueError, match=re.escape(f"{word}: model=toy has no weights to encode with")):
        mpp.prepare.run(helpers.config("prepare", words))


# ---------------------------------------------------------------- tiles


def shrink_tiles(vae, stride):
    """Tiles of `TILE` cells, as far as a VAE's own settings go."""
    if hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE * stride, TILE
        return
    sizes = {"tile_sample_min": TILE * stride, "tile_latent_min": TILE, "tile_sample_stride": STRIDE * stride}
    for name in [f"{kind}_{side}" for kind in sizes for side in ("height", "width")]:
        if hasattr(vae, name):
            setattr(vae, name, sizes[name.rpartition("_")[0]])


@pytest.fixture(scope="module")
def vaes(arch):
    """A VAE whole and in small tiles, and pixels of one of its cells."""
    encoders = [arch.load_encoders("cpu", EncoderMemory(vae=kind)) for kind in ("whole", "tiled")]
    cells = encoders[0].vae_shape((arch.latents.channels, 1, 2, 2))[-1] // 2
    stride = arch.latents.spatial_stride // cells
    shrink_tiles(encoders[1].vae(), stride)
    return (*encoders, stride)


def test_each_tile_is_decoded_as_by_itself_and_blended_at_its_borders(arch, variant, vaes):
    whole, tiled, stride = vaes
    draw, frames = random.Random(variant.name), 2 if arch.fps else 1
    height, width = (draw.randint(TILE + 1, 2 * TILE + 3) for _ in "hw")
    shape = list(whole.vae_shape((arch.latents.channels, frames, 2, 2)))
    shape[-2:] = height, width
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randint(0, 999)))
    with torch.no_grad():
        found = tiled.vae().decode(latents).sample
        tiles = {
            (top, left): whole.vae().decode(latents[..., top : top + TILE, left : left + TILE]).sample
            for top in range(0, height, STRIDE)
            for left in range(0, width, STRIDE)
        }
    assert found.shape[-2:] == (height * stride, width * stride)
    blend = (TILE - STRIDE) * stride
    for (top, left), tile in tiles.items():
        down, right = (blend if start else 0 for start in (top, left))
        own = tile[..., down : STRIDE * stride, right : STRIDE * stride]
        there = found[..., top * stride + down :, left * stride + right :][..., : own.shape[-2], : own.shape[-1]]
        assert torch.equal(there, own)
    for left in range(STRIDE, width, STRIDE):  # in the first row of tiles
        old, new = tiles[0, left - STRIDE], tiles[0, left]
        across = min(blend, old.shape[-1], new.shape[-1])
        rows = slice(0, STRIDE * stride)
        ends = torch.stack([old[..., rows, old.shape[-1] - across :], new[..., rows, :across]])
        there = found[..., rows, left * stride :][..., :across]
        assert (there >= ends.amin(0) - 1e-5).all()
        assert (there <= ends.amax(0) + 1e-5).all()


def test_what_is_no_larger_than_a_tile_is_the_same_in_tiles_one_at_a_time(arch, variant, vaes):
    whole, tiled, _ = vaes
    cells = TILE // 2 // max(arch.latents.patch[1:]), TILE // 4
    clips = [pixels(arch, variant, cells, seed) for seed in range(2)]
    apart = torch.cat([whole.encode_pixels(clip) for clip in clips])
    assert torch.equal(tiled.encode_pixels(torch.cat(clips)), apart)


def test_sizes_that_are_no_multiples_of_tiles_are_kept(arch, variant, vaes):
    whole, tiled, stride = vaes
    draw, step = random.Random(variant.name), arch.latents.pixel_step
    least = TILE * stride // step + 1
    clip = pixels(arch, variant, tuple(draw.randint(least, least + TILE) for _ in "hw"), 0)
    assert tiled.encode_pixels(clip).shape == whole.encode_pixels(clip).shape


# ---------------------------------------------------------------- what decoding takes


def test_decoding_is_counted_as_it_is_done(arch, variant):
    frames = variant.frames - 1 if arch.latents.layered else variant.frames
    shape = arch.latents.shape(frames, 4 * arch.latents.pixel_step, 6 * arch.latents.pixel_step)
    encoders = arch.load_encoders("cpu")
    vae, sizes = encoders.vae(), encoders.vae_shape(shape)
    with torch.no_grad(), Meter() as meter:
        vae.decode(torch.zeros(sizes, dtype=vae.dtype))
    weights = sum(len(tensor.reshape(-1).view(torch.uint8)) for tensor in [*vae.parameters(), *vae.buffers()])
    assert arch.load_encoders("meta").decode_bytes(shape) == meter.peaks[""] + weights


def test_fewer_bytes_are_counted_for_tiles_and_more_for_more(architecture):
    arch = architecture
    large, larger = arch.latents.shape(5, 512, 384), arch.latents.shape(9, 512, 384)
    counted = [arch.load_encoders("meta").decode_bytes(shape) for shape in (large, larger)]
    assert counted[0] < counted[1]
    assert arch.load_encoders("meta", EncoderMemory(vae="tiled")).decode_bytes(large) < counted[0]


def test_bytes_that_live_at_once_are_those_of_a_tally():
    draw = random.Random(0)
    kept, sizes, most = {}, {}, 0
    with Meter() as meter:
        for number in range(300):
            if kept and draw.random() < 0.45:
                gone = draw.choice(list(kept))
                del kept[gone], sizes[gone]
            else:
                count = draw.randint(1, 5000)
                kept[number], sizes[number] = torch.empty(count, device=draw.choice(["meta", "cpu"])), 4 * count
                kept[number].view(-1)[:1].add_(1)  # views are no bytes of their own
            most = max(most, sum(sizes.values()))
            assert meter.live == sum(sizes.values())
    assert meter.peaks[""] == most
