"""Metadata of LoRA files as programs that list them read it."""

import base64
import hashlib
import io
import json
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mpp.config import CONFIG_DIR, build, check_config
from mpp.lora.adapters import Adapter, adapter_state, inject
from mpp.lora.export import Export
from mpp.lora.metadata import Facts, Metadata, describe, save_file
from mpp.lora.writing import save_lora
from mpp.training.checkpoint import read_checkpoint
from tests.helpers import architecture as tiny
from tests.helpers import config, draw_photos, prepare, randomise_adapter, train
from tests.test_compatibility import OLD

SAMPLING = ["sampling.prompts=[a secret prompt]", "sampling.width=64", "sampling.height=48", "sampling.steps=1"]
DATE = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ")

# ---------------------------------------------------------------- two programs that list LoRAs


def header(file):
    """A safetensors file's header, and where its tensors begin."""
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        assert length <= 8 * 1024 * 1024  # more is not read by ComfyUI
        return json.loads(handle.read(length).decode("utf-8")), 8 + length


def comfyui_shows(file):
    """As ComfyUI's asset scanner reads a file: app/assets/services/metadata_extract.py."""
    found = header(file)[0].get("__metadata__", {})
    words = set()
    for counts in json.loads(found.get("ss_tag_frequency", "{}")).values():
        if isinstance(counts, dict):
            words |= counts.keys()
    if not words and "trained_words" in found:
        words = {word.strip() for word in found["trained_words"].split(",")}
    return {
        "base_model": found.get("ss_base_model_version")
        or found.get("modelspec.base_model")
        or found.get("base_model"),
        "trained_words": sorted(words)[:100],
        "air": found.get("air") or found.get("modelspec.air"),
        "has_preview_images": bool(found.get("ssmd_cover_images")),
        "source_hash": found.get("source_hash") or found.get("sshs_model_hash"),
    }


def lora_manager_shows(file):
    """As ComfyUI-Lora-Manager reads one: py/utils/lora_metadata.py and model_utils.py."""
    known = {
        "sdxl": "SDXL 1.0",
        "flux1": "Flux.1 D",
        "flux.1 d": "Flux.1 D",
        "illustrious": "Illustrious",
        "pony": "Pony",
    }
    with safe_open(file, framework="pt", device="cpu") as handle:
        found = handle.metadata()
    version = found.get("ss_base_model_version") or "Unknown"
    counts = json.loads(found.get("ss_tag_frequency", "{}"))
    words = counts[next(iter(counts))] if counts else {}
    return {
        "base_model": next((name for key, name in known.items() if key in version.lower()), version),
        "trained_words": sorted(words.items(), key=lambda pair: pair[1], reverse=True),
        "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }


def spec(file):
    """ModelSpec's entries without the prefix."""
    found = header(file)[0].get("__metadata__", {})
    return {key.removeprefix("modelspec."): value for key, value in found.items() if key.startswith("modelspec.")}


def trained(file):
    """The trainers' entries."""
    return {key: value for key, value in header(file)[0].get("__metadata__", {}).items() if key.startswith("ss_")}


@pytest.fixture(scope="module")
def zarp(tmp_path_factory, pipeline):
    """A cache with a trigger word and a prompt."""
    root = tmp_path_factory.mktemp("zarp")
    draw_photos(root / "photos", root / "masks")
    prepare(pipeline, root, "data.caption_variants.trigger=zarp", *SAMPLING)
    return root / "cache"


def test_a_trained_lora_is_listed_with_all_that_is_said_of_it(pipeline, zarp, tmp_path):
    said = {"title": "Zarp, the box", "author": "A. Nyone", "license": "CC-BY-4.0", "description": "Yellow.\nA box.",
            "tags": "box, yellow", "usage_hint": "zarp first"}  # fmt: skip
    words = [f"export.metadata.{name}='{text}'" for name, text in said.items()]
    words += ["export.metadata.thumbnail=true", "export.formats=[comfyui,kohya]", "lora.rank=3", "lora.alpha=6"]
    steps = ["trainer.max_steps=2", "callbacks.checkpoints.every_n_steps=1", "callbacks.samples.every_n_steps=2"]
    train(pipeline, zarp, tmp_path / "mychar", *SAMPLING, *words, *steps)
    for format, module in (("", "peft"), ("_comfyui", "peft"), ("_kohya", "networks.lora")):
        file = tmp_path / "mychar" / f"lora{format}.safetensors"
        shown = comfyui_shows(file)
        assert (shown["base_model"], shown["trained_words"], shown["has_preview_images"]) == ("wan", ["zarp"], True)
        assert shown["source_hash"] == hashlib.sha256(file.read_bytes()[header(file)[1] :]).hexdigest()
        shown = lora_manager_shows(file)
        assert (shown["base_model"], shown["trained_words"]) == ("wan", [("zarp", 8)])
        found = spec(file)
        assert {name: found[name] for name in said} == said
        assert (found["sai_model_spec"], found["architecture"]) == ("1.0.1", "wan2.1/lora")
        assert (found["implementation"], found["trigger_phrase"]) == ("https://github.com/Wan-Video/Wan2.1", "zarp")
        assert found["resolution"] in ("64x64", "80x48")  # four samples of each
        assert DATE.fullmatch(found["date"])
        assert found["thumbnail"].startswith("data:image/jpeg;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(found["thumbnail"].partition(",")[2])))
        assert (image.format, image.size) == ("JPEG", (64, 48))
        wanted = {"network_module": module, "network_dim": "3", "network_alpha": "6", "steps": "2",
                  "network_args": '{"algo": "lora"}', "seed": "0", "output_name": "mychar", "num_train_items": "8",
                  "network_dropout": "0.0", "sd_model_name": "tiny_wan", "base_model_version": "wan"}  # fmt: skip
        got = trained(file)
        assert {name: got[f"ss_{name}"] for name in wanted} == wanted
        assert got["ss_resolution"] == "({}, {})".format(*found["resolution"].split("x"))
    assert "thumbnail" in spec(tmp_path / "mychar" / "lora" / "step-000002.safetensors")


@pytest.mark.slow
def test_the_thumbnail_is_the_newest_sample_by_the_lora(pipeline, zarp, tmp_path):
    words = ["export.metadata.thumbnail=true", "export.formats=[]", "optimizer.lr=0.3", "trainer.max_steps=3"]
    train(pipeline, zarp, tmp_path, *SAMPLING, *words, "callbacks.samples.every_n_steps=100")
    encoded = spec(tmp_path / "lora.safetensors")["thumbnail"].partition(",")[2]
    base, lora = (
        as_jpeg(Image.open(*(tmp_path / "samples" / "step-000003").glob(f"*_{part}.png"))) for part in ("base", "lora")
    )
    assert base64.b64decode(encoded) == lora != base


def as_jpeg(image):
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return written.getvalue()


def test_a_run_without_samples_has_none_to_show(pipeline, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.models.family.Family.load_transformer", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"thumbnail=true shows a sample; set sampling.prompts, or name an image"):
        train(pipeline, prepared, tmp_path / "run", "export.metadata.thumbnail=true")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what no file holds unless asked to


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_path_or_a_prompt_unless_it_is_asked_for(pipeline, zarp, architecture, tmp_path):
    for full in (False, True):
        run = tmp_path / f"run{full}"
        words = [*SAMPLING, f"export.metadata.full_record={str(full).lower()}", "trainer.max_steps=1"]
        train(pipeline, zarp, run, *words, "export.formats=[comfyui,kohya]")
        for format in ("diffusers", "peft"):
            Export(lora=str(run), format=format, metadata=Metadata(full_record=full)).run(architecture)
        files = [*run.rglob("*.safetensors")]
        assert len(files) == 8
        for file in files:
            held = file.read_bytes()
            for secret in (str(tmp_path), str(pipeline), str(zarp), "secret prompt"):
                assert (secret.encode() in held) == full, secret
            record = json.loads(header(file)[0]["__metadata__"]["mpp"])
            assert (record["config"]["output_dir"] == str(run)) == full
            assert record["steps"] == 1
            assert record["base"] == architecture.identity().transformer
        config = read_checkpoint(run / "checkpoints" / "last.ckpt")["mpp"]["config"]
        assert (config["output_dir"], config["sampling"]["prompts"]) == (str(run), ["a secret prompt"])


@pytest.mark.slow
def test_the_same_run_leaves_the_same_bytes_but_for_the_date(pipeline, zarp, tmp_path):
    held = []
    for place in ("a", "b"):
        train(pipeline, zarp, tmp_path / place / "run", "trainer.max_steps=1", "export.formats=[kohya]")
        held.append(DATE.sub("", (tmp_path / place / "run" / "lora.safetensors").read_bytes().decode("latin-1")))
    assert held[0] == held[1]


@pytest.mark.slow
def test_what_is_said_may_change_when_a_run_goes_on(pipeline, zarp, tmp_path):
    train(pipeline, zarp, tmp_path, "trainer.max_steps=1", "export.metadata.title=old", "export.metadata.author=me")
    train(pipeline, zarp, tmp_path, "trainer.max_steps=2", f"resume={tmp_path}", "export.metadata.title=new")
    for name in ("lora", "lora_comfyui"):
        found = spec(tmp_path / f"{name}.safetensors")
        assert (found["title"], found["author"], trained(tmp_path / f"{name}.safetensors")["ss_steps"]) == (
            "new",
            "me",
            "2",
        )


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("seed", range(12))
def test_hashes_are_those_of_the_files_bytes(tmp_path, seed):
    """By sd-scripts: of what follows the header, and of 64 KiB at 1 MiB of a file with the trainers' entries alone."""
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, 7, 1000, 250_000, draw.randrange(400_000)]) for _ in range(draw.randint(1, 4))]
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    tensors = {f"t{draw.random()}": torch.randn(size).to(draw.choice(kinds)) for size in sizes}
    said = {f"ss_{number}": "x" * draw.randrange(4_000) for number in range(3)}
    said |= {"modelspec.sai_model_spec": "1.0.1", "format": "pt", "modelspec.title": 'é "\\\n日本'}
    if seed % 4 == 0:
        said["ss_long"] = "x" * draw.randrange(1_000_000, 1_100_000)  # the 64 KiB begin in the header
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, said)
    found, start = header(path)
    digest = hashlib.sha256(path.read_bytes()[start:]).hexdigest()
    metadata = found["__metadata__"]
    assert (metadata["modelspec.hash_sha256"], metadata["sshs_model_hash"]) == (f"0x{digest}", digest)
    ours = {key: value for key, value in said.items() if key.startswith("ss_")}
    legacy = safetensors.torch.save(tensors, ours)  # whose header safetensors itself wrote
    if "ss_long" not in said:  # else the order of its entries would count, which it leaves to chance
        assert metadata["sshs_legacy_hash"] == hashlib.sha256(legacy[0x100000:0x110000]).hexdigest()[:8]
    assert start % 8 == 0
    assert list(metadata) == sorted(metadata)
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == metadata
        assert {key: metadata[key] for key in said} == said
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    before = path.read_bytes()
    save_file(dict(reversed(tensors.items())), path, dict(reversed(said.items())))
    assert path.read_bytes() == before


def test_a_file_that_nobody_described_has_no_hashes(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert header(tmp_path / "a.safetensors")[0]["__metadata__"] == {"format": "pt"}


def test_a_base_of_one_file_is_known_by_its_older_hash(architecture, tmp_path):
    source = tmp_path / "base.safetensors"
    source.write_bytes(random.Random(0).randbytes(0x120000))
    architecture.pretrained = str(source)
    found = describe(architecture, {}, Facts("a"))
    assert found["ss_sd_model_hash"] == hashlib.sha256(source.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert found["ss_sd_model_name"] == "base.safetensors"


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize(
    "format", ["comfyui", *(pytest.param(f, marks=pytest.mark.slow) for f in ("diffusers", "kohya", "peft"))]
)
def test_an_export_says_what_the_lora_says_and_has_hashes_of_its_own(pipeline, zarp, architecture, tmp_path, format):
    train(pipeline, zarp, tmp_path / "mychar", "trainer.max_steps=1", "export.metadata.author=me", "export.formats=[]")
    lora = tmp_path / "mychar" / "lora.safetensors"
    said = Metadata(title="other", tags="a, b", trigger_phrase="one, two  words", usage_hint="")
    target = str(tmp_path / "out" / "x") + (".safetensors" if format != "peft" else "")
    (file,) = Export(lora=str(lora), format=format, output=target, dtype="bfloat16", metadata=said).run(architecture)
    file = file / "adapter_model.safetensors" if format == "peft" else file
    old, new = spec(lora), spec(file)
    differ = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert differ == {"title", "tags", "trigger_phrase", "hash_sha256"}
    assert (new["title"], new["trigger_phrase"]) == ("other", "one, two  words")
    assert comfyui_shows(file)["trained_words"] == ["one", "two words"]
    assert new["hash_sha256"] == "0x" + hashlib.sha256(file.read_bytes()[header(file)[1] :]).hexdigest()
    assert trained(file)["ss_network_module"] == ("networks.lora" if format == "kohya" else "peft")
    metadata = header(file)[0]["__metadata__"]
    assert json.loads(metadata["mpp_export"])["dtype"] == "bfloat16"
    assert metadata["mpp"] == header(lora)[0]["__metadata__"]["mpp"]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr"])
@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya", "peft"])
def test_an_old_file_is_exported_with_what_is_known(tmp_path, kind, format):
    architecture = tiny(OLD / "base")
    lora = OLD / "loras" / kind / "lora.safetensors"
    if (kind, format) == ("dora", "kohya"):
        return
    (file,) = Export(
        lora=str(lora), format=format, output=str(tmp_path / ("x" if format == "peft" else "x.safetensors"))
    ).run(architecture)
    file = file / "adapter_model.safetensors" if format == "peft" else file
    held = header(file)[0]["__metadata__"]
    assert "/tmp/fixtures" in header(lora)[0]["__metadata__"]["mpp"]
    assert b"/tmp/" not in file.read_bytes()
    record = json.loads(held["mpp"])
    assert (held["modelspec.architecture"], held["modelspec.title"]) == ("wan2.1/lora", "out")
    assert (held["ss_network_dim"], held["ss_network_alpha"]) == ("2", "3")
    assert held["ss_network_module"] == {"kohya": "lycoris.kohya" if kind == "lokr" else "networks.lora"}.get(
        format, "peft"
    )
    assert held["ss_steps"] == str(record["steps"])
    assert "modelspec.date" not in held  # nobody knows it
    assert json.loads(held["mpp_export"])["dtype"] == "float32"


def test_a_file_of_diffusers_is_exported_with_what_is_known(architecture, tmp_path):
    model = architecture.load_transformer()
    inject(model, Adapter(rank=4, alpha=7), architecture.lora_targets, seed=0)
    randomise_adapter(model)
    save_lora(tmp_path / "mine.safetensors", model, adapter_state(model), {})
    (file,) = Export(lora=str(tmp_path / "mine.safetensors"), format="kohya").run(architecture)
    assert (spec(file)["title"], spec(file)["architecture"]) == ("mine", "wan2.1/lora")
    got = trained(file)
    assert (got["ss_network_dim"], got["ss_network_alpha"], "ss_steps" in got) == ("4", "7", False)


@pytest.mark.slow
def test_a_thumbnail_may_be_any_image_and_is_made_small(tmp_path):
    architecture = tiny(OLD / "base")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((2700, 1200)).save(tmp_path / "cover.png")
    lora = OLD / "loras" / "lora" / "lora.safetensors"
    said = Metadata(thumbnail=str(tmp_path / "cover.png"))
    (file,) = Export(lora=str(lora), format="kohya", output=str(tmp_path / "a.safetensors"), metadata=said).run(
        architecture
    )
    image = Image.open(io.BytesIO(base64.b64decode(spec(file)["thumbnail"].partition(",")[2])))
    assert image.size == (512, 228)
    assert comfyui_shows(file)["has_preview_images"]
    (again,) = Export(lora=str(lora), format="comfyui", output=str(tmp_path / "b.safetensors")).run(architecture)
    assert "thumbnail" not in spec(again)


def test_experts_say_for_which_noise_they_are(architecture):
    cfg = config("train", ["model=wan22", "data.cache_dir=x"])
    both = build(cfg.model)
    for part, wanted in (("low", "0,875"), ("high", "875,1000")):
        found = describe(both, {}, Facts("mychar"), part=part)
        assert (found["modelspec.timestep_range"], found["modelspec.title"]) == (wanted, f"mychar ({part})")
        assert Metadata(title="mine").over(found, part=part)["modelspec.title"] == f"mine ({part})"
    alone = build(config("train", ["model=wan22_high", "data.cache_dir=x"]).model)
    assert describe(alone, {}, Facts("a"))["modelspec.timestep_range"] == "875,1000"
    assert "modelspec.timestep_range" not in describe(architecture, {}, Facts("a"))


# ---------------------------------------------------------------- what may be said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"title": "x" * 2049}, "export.metadata.title may have 2048 characters, got 2049"),
        ({"description": "x" * 32_769}, "export.metadata.description may have 32768 characters, got 32769"),
        ({"author": "a\0b"}, r"export.metadata.author holds '\\x00', which is no text"),
        ({"tags": "a\ud800"}, r"export.metadata.tags holds '\\ud800', which is no text"),
        ({"license": "a\x1b[31m"}, r"export.metadata.license holds '\\x1b'"),
        ({"thumbnail": "nowhere.png"}, "nowhere.png cannot be read"),
    ],
)
def test_what_is_no_text_for_a_file_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        Metadata(**said)


