"""Tools with models: real loading code, tiny random weights, transformers itself as the witness."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPSegForImageSegmentation, SegformerForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from mpp.masking.clipseg import ClipSeg
from mpp.masking.human_parser import HumanParser
from tests.masking import tiny_models
from tests.masking.files import levels, read_video, run, save, write_video
from tests.masking.tiny_models import LABELS, MEAN, STD

SHAPE = (60, 90)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("clipseg", "segformer"):
        (root / name).mkdir()
        getattr(tiny_models, name)(root / name)
    return root


def scene(number=0, shape=SHAPE):
    """A noisy field with a bright box that moves to the right."""
    array = np.random.default_rng(number).integers(30, 120, (*shape, 3), dtype=np.uint8)
    array[10:40, 10 + 3 * number : 40 + 3 * number] = (230, 180, 40)
    return array


def seen(array, side):
    """What a model sees of an image: resized without its shape, then normalised."""
    small = np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.BILINEAR)) / 255
    return torch.from_numpy(((small - MEAN) / STD).transpose(2, 0, 1)[None]).float()


def resized(scores, shape=SHAPE):
    """Bilinear, by Pillow."""
    return np.asarray(Image.fromarray(scores.numpy()).resize(shape[::-1], Image.Resampling.BILINEAR))


@torch.no_grad()
def chance(folder, array, word):
    """CLIPSeg's probability of a word, step by step."""
    model, tokenizer = CLIPSegForImageSegmentation.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([word], return_tensors="pt")
    logits = model(pixel_values=seen(array, 32), **tokens).logits
    return 1 / (1 + np.exp(-resized(logits.reshape(32, 32), array.shape[:2]).astype(np.float64)))


# ---------------------------------------------------------------- CLIPSeg


def test_words_give_the_models_probability(models, tmp_path):
    save(tmp_path / "in" / "sub" / "p.png", scene())
    words = [f"tool.model={models / 'clipseg'}", "tool.prompts=[a cat]", "tool.threshold=null"]
    run("clipseg", tmp_path / "in", tmp_path / "out", *words)
    got = levels(tmp_path / "out" / "sub" / "p.png")
    want = 255 * chance(models / "clipseg", scene(), "a cat")
    assert got.std() > 5
    assert np.abs(got - want).max() < 0.6


def test_several_words_are_joined_and_the_highest_tier_wins(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    words = [f"tool.model={models / 'clipseg'}", "tool.threshold=0.45"]
    run("clipseg", tmp_path / "in", tmp_path / "all", "tool.prompts=[a cat,zebra]", *words)
    run("clipseg", tmp_path / "in", tmp_path / "tiers", "tool.prompts={a cat:1.0,zebra:0.4}", *words)
    cat, zebra = (chance(models / "clipseg", scene(), word) >= 0.45 for word in ("a cat", "zebra"))
    assert (cat & ~zebra).any()
    assert (zebra & ~cat).any()
    both = levels(tmp_path / "all" / "p.png")
    assert (both != np.where(cat | zebra, 255, 0)).mean() < 0.001  # a pixel may lie on the threshold
    tiers = levels(tmp_path / "tiers" / "p.png")
    assert (tiers != np.where(cat, 255, np.where(zebra, 102, 0))).mean() < 0.001


def test_videos_are_looked_at_frame_by_frame(models, tmp_path):
    write_video(tmp_path / "in" / "v.mkv", [scene(n) for n in range(3)], form="bgr0", layout="rgb24")
    words = [f"tool.model={models / 'clipseg'}", "tool.prompts=[a cat]", "tool.threshold=null"]
    run("clipseg", tmp_path / "in", tmp_path / "out", *words, f"preview={tmp_path / 'look'}")
    got, _ = read_video(tmp_path / "out" / "v.mkv")
    for number, frame in enumerate(got):
        assert np.abs(frame - 255 * chance(models / "clipseg", scene(number), "a cat")).max() < 0.6
    assert len(read_video(tmp_path / "look" / "v.mp4", "rgb24")[0]) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "tool.model=... is missing"),
        ({"prompts": None}, "tool.prompts says what to look for, as .a person."),
        ({"prompts": []}, "tool.prompts says what to look for"),
        ({"prompts": ["a cat", " "]}, "no prompt is empty"),
        ({"prompts": "a cat"}, "got 'a cat'"),
        ({"prompts": {"a cat": 1.5}}, "tool.prompts must have values between 0 and 1, got 1.5"),
        ({"threshold": 0.0}, "tool.threshold must be between 0 and 1, both excluded, or null, got 0.0"),
        ({"threshold": 1.0}, "got 1.0"),
    ],
)
def test_word_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipSeg(**{"model": "x", "prompts": ["a cat"]} | settings)


