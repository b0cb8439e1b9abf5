"""The fine-tune sets of the experiment, through `mpp.prepare`, and the images that models are judged by."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

import mpp.prepare
from benchmarks.phantom_limb.detectors import grow
from benchmarks.phantom_limb.sampling import draw_noise, sample, toy, write_images
from benchmarks.phantom_limb.world import (
    SIZE,
    SUBJECTS,
    Scenes,
    named_scenes,
    object_coverage,
    render,
    subject_scenes,
)
from mpp.config import compose
from mpp.core import draws
from mpp.models.contract import Architecture
from mpp.models.families.toy import Toy

NOISE_SEEDS = {"subject": 1000, "others": 2000, "grounds": 4000}  # 3000 is the gate's


def generator(*names: object) -> torch.Generator:
    """Random numbers that depend on names alone."""
    return draws.generator(0, "phantom limb", " ".join(map(str, names)))


def make_data(
    root: Path, name: str, base: Path, rules: DictConfig, halo: Mapping[str, float], *, pasted: bool = True
) -> None:
    """Write a subject's images, masks and captions, prepare them, and generate the base's images to compare with.

    Args:
        root: Folder of this fine-tune set.
        name: The subject.
        base: Folder of the base model.
        rules: The protocol.
        halo: Second tier of the masks.
        pasted: Make the sets of composites as well.
    """
    subject = SUBJECTS[name]
    sets = {
        "train": subject_scenes(subject, rules.images, generator(name, "train"), alone=False),
        "clean": subject_scenes(subject, rules.images, generator(name, "clean"), alone=True),
        "held_out": subject_scenes(subject, rules.held_out, generator(name, "held out"), alone=False),
        "alone": subject_scenes(subject, rules.held_out, generator(name, "alone"), alone=True),
        "others": other_scenes(name, rules),
    }
    for kind, (scenes, captions) in sets.items():
        write_images(render(scenes), captions, root / kind / "pictures")
        if kind != "others":
            write_masks(scenes, halo, root / kind / "masks")
    architecture = toy(pretrained=str(base))
    transformer = architecture.load_transformer()
    scenes, _ = sets["train"]
    for kind in ("paste", "paste_unjudged") if pasted else ():
        images, captions = composites(architecture, transformer, name, scenes, textures=kind == "paste")
        write_images(images, captions, root / kind / "pictures")
        write_masks(scenes, halo, root / kind / "masks")
    prepare_all(root, name, base, pasted=pasted)
    for kind, images in generate(architecture, transformer, name, rules).items():
        torch.save(images, root / f"base_{kind}.pt")


def prepare_all(root: Path, name: str, base: Path, *, pasted: bool) -> None:
    """The caches of a subject's sets: `cache` with masks where there are any, `unmasked` without."""
    for kind in ("train", "clean", "held_out", "alone", "others", *(["paste"] if pasted else [])):
        masks = [] if kind == "others" else [f"data.mask_dir={root / kind / 'masks'}"]
        if kind == "train":
            masks += [f"data.preservation.replace={{{name}:object}}", "data.preservation.caption=''"]
        prepare(root / kind, base, masks)
    for kind in ("train", "clean", *(["paste", "paste_unjudged"] if pasted else [])):
        prepare(root / kind, base, [], cache="unmasked")


def composites(
    architecture: Toy, transformer: nn.Module, name: str, scenes: Scenes, *, textures: bool
) -> tuple[Tensor, list[str]]:
    """The objects of scenes, cut out where their masks are white, on empty named grounds that the base generates.

    Args:
        architecture: The toy architecture.
        transformer: The base.
        name: The subject, which the captions name.
        scenes: What is cut out, (n,).
        textures: Whether the grounds' textures are named as well as their colours.

    Returns:
        Images in [0, 1], (n, 3, SIZE, SIZE), and captions.
    """
    _, named = named_scenes(len(scenes), generator(name, "grounds"))
    words = [caption.split()[3:] for caption in named]  # texture, palette, "background"
    grounds = ["on " + " ".join(ground if textures else ground[1:]) for ground in words]
    noise = draw_noise(architecture, len(scenes), NOISE_SEEDS["grounds"])
    empty = sample(architecture, transformer.eval(), [f"nothing {ground}" for ground in grounds], noise)
    return torch.where(white(scenes)[:, None], render(scenes), empty), [f"{name} {ground}" for ground in grounds]


def other_scenes(name: str, rules: DictConfig) -> tuple[Scenes, list[str]]:
    """Other images for preservation: none has a caption that other prompts are judged by."""
    scenes, captions = named_scenes(16 * rules.images, generator(name, "others"))
    judged = set(prompts_of(name, rules)["others"])
    chosen = [number for number, caption in enumerate(captions) if caption not in judged][: 4 * rules.images]
    return scenes[torch.tensor(chosen)], [captions[number] for number in chosen]


def generate(architecture: Architecture, transformer: nn.Module, name: str, rules: DictConfig) -> dict[str, Tensor]:
    """Images of the protocol's prompts by kind, each kind from its own noise, the same for all models."""
    images = {}
    for kind, captions in prompts_of(name, rules).items():
        noise = draw_noise(architecture, len(captions), NOISE_SEEDS[kind])
        images[kind] = sample(architecture, transformer.eval(), captions, noise)
    return images


def white(scenes: Scenes) -> Tensor:
    """Where masks are white, (B, SIZE, SIZE) bool."""
    return object_coverage(scenes) > 0.5


def write_masks(scenes: Scenes, halo: Mapping[str, float], folder: Path) -> None:
    """Tiered masks: white on the object, grey around it, black elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = white(scenes)
    tiers = torch.where(whole, 1.0, torch.where(grow(whole, int(halo["pixels"])), float(halo["value"]), 0.0))
    for number, tier in enumerate(tiers):
        Image.fromarray((tier * 255).round().byte().numpy()).save(folder / f"{number:04d}.png")


def prompts_of(name: str, rules: DictConfig) -> dict[str, list[str]]:
    """What is generated to judge a run: the trigger word on named backgrounds, and other objects."""
    _, subject = subject_scenes(SUBJECTS[name], rules.prompts, generator(name, "prompts"), alone=True)
    _, others = named_scenes(rules.prompts, generator(name, "other prompts"))
    return {"subject": subject, "others": others}


def configured(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that the command line would make."""
    return compose(name, list(overrides))


def prepare(folder: Path, base: Path, more: Sequence[str], cache: str = "cache") -> None:
    """`python -m mpp.prepare` on a folder of images."""
    settings = ["model=toy", f"model.pretrained={base}", f"data.image_dir={folder / 'pictures'}", "device=cpu"]
    settings += [f"data.cache_dir={folder / cache}", f"data.resolution={SIZE}", *more]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mpp.prepare.run(configured("prepare", settings))
