"""Prompts as they are written: one, a list or a file, with options behind them."""

import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

import mpp.sample
from mpp import cli
from mpp.cache.format import Cache
from mpp.models.contract import Identity, ImageInputs
from mpp.sampling.prompt_lines import OPTIONS, prompt_lines
from mpp.sampling.prompts import Prompts
from tests.helpers import config, draw_photos, prepare, train

DOCS = Path(__file__).parents[2]
SHOWN = {  # what readers will take the commands of the documentation for
    "a photo of ohwx in a park, at dusk": "a photo of ohwx in a park, at dusk",
    "prompts.txt": "prompts.txt",
    "ohwx": "ohwx",
    '["a red box, a dog", ohwx at the beach]': ["a red box, a dog", "ohwx at the beach"],
    "a red box, a dog, and more": "a red box, a dog, and more",
    "ohwx at the beach": "ohwx at the beach",
    "a photo of ohwx": "a photo of ohwx",
    "ohwx at the beach, at dusk": "ohwx at the beach, at dusk",
    "a photo of ohwx, at dusk": "a photo of ohwx, at dusk",
    "[a park, a street]": ["a park", "a street"],
    "[]": [],
}


def typed(command, text):
    """What Hydra makes of it behind the front."""
    (word,) = cli.overrides(command, [f"sampling.prompts={text}"])
    assert cli.overrides(command, [word]) == [word]
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize(
    "file", ["README.md", "docs/start.md", "docs/prompts.md", "docs/job.md", "docs/export.md", "configs/sample.yaml"]
)
def test_prompts_in_the_documentation_are_what_they_look_like(file):
    found = []
    for line in (DOCS / file).read_text().splitlines():
        code = [line] if "python -m" in line else re.findall(r"`([^`]+)`", line)
        words = [word for part in code if "sampling.prompts=" in part for word in shlex.split(part, comments=False)]
        found += [word.partition("=")[2] for word in words if word.startswith("sampling.prompts=")]
    assert found
    assert [typed("sample", text) for text in found] == [SHOWN[text] for text in found]


def drawn_prompt(draws, letters="ab ,;.'\"()[]{}=:#%~|\\äßé日-…!?"):
    return "".join(draws.choices(letters, k=draws.randint(1, 20))).strip() or "a"


def test_one_prompt_is_typed_as_it_is():
    draws = random.Random(0)
    for _ in range(500):
        text = drawn_prompt(draws)
        if text[0] in "'\"" or (text[0], text[-1]) == ("[", "]"):
            continue
        assert typed("train", text) == text


def test_a_list_holds_the_prompts_between_its_commas_or_quotes():
    draws = random.Random(1)
    for _ in range(500):
        prompts = [drawn_prompt(draws, "ab ,.'()äß日-!") for _ in range(draws.randint(1, 4))]
        plain = ["," not in text and text[0] != "'" for text in prompts]
        written = [text if as_it_is else f'"{text}"' for text, as_it_is in zip(prompts, plain, strict=True)]
        assert typed("prepare", f"[{', '.join(written)}]") == prompts


def test_a_file_gives_its_lines_with_their_options(tmp_path):
    file = tmp_path / "my, prompts.TXT"
    file.write_text(
        "\ufeff# a comment --x\n\nein Würfel, 'rot' --W 832 --h 480\r\n  # another\n"
        "a dog --f 49 --d 42 --n blurry, bad-hands --l 4.5 --s 7\nno option -- at all, well-made\n--w 64\n",
        "utf-8",
    )
    found = prompt_lines(str(file))
    assert [(line.text, line.options) for line in found] == [
        ("ein Würfel, 'rot'", {"width": 832, "height": 480}),
        (
            "a dog",
            {"frames": 49, "seed": 42, "negative_prompt": "blurry, bad-hands", "guidance_scale": 4.5, "steps": 7},
        ),
        ("no option -- at all, well-made", {}),
        ("", {"width": 64}),
    ]
    assert found[1].where == f"{file}, line 5"
    assert [line.options for line in prompt_lines(["a --g 2", "b.txt"])] == [{"guidance_scale": 2.0}, {}]
    assert prompt_lines("") == prompt_lines([]) == []


def test_drawn_options_come_back(tmp_path):
    draws, file = random.Random(2), tmp_path / "p.txt"
    for _ in range(100):
        letters = draws.sample([letter for letter in OPTIONS if letter not in "gi"], draws.randint(0, 8))
        values = {letter: drawn_prompt(draws) if letter in ("n", "ci") else draws.randint(1, 99) for letter in letters}
        text = drawn_prompt(draws, "abc ,'\"äß")
        if any(re.search(r"(^|\s)--\w", str(value)) for value in [text, *values.values()]):
            continue
        file.write_text(" ".join([text, *(f"--{letter} {value}" for letter, value in values.items())]), "utf-8")
        (line,) = prompt_lines(str(file))
        names = {OPTIONS[letter][0]: [value] if letter == "ci" else value for letter, value in values.items()}
        assert (line.text, line.options) == (text, names)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a --q 3", r"p.txt, line 2: --q is not an option of a prompt; there are --w width, --h height"),
        ("a --widht 64", r"line 2: --widht is not an option of a prompt; width is --w; there are"),
        ("a --fs 3.0", r"--fs is not an option"),
        ("a --w", r"line 2: --w \(width\) must be a whole number, got ''"),
        ("a --f 4.5", r"--f \(frames\) must be a whole number, got '4.5'"),
        ("a --f 0", r"--f \(frames\) must be at least 1, got 0"),
        ("a --l high", r"--l \(guidance_scale\) must be a number, got 'high'"),
        ("a --ci", r"--ci \(controls\) must be an image file"),
        ("a --l 3 --g 2", r"line 2: guidance_scale is there twice, with --g 2"),
        ("#", r"p.txt holds no prompt; write one on each line"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_line(tmp_path, monkeypatch, written, message):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text(f"# first\n{written}\n")
    with pytest.raises(ValueError, match=message):
        Prompts("p.txt")
    with pytest.raises(ValueError, match="none.txt is not there; give a text file"):
        Prompts("none.txt")
    with pytest.raises(ValueError, match="entry 2: --q is not"):
        Prompts(["a", "b --q"])


def test_what_the_model_cannot_generate_is_named_by_its_line(architecture, tmp_path, monkeypatch):
    small = {"width": 64, "height": 48}
    with pytest.raises(ValueError, match=r"entry 2: width must be a multiple of 16 for this model, got 60"):
        Prompts(["a", "b --w 60"], **small).check(architecture)
    with pytest.raises(ValueError, match=r"entry 1: frames must be a multiple of 4 plus 1 for this model, got 4"):
        Prompts(["b --f 4"], **small).check(architecture)
    monkeypatch.setattr(type(architecture), "images", ImageInputs(1, 2))
    Image.new("RGB", (20, 30)).save(tmp_path / "a b.png")
    with_image = f"a --ci {tmp_path}/a b.png"
    Prompts([with_image, f"{with_image} --ci {tmp_path}/a b.png"], **small).check(architecture)
    with pytest.raises(ValueError, match="entry 1 names its images, as sampling.controls does"):
        Prompts([with_image], controls=[["x"]])


def test_each_prompt_is_cached_and_read_with_its_own_settings(architecture, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat --w 32 --f 5 --d 3 --s 1 --l 2 --n dull\na cat --l 1\na dog\n")
    prompts = Prompts(str(file), negative_prompt="blur", guidance_scale=4.0, width=64, height=48, steps=2)
    encoders, cache = architecture.load_encoders("cpu"), Cache(tmp_path / "cache")
    assert prompts.encode(architecture, encoders, cache, Identity(None, "v", "t")) == 3
    first, second, third = prompts.read(architecture, cache)
    told = [
        (g.width, g.height, g.frames, g.seed, g.steps, g.guidance_scale)
        for g in (first.generation, second.generation, third.generation)
    ]
    assert told == [(32, 48, 5, 3, 1, 2.0), (64, 48, 1, 0, 2, 1.0), (64, 48, 1, 0, 2, 4.0)]
    assert (first.prompt, second.negative) == ("a cat", None)
    assert not torch.equal(first.negative.text, third.negative.text)
    assert torch.equal(first.positive.text, second.positive.text)


@pytest.mark.slow
def test_a_file_of_prompts_from_preparing_to_samples(pipeline, tmp_path):
    draw_photos(tmp_path / "photos", tmp_path / "masks", count=2)
    file = tmp_path / "my prompts.txt"
    file.write_text("a red box, a dog --w 32 --h 48\n# none\na cat --f 5 --n dull\n")
    words = [f"sampling.prompts={file}", "sampling.width=64", "sampling.height=64", "sampling.steps=1"]
    assert "prompts for samples: 2" in prepare(pipeline, tmp_path, *words).lines()
    train(pipeline, tmp_path / "cache", tmp_path / "run", *words)
    made = tmp_path / "run" / "samples" / "step-000004"
    for part in ("base", "lora"):
        with Image.open(made / f"0_a_red_box_a_dog_{part}.png") as image:
            assert image.size == (32, 48)
    assert (made / "1_a_cat.mp4").is_file()
    arguments = ["model=tiny_wan", f"model.pretrained={pipeline}", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    files = mpp.sample.run(config("sample", [*arguments, f"lora={tmp_path / 'run'}", *words]))
    both = [path.name for path in files if path.stem.rpartition("_")[2] not in ("base", "lora")]
    assert both == ["0_a_red_box_a_dog.png", "1_a_cat.png", "1_a_cat.mp4"]