def test_prompts_that_the_model_cannot_read_whole_are_refused(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    with pytest.raises(ValueError, match=r"'catcatcat.*' *\.\.\. has 182 tokens, the model reads at most 77"):
        run(
            "clipseg",
            tmp_path / "in",
            tmp_path / "out",
            f"tool.model={models / 'clipseg'}",
            f"tool.prompts=[{'cat' * 60}]",
        )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- human parser


@torch.no_grad()
def labels(folder, array):
    """Label names by transformers' own post-processing."""
    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    outputs = model(pixel_values=seen(array, 64))
    (found,) = SegformerImageProcessorPil().post_process_semantic_segmentation(outputs, [array.shape[:2]])
    return np.array(LABELS)[found.numpy()]


def test_labels_become_tiers(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    tiers = "tool.tiers={Face:1.0,Hair:0.4,Upper-clothes:0.6}"
    run(
        "human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={models / 'segformer'}", tiers, "tool.other=0.2"
    )
    names = labels(models / "segformer", scene())
    assert len(set(names.ravel())) >= 3
    want = np.vectorize({"Face": 255, "Hair": 102, "Upper-clothes": 153, "Background": 51}.get)(names)
    got = levels(tmp_path / "out" / "p.png")
    assert got.shape == SHAPE
    assert (got != want).mean() < 0.001


def test_turned_photos_are_parsed_upright(models, tmp_path):
    upright = scene()
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in" / "upright.png", upright)
    save(tmp_path / "in" / "turned.png", np.ascontiguousarray(np.rot90(upright)), exif=exif)
    run(
        "human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={models / 'segformer'}", "tool.tiers={Hair:1.0}"
    )
    got = levels(tmp_path / "out" / "turned.png")
    assert 0 < got.mean() < 255
    np.testing.assert_array_equal(got, levels(tmp_path / "out" / "upright.png"))


def test_unknown_labels_are_named_with_all_that_there_are(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    with pytest.raises(
        ValueError,
        match=r"tool.tiers: face, Ear is no label of .*segformer; it has Background, Hair, Upper-clothes, Face",
    ):
        run(
            "human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={models / 'segformer'}",
            "tool.tiers={face:1.0,Hair:0.5,Ear:0.1}",
        )  # fmt: skip


def test_a_processor_that_crops_shows_the_whole_image_all_the_same(models, tmp_path):
    shutil.copytree(models / "segformer", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    crop = {
        "image_processor_type": "MobileViTImageProcessor", "do_center_crop": True, "size": {"shortest_edge": 80},
        "crop_size": {"height": 64, "width": 64}, "do_flip_channel_order": False,
    }  # fmt: skip
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings | crop))
    parser = HumanParser(str(tmp_path / "model"), {"Hair": 1.0})
    inputs = parser._processor(Image.fromarray(scene()), return_tensors="pt", **parser._whole())
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    corner = parser._processor(
        Image.fromarray(np.full((*SHAPE, 3), 9, np.uint8)), return_tensors="pt", **parser._whole()
    )
    assert corner["pixel_values"].std(dim=(2, 3)).max() < 1e-6
    left = scene()
    left[:, :10] = 255  # outside the middle of the image
    changed = parser._processor(Image.fromarray(left), return_tensors="pt", **parser._whole())
    assert (changed["pixel_values"] != inputs["pixel_values"])[..., :6].any()


def test_a_processor_that_pads_is_refused(models, tmp_path):
    shutil.copytree(models / "segformer", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    pad = {"image_processor_type": "DPTImageProcessor", "do_pad": True, "size_divisor": 32}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings | pad))
    with pytest.raises(ValueError, match="pads its images, which is not undone here"):
        HumanParser(str(tmp_path / "model"), {"Hair": 1.0}).prepare([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "tool.model=... is missing"),
        ({"tiers": None}, "tool.tiers is missing; give mask values by label"),
        ({"tiers": {}}, "tool.tiers is missing"),
        ({"tiers": {"Face": -0.1}}, "tool.tiers must have values between 0 and 1, got -0.1"),
        ({"other": 2.0}, "tool.other must have values between 0 and 1, got 2.0"),
    ],
)
def test_parser_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HumanParser(**{"model": "x", "tiers": {"Face": 1.0}} | settings)


