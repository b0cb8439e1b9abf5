"""Every command of the README and the docs: it composes as it is typed, and runs with tiny models standing in."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mpp import cli, init, run
from tests.documented import REPOSITORY, commands, problems_of, type_in
from tests.families import variants
from tests.helpers import draw_photos
from tests.media.videos import number_frames, write_video

COMMANDS = commands()
OURS = [command for command in COMMANDS if command.name]
OTHERS = [command for command in COMMANDS if not command.name]
ELLIPSIS = {  # what `...` leaves out
    "prepare": ("model=wan", "data.image_dir=photos", "data.mask_dir=masks", "data.cache_dir=cache/mychar"),
    "train": ("model=wan", "data.cache_dir=cache/mychar"),
    "report": ("data.cache_dir=cache/mychar",),
    "sample": ("model=wan", "sampling.prompts=ohwx", "output_dir=out"),
    "masks": ("input=photos", "output=new"),
    "export": ("model=wan", "lora=outputs/mychar"),
    "plan": ("model=wan", "data.cache_dir=cache/mychar"),
    "init": ("model=wan", "images=photos"),
}
HUB = "its weights come from a hub"
NOT_HERE = {  # what does not run on one CPU without a network, by what of the command says so: what it needs
    r"tool=(clipseg|sam2|human_parser)\b": HUB,
    r"model\.pretrained=\S+\.safetensors": "an original file of a real model",
    r"s3://": "a bucket, and s3fs",
    r"^srun ": "a cluster",
    r"logger=wandb": "the extra wandb",
    r"(device|accelerator)=(cuda|gpu)": "a GPU",
    r"optimizer=adamw8bit": "the extra adamw8bit",
    r"(mpp\.masks tool=tiers|mpp\.prepare data\.cache_dir=cache/none)$": "more words: a message is quoted",
}


def identified(found):
    return [pytest.param(command, id=f"{command.page}-{command.line[:60]}") for command in found]


def words_of(command):
    """What is typed behind the module, with what `...` and NAME stand for, without flags that change no settings."""
    words = [word.replace("=NAME", "=salient") for word in command.typed]
    words = [word for word in words if word not in (*cli.SWITCHES, "--help", "--multirun", "-m")]
    if "..." in words:
        said = {word.partition("=")[0] for word in words}
        at = words.index("...")
        words[at : at + 1] = [word for word in ELLIPSIS[command.name] if word.partition("=")[0] not in said]
    return words


def test_there_are_commands_and_none_is_overlooked():
    assert {command.name for command in OURS} == {*run.STAGES, "init", "run", "sample", "export", "plan", "masks"}
    text = "\n".join(path.read_text("utf-8") for path in [*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md"])
    typed = re.findall(r"^\s*(?:\$ )?(python -m mpp\.[^#\n\\]+)", text, re.MULTILINE)
    lines = [command.line for command in OURS]
    assert len(typed) > 40
    assert not [line for line in typed if not any(known.startswith(" ".join(line.split())) for known in lines)]


# ---------------------------------------------------------------- as they are typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands are typed: folders of images and masks, and job files as `mpp.init` writes them."""
    root = tmp_path_factory.mktemp("typed")
    for name in ("photos", "masks", "clips"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        files = {word for c in OURS for word in c.typed if re.fullmatch(r"\w+\.yaml", word)}
        for file in sorted(files):
            init.write(["model=wan", "images=photos", "masks=masks", f"output=outputs/{Path(file).stem}"])
    return root


@pytest.mark.parametrize("command", identified(OURS))
def test_what_is_typed_composes(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = words_of(command)
    if command.name == "init":
        monkeypatch.setattr(init, "call", lambda name, words: len(problems_of(name, words)))
        file = next((word for word in words if word.startswith("output=")), "output=photos").rpartition("/")[2]
        Path(f"{file.removeprefix('output=')}.yaml").unlink(missing_ok=True)
        assert Path(init.write(words)).is_file()
        return
    found = run.commands(words) if command.name == "run" else {command.name: words}
    wrong = [problem for name, meant in found.items() for problem in problems_of(name, meant)]
    if "--help" in command.typed:  # before anything must be said
        wrong = [problem for problem in wrong if "=... is missing" not in problem]
    assert not wrong


def test_what_does_not_compose_would_be_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (said,) = problems_of("train", ["model=wan", "data.cache_dir=c", "loss.prior_treshold=0.1"])
    assert "did you mean loss.prior_threshold" in said
    assert "did you mean wan?" in problems_of("train", ["model=wna", "data.cache_dir=c"])[0]
    assert problems_of("train", ["model=wan"])[0].startswith("data.cache_dir=... is missing")


@pytest.mark.parametrize("command", identified(OTHERS))
def test_other_programs_find_what_is_named(command):
    program, *words = command.words
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in words if "=" not in word and not word.startswith("-")} <= set(targets)
    elif program == "pip":
        extras = {extra for word in words for extra in re.findall(r"(?:^mpp|^\.|\.whl)\[(.*)\]", word)}
        assert {name for extra in extras for name in extra.split(",")} <= set(project["optional-dependencies"])
        assert all((REPOSITORY / words[n + 1]).is_file() for n, word in enumerate(words) if word == "-c")
    elif command.module:
        assert importlib.util.find_spec(command.module) is not None
    assert all((REPOSITORY / word).exists() for word in words if word.startswith(("tests/", "demo/", "docs/")))


# ---------------------------------------------------------------- as they run

TINY = {
    "prepare": ("data.resolution=64", "prepare.workers=0", "device=cpu"),
    "train": (
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "data.num_workers=0",
    ),
    "sample": ("sampling.width=64", "sampling.height=64", "sampling.steps=2", "device=cpu"),
    "masks": ("device=cpu",),
}  # fmt: skip
TINY["run"] = TINY["prepare"] + TINY["train"]
SAMPLES = ("sampling.width=64", "sampling.height=64", "sampling.steps=2")


@pytest.fixture(scope="module")
def small(built):
    """What stands in for a model: settings that come after `model=NAME`, whose weights are tiny and random."""
    known = {variant.overrides[0]: variant for variant in reversed(variants())}

    def settings(words):
        chosen = next((word for word in words if word.startswith("model=")), "model=wan")
        variant = known[chosen]
        own = ("model.dtype=float32", "model.text_dtype=float32", f"model.pretrained={built(variant)}")
        return [*variant.overrides[1:], *own]

    return settings


def model_of(words, root):
    """The word that chooses a command's model, which a job file may do."""
    job = root / words[0] if words and words[0].endswith(".yaml") else None
    said = [] if job is None else [f"model={yaml.safe_load(job.read_text('utf-8'))['model']}"]
    return next((word for word in words if word.startswith("model=")), *(said or ["model=wan"]))


def tiny(command, small, root):
    """A command's words with all that makes it small, which wins over what is typed."""
    words, more = words_of(command), [*TINY.get(command.name, ())]
    if command.name == "run" and words[0].endswith(".yaml"):
        more += ["sampling.prompts=ohwx", *SAMPLES]
    if command.name in ("prepare", "train") and any(word.startswith("sampling.") for word in words):
        more += SAMPLES
    goes_on = cli.goes_on(words)
    if goes_on:
        more[0] = "trainer.max_steps=3"
    elif command.name in ("prepare", "train", "sample", "export", "run"):
        more += small([model_of(words, root)])
    if command.name == "plan" and any(word.startswith("data.cache_dir=") or word.endswith(".yaml") for word in words):
        more += [*small(["model=wan"]), "table=false"]  # of the cache's own size, whatever WAN it is
    keys = {word.partition("=")[0] for word in more}
    kept = [word for word in words if word.partition("=")[0] not in keys]
    return [*kept, *more, *(["--multirun"] if "--multirun" in command.typed else [])]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, small):
    """Images, videos, masks, job files, a cache, a run and its LoRA under other names."""
    root = tmp_path_factory.mktemp("workspace")
    draw_photos(root / "photos", root / "masks", count=4)
    for caption in (root / "photos").glob("*.txt"):
        caption.write_text(f"a photo of ohwx, {caption.stem}\n")
    shutil.copytree(root / "masks", root / "soft")
    (root / "clips").mkdir()
    write_video(root / "clips" / "walk.mp4", number_frames(90))
    Image.fromarray(np.full((64, 96), 255, np.uint8)).save(root / "masks" / "walk.png")
    (root / "prompts.txt").write_text("a photo of ohwx\nohwx at the beach\n")
    (root / "my_datasets.yaml").write_text("photos: {image_dir: photos, mask_dir: masks, repeats: 3}\n")
    for page in (REPOSITORY / "docs").glob("*.md"):
        for file, job in re.findall(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            (root / file).write_text(job, "utf-8")
    said(root, "init", "model=wan", "images=photos", "masks=masks", "output=outputs/mychar")
    said(root, "init", "model=wan", "images=photos", "masks=masks")
    model = small(["model=wan"])
    said(root, "prepare", "mychar.yaml", *model, *TINY["prepare"])
    said(root, "prepare", *model, "data.cache_dir=cache/mychar", "export=musubi", "export_dir=datasets/mychar/cache")
    said(root, "train", "mychar.yaml", *model, *TINY["train"])
    for name in ("mychar", "style", "lightning"):
        shutil.copy(root / "outputs" / "mychar" / "lora.safetensors", root / f"{name}.safetensors")
    return root


def said(folder, name, *words):
    """What a command says that ends well."""
    code, text = type_in(folder, name, words)
    assert code == 0, f"mpp.{name} {' '.join(words)}\n{text}"
    return text


def make_room(root, command, words):
    """Take away what a command is to make, and copy what it reads under another name."""
    typed = dict(word.partition("=")[::2] for word in words if "=" in word)
    if command.name in ("train", "run") and not cli.goes_on(words):
        shutil.rmtree(root / "outputs")
    if command.name == "export":  # training makes one already
        (root / "outputs" / "mychar" / "lora_comfyui.safetensors").unlink()
    if command.name == "init":
        for file in ("mychar", "photos"):
            (root / f"{file}.yaml").unlink()
    if (
        command.name == "masks"
        and "output" in typed
        and typed["output"] not in (typed["input"], typed.get("tool.masks"))
    ):
        shutil.rmtree(root / typed["output"], ignore_errors=True)
    for key, like in {"data.cache_dir": "cache/mychar", "resume": "outputs/mychar", "lora": "outputs/mychar"}.items():
        target = root / typed.get(key, like).partition("/lora")[0]
        if command.name != "prepare" and not target.exists() and (root / like).exists() and "[" not in target.name:
            shutil.copytree(root / like, target)


@pytest.mark.slow
@pytest.mark.parametrize("command", identified([command for command in OURS if "--help" not in command.typed]))
def test_what_is_typed_runs(command, workspace, small, tmp_path):
    root = tmp_path / "w"
    shutil.copytree(workspace, root)
    reasons = [reason for sign, reason in NOT_HERE.items() if re.search(sign, command.line)]
    words = tiny(command, small, root)
    make_room(root, command, words)
    encoded = [word for word in words if re.match(r"sampling\.|data\.preservation\.(replace|caption)=", word)]
    model = model_of(words, root)
    if command.name == "train" and (encoded or model != "model=wan") and not cli.goes_on(words):
        if model != "model=wan":  # whose cache is there
            shutil.rmtree(root / "cache" / "mychar")
        more = [model, *ELLIPSIS["prepare"][1:]]  # embeddings are a cache's
        said(root, "prepare", *more, *small([model]), *TINY["prepare"], *encoded)
    alone = command.line.startswith("torchrun") or any(word.startswith("trainer.devices=") for word in words)
    if command.line.startswith("srun"):
        assert shutil.which("srun") is None  # else it runs here
        return
    code, text = in_processes(root, command, words) if alone else type_in(root, command.name, words)
    assert (code != 0) == bool(reasons), text  # what is listed does not run here, and all else does
    assert "Traceback" not in text


def in_processes(root, command, words):
    """Several processes, started as the command starts them."""
    starter = ["torch.distributed.run", "--nproc-per-node", "2", "-m"] if command.line.startswith("torchrun") else []
    line = [sys.executable, "-m", *starter, f"mpp.{command.name}", *words]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr
