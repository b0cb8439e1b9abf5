"""Text encoders whose layers wait in the CPU's memory."""

import json
import random
import shutil
import weakref

import pytest
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from transformers import AutoConfig, PreTrainedModel

import mpp.prepare
import mpp.sample
from mpp.cache.format import Cache
from mpp.memory.settings import EncoderMemory
from mpp.models.contract import repeated
from mpp.models.text_encoders import stream_text_layers
from tests import helpers
from tests.families import wan_first
from tests.families.base import architecture, conditioning
from tests.memory.poison import Poison

TEXTS = ('a red box that says "OPEN"', "a cat")  # what is in quotes a second text encoder reads
DEPTHS = ("num_hidden_layers", "num_layers", "depth")


def deepen(config, depth):
    """A configuration with at least so many layers in each of its lists."""
    found = {name: deepen(value, depth) if isinstance(value, dict) else value for name, value in config.items()}
    found |= {name: max(depth, found[name]) for name in DEPTHS if name in found}
    return {name: value for name, value in found.items() if name != "layer_types"}  # which follow from their number


def deeper(variant, folder, target, *overrides):
    """The variant's architecture over a copy of its pipeline whose text encoders have at least 3 to 6 layers."""
    shutil.copytree(folder, target)
    arch, depth = architecture(variant, target, *overrides), random.Random(variant.name).randint(3, 6)
    torch.manual_seed(depth)
    for part in (target / name for name in arch.text_components):
        config = json.loads((part / "config.json").read_text())
        if "text_proj_in_factor" in config:  # LTX-2's connectors, of what all layers make
            LTX2TextConnectors.from_config(config, text_proj_in_factor=depth + 1).save_pretrained(part)
        else:
            (part / "config.json").write_text(json.dumps(deepen(config, depth)))
            getattr(transformers, config["architectures"][0])(AutoConfig.from_pretrained(part)).save_pretrained(part)
    return arch


def encode(arch, variant, **memory):
    """Encoders, and the records of texts, the first of them twice."""
    encoders = arch.load_encoders("cpu", EncoderMemory(**memory))
    return encoders, [conditioning(arch, variant, encoders, text).tensors() for text in (*TEXTS, TEXTS[0])]


def text_models(encoders):
    """The text encoders that are loaded."""
    components = {*encoders.model.text_components} - {"connectors", "image_encoder"}
    return [encoders._loaded[name] for name in encoders._loaded if name in components]


@pytest.fixture(params=wan_first())
def variant(request):
    return request.param


@pytest.mark.parametrize("base", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_embeddings_are_those_of_layers_that_stay(variant, built, tmp_path, monkeypatch, base):
    arch = deeper(variant, built(variant), tmp_path / "deeper", "model.text_dtype=bfloat16")
    _, wanted = encode(arch, variant, text_encoder=base)
    made, there = [], []

    def stream(model, resident):
        made.append(stream_text_layers(model, resident))
        for _, layer in repeated(model):
            layer.register_forward_hook(lambda *_, streaming=made[-1]: there.append(len(streaming._there)))

    monkeypatch.setattr("mpp.models.family.stream_text_layers", stream)
    monkeypatch.setattr("mpp.memory.streaming.link_to", lambda _: Poison())
    for resident in (2, 3):
        del made[:], there[:]
        encoders, found = encode(arch, variant, text_encoder=base, text_layers=resident)
        assert all(torch.equal(one[key], other[key]) for one, other in zip(found, wanted, strict=True) for key in other)
        assert len(made) == len(text_models(encoders)) > 0
        if resident == 2:  # no list of layers is that short
            assert max(there) == 2
            assert all(max(streaming.loads.values()) > 1 for streaming in made)
    gone = [weakref.ref(model) for model in text_models(encoders)]
    del made[:], there[:]
    encoders.release()
    assert not any(model() for model in gone)


def test_no_weight_that_waits_tells_where_a_model_is(variant, built, tmp_path):
    arch = deeper(variant, built(variant), tmp_path / "deeper")
    encoders, _ = encode(arch, variant)
    for model in text_models(encoders):
        waiting = {weight for _, layer in repeated(model) for weight in layer.parameters()}
        for part in (part for part in model.modules() if isinstance(part, PreTrainedModel)):
            assert next(part.parameters()) not in waiting


@pytest.fixture
def prepare(pipeline, tmp_path):
    """Prepares an image into a cache, with more settings."""
    helpers.draw_photos(tmp_path / "photos", tmp_path / "masks", count=1)

    def run(*more, model=("model=tiny_wan", f"model.pretrained={pipeline}")):
        said = [*model, "device=cpu", f"data.image_dir={tmp_path / 'photos'}", "data.resolution=48", *more]
        mpp.prepare.run(helpers.config("prepare", [*said, f"data.cache_dir={tmp_path / 'cache'}"]))
        return Cache(tmp_path / "cache")

    return run


def test_a_cache_does_not_say_where_layers_waited(prepare):
    def identity(*more):
        cache = prepare(*more)
        return cache.identity(), {file: file.stat().st_mtime_ns for file in cache.folder.rglob("*.safetensors")}

    assert identity("memory.text_layers=2") == identity()


def test_more_layers_than_there_are_are_refused_before_weights_are_read(prepare, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(
        ValueError, match=r"^memory\.text_layers=3: the text encoder has 2 layers .* from 2 to 2, or all"
    ):
        prepare("memory.text_layers=3")


@pytest.mark.parametrize("wrong", [1, 0, True, "auto", 2.5])
def test_what_is_no_number_of_layers_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"memory\.text_layers must be all or a number of layers, .* got {wrong!r}"):
        EncoderMemory(text_layers=wrong)


def test_layers_do_not_wait_where_that_does_nothing(prepare):
    with pytest.raises(ValueError, match=r"memory\.text_layers=2 does nothing with memory\.text_encoder=cpu"):
        EncoderMemory("cpu", 2)
    with pytest.raises(ValueError, match=r"memory\.text_layers=2: model=toy has no weights to encode with"):
        prepare("memory.text_layers=2", model=["model=toy"])


@pytest.mark.parametrize("command", [mpp.prepare, mpp.sample])
def test_layers_wait_for_gpus_that_have_memory_of_their_own(command, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "device_of", lambda _: "mps")
    name = command.__name__.removeprefix("mpp.")
    said = [f"output_dir={tmp_path}", "sampling.prompts=[a photo]"]
    if command is mpp.prepare:
        said = [f"data.image_dir={tmp_path}", f"data.cache_dir={tmp_path / 'c'}"]
    cfg = helpers.config(name, ["model=tiny_wan", f"model.pretrained={pipeline}", *said, "memory.text_layers=2"])
    with pytest.raises(ValueError, match=r"memory\.text_layers=2 is for CUDA .*=all, and memory\.text_encoder=int8"):
        command.run(cfg)