# ---------------------------------------------------------------- loading


def test_models_that_are_not_there_or_others_are_refused_before_anything_is_written(models, tmp_path):
    save(tmp_path / "in" / "p.png", scene())
    for model, message in [
        (tmp_path / "nowhere", "cannot be loaded as a AutoModelForSemanticSegmentation"),
        ("someone/nothing", "tool.model=someone/nothing cannot be loaded"),
        (models / "clipseg", "cannot be loaded as a AutoModelForSemanticSegmentation: Unrecognized configuration"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={model}", "tool.tiers={Hair:1.0}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "corrupt", "lacking", "no processor", "torchvision"])
def test_damaged_models_are_refused(models, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    save(tmp_path / "in" / "p.png", scene())
    folder = shutil.copytree(models / "segformer", tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
        message = "cannot be loaded"
    elif damage == "corrupt":
        weights.write_bytes(weights.read_bytes()[:1000])
        message = "cannot be loaded"
    elif damage == "lacking":
        tensors = load_file(weights)
        del tensors["decode_head.classifier.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        message = "lacks 1 weights of a SegformerForSemanticSegmentation, such as decode_head.classifier.weight"
    elif damage == "no processor":
        (folder / "preprocessor_config.json").unlink()
        message = "its image processor cannot be read"
    else:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings["image_processor_type"] = "Sam2ImageProcessor"
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        message = r"its image processor cannot be read \(.*\); pip install 'mpp\[segment\]'"
    with pytest.raises(ValueError, match=message):
        run("human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={folder}", "tool.tiers={Hair:1.0}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "said"), [("cuda:7", "torch finds no GPU"), ("gpu", "is no device")])
def test_devices_that_are_not_there_are_refused(models, tmp_path, device, said):
    save(tmp_path / "in" / "p.png", scene())
    with pytest.raises(ValueError, match=f"device={device}:? ({said})"):
        run(
            "human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={models / 'segformer'}",
            "tool.tiers={Hair:1.0}", f"device={device}",
        )  # fmt: skip


def test_a_model_that_fails_on_an_image_does_not_end_the_run(models, tmp_path, monkeypatch):
    for number, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.png", scene(number))
    parsed = HumanParser._parsed

    def fail(self, image):
        if image.tobytes() == scene(1).tobytes():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return parsed(self, image)

    monkeypatch.setattr(HumanParser, "_parsed", fail)
    with pytest.raises(ValueError, match=r"1 failed(?s:.*)b\.png: the model failed on it \(CUDA out of memory\."):
        run(
            "human_parser",
            tmp_path / "in",
            tmp_path / "out",
            f"tool.model={models / 'segformer'}",
            "tool.tiers={Hair:1.0}",
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_models_are_not_loaded_where_all_is_done_and_corrupt_images_stop_nothing(models, tmp_path):
    save(tmp_path / "in" / "a.png", scene())
    save(tmp_path / "in" / "c.png", scene(1))
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    folder = shutil.copytree(models / "segformer", tmp_path / "model")
    words = ["human_parser", tmp_path / "in", tmp_path / "out", f"tool.model={folder}", "tool.tiers={Hair:1.0}"]
    with pytest.raises(ValueError, match=r"1 failed(?s:.*)b\.png: not a readable image"):
        run(*words)
    (tmp_path / "in" / "b.png").unlink()
    shutil.rmtree(folder)
    assert len(run(*words).kept) == 2