@pytest.mark.parametrize("command", ["train", "export"])
def test_unknown_settings_and_other_types_are_refused(command):
    words = {"train": ["data.cache_dir=x", "output_dir=o"], "export": ["lora=l", "export.format=peft"]}[command]
    with pytest.raises(
        Exception, match="export.metadata.titel is not a setting of .*Metadata; did you mean export.metadata.title"
    ):
        config(command, [*words, "export.metadata.titel=a"])
    cfg = config(command, [*words, "export.metadata.title=2024, (a: b)", "export.metadata.thumbnail=true"])
    check_config(cfg)
    assert (cfg.export.metadata.title, cfg.export.metadata.thumbnail) == ("2024, (a: b)", True)
    cfg.export.metadata.title = 2024
    with pytest.raises(ValueError, match="export.metadata.title should be a valid string, got 2024"):
        check_config(cfg)


def test_the_newest_sample_is_for_training_alone():
    with pytest.raises(ValueError, match="thumbnail=true is for training; name an image file here"):
        Export(lora="x", format="peft", metadata=Metadata(thumbnail=True))


def test_what_is_empty_is_left_out():
    found = Metadata(author="", trigger_phrase="").over(
        {"modelspec.author": "me", "modelspec.trigger_phrase": "a", "ss_tag_frequency": '{"captions": {"a": 1}}'}
    )
    assert found == {}


# ---------------------------------------------------------------- what models are called

IDS = {  # as musubi-tuner writes them (utils/sai_model_spec.py, dataset/architectures.py) where it has the model
    "wan": ("wan2.1", "wan"), "wan_14b": ("wan2.1", "wan"), "wan_i2v_480p": ("wan2.1", "wan"),
    "wan_i2v_720p": ("wan2.1", "wan"), "wan22": ("wan2.1", "wan"), "wan22_high": ("wan2.1", "wan"),
    "wan22_low": ("wan2.1", "wan"), "wan22_i2v": ("wan2.1", "wan"), "wan22_i2v_high": ("wan2.1", "wan"),
    "wan22_i2v_low": ("wan2.1", "wan"), "tiny_wan": ("wan2.1", "wan"),
    "hunyuan_video": ("hunyuan-video", "hunyuan_video"), "hunyuan_video15": ("hunyuan-video-1.5", "hunyuan_video_1_5"),
    "hunyuan_video15_i2v": ("hunyuan-video-1.5", "hunyuan_video_1_5"), "flux_kontext": ("Flux.1-dev", "flux_kontext"),
    "flux2": ("Flux.2-dev", "flux_2_dev"), "flux2_klein_4b": ("Flux.2-klein-4b", "flux_2_klein_4b"),
    "flux2_klein_9b": ("Flux.2-klein-9b", "flux_2_klein_9b"), "qwen_image": ("Qwen-Image", "qwen_image"),
    "qwen_image_edit": ("Qwen-Image-Edit", "qwen_image_edit"),
    "qwen_image_edit_plus": ("Qwen-Image-Edit-Plus", "qwen_image_edit"),
    "qwen_image_edit_2511": ("Qwen-Image-Edit-2511", "qwen_image_edit"),
    "qwen_image_layered": ("Qwen-Image-Layered", "qwen_image_layered"), "kandinsky5": ("Kandinsky-5", "kandinsky5"),
    "z_image": ("Z-Image", "z_image"),
    # others: sd-scripts' name, a fork's of musubi-tuner, and some of the same form
    "flux": ("Flux.1-dev", "flux1"), "ltx2": ("LTX2", "ltx2_v1"), "wan22_5b": ("wan2.2-ti2v-5b", "wan_2_2_ti2v_5b"),
    "wan22_5b_i2v": ("wan2.2-ti2v-5b", "wan_2_2_ti2v_5b"), "hunyuan_video_i2v": ("hunyuan-video", "hunyuan_video"),
    "hunyuan_video_i2v_token_replace": ("hunyuan-video", "hunyuan_video"), "toy": ("mpp-toy", "mpp_toy"),
}  # fmt: skip
TEXT_WIDTHS = {"flux2": 15360, "flux2_klein_4b": 7680, "flux2_klein_9b": 12288}  # of their published config.json


def preset(name):
    """What composing makes of a model's YAML and those that it names in its `defaults`."""
    own = OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")
    return OmegaConf.merge(*(preset(parent) for parent in own.pop("defaults", []) if parent != "_self_"), own)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
def test_every_model_config_is_known_by_a_name(name, pipeline, monkeypatch):
    monkeypatch.setattr(
        "mpp.models.families.flux2.Flux2.transformer_config", lambda self: {"joint_attention_dim": TEXT_WIDTHS[name]}
    )
    model = build(OmegaConf.merge(preset(name), {"pretrained": str(pipeline)} if name == "tiny_wan" else {}))
    architecture, version = IDS[name]
    found = describe(model, {}, Facts("a"))
    assert (found["modelspec.architecture"], found["ss_base_model_version"]) == (f"{architecture}/lora", version)
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+|mpp", found["modelspec.implementation"])
