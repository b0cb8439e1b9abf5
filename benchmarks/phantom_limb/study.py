"""Data, runs and measures of the experiment; everything trains through `mpp.prepare` and `mpp.train`."""

import contextlib
import hashlib
import io
import json
import logging
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

import mpp.prepare
import mpp.train
from benchmarks.phantom_limb.detectors import GROUND_SHARE, background_off, find, grow, object_faults, objects
from benchmarks.phantom_limb.sampling import draw_noise, sample, toy, write_images
from benchmarks.phantom_limb.world import (
    SIZE,
    SUBJECTS,
    Scenes,
    Subject,
    named_scenes,
    object_coverage,
    render,
    subject_scenes,
)
from mpp.batching.batch import Collate
from mpp.batching.datamodule import CachedSamples
from mpp.batching.loader import ValidationLoader
from mpp.cache.format import Cache
from mpp.config import compose
from mpp.core import draws
from mpp.core.loss import MaskedPriorLoss
from mpp.files import weights_fingerprint, write_json
from mpp.models.contract import Architecture
from mpp.training.metrics import LossMetrics
from mpp.training.module import MaskedPriorModule
from mpp.training.step import MaskedPriorStep, WholePasses

HERE = Path(__file__).parent
BASE = HERE / "base"
NOISE_SEEDS = {"subject": 1000, "others": 2000}
JUDGE_SEED = 12345
KEPT = 8  # images of each run that are kept for the grid


def protocol() -> DictConfig:
    """The protocol as committed."""
    return OmegaConf.load(HERE / "protocol.yaml")


def generator(*names: object) -> torch.Generator:
    """Random numbers that depend on names alone."""
    return draws.generator(0, "phantom limb", " ".join(map(str, names)))


# ---------------------------------------------------------------- data


def make_data(root: Path, name: str, base: Path, rules: DictConfig, halo: Mapping[str, float]) -> None:
    """Write a subject's images, masks and captions, prepare them, and generate the base's images to compare with.

    Args:
        root: Folder of this fine-tune set.
        name: The subject.
        base: Folder of the base model.
        rules: The protocol.
        halo: Second tier of the masks.
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
        masks = []
        if kind != "others":
            write_masks(scenes, halo, root / kind / "masks")
            masks = [f"data.mask_dir={root / kind / 'masks'}"]
        if kind == "train":
            masks += [f"data.preservation.replace={{{name}:object}}", "data.preservation.caption=''"]
        prepare(root / kind, base, masks)
    for kind in ("train", "clean"):
        prepare(root / kind, base, [], cache="unmasked")
    architecture = toy(pretrained=str(base))
    for kind, images in generate(architecture, architecture.load_transformer(), name, rules).items():
        torch.save(images, root / f"base_{kind}.pt")


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


def write_masks(scenes: Scenes, halo: Mapping[str, float], folder: Path) -> None:
    """Tiered masks: white on the object, grey around it, black elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = object_coverage(scenes) > 0.5
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


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        variant: Its name.
        subject: Whose fine-tune set.
        seed: Of adapter and draws.
        steps: Optimizer steps.
        cache: The training cache.
        settings: Overrides that make the variant.
    """

    variant: str
    subject: str
    seed: int
    steps: int
    cache: Path
    settings: tuple[str, ...]


def jobs(rules: DictConfig, root: Path, variants: Mapping[str, DictConfig], seeds: Sequence[int]) -> list[Job]:
    """All runs of some variants."""
    folders = {"clean": ("clean", "unmasked"), "unmasked": ("train", "unmasked"), "train": ("train", "cache")}
    found = []
    for seed in seeds:
        for subject in rules.subjects:
            for name, variant in variants.items():
                cache = root / subject / Path(*folders[variant.get("data", "train")])
                steps = round(rules.steps * variant.get("steps_factor", 1.0))
                paths_of = {"<data>": str(root / subject), "<subject>": subject}
                settings = [_filled(setting, paths_of) for setting in variant.set]
                found.append(Job(name, subject, seed, steps, cache, tuple(settings)))
    return found


def _filled(setting: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        setting = setting.replace(name, value)
    return setting


def train(job: Job, base: Path, folder: Path) -> tuple[MaskedPriorModule, float]:
    """`python -m mpp.train` for one job; returns the trained module and the seconds of its fit."""
    settings = [
        "experiment=phantom_limb",
        f"model.pretrained={base}",
        f"data.cache_dir={job.cache}",
        f"output_dir={folder}",
        "export.formats=[]",  # no other program has the toy model
        f"seed={job.seed}",
        f"trainer.max_steps={job.steps}",
        f"callbacks.checkpoints.every_n_steps={job.steps}",
        "callbacks.report=null",
        "trainer.enable_progress_bar=false",
        *job.settings,
    ]
    quiet()
    started = time.time()
    _, module = mpp.train.run(configured("train", settings))
    return module, time.time() - started


def quiet() -> None:
    """Leave out what Lightning says about every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("mpp").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


# ---------------------------------------------------------------- measures


def measure(module: MaskedPriorModule, name: str, root: Path, rules: DictConfig) -> tuple[dict[str, float], Tensor]:
    """All measures of a trained module, and the images that are kept.

    Args:
        module: Holds the transformer with its adapter.
        name: The subject.
        root: Folder of the fine-tune set.
        rules: The protocol.
    """
    prompts = prompts_of(name, rules)
    images = generate(module.architecture, module.transformer, name, rules)
    values = generated(images["subject"], torch.load(root / "base_subject.pt"), SUBJECTS[name], name, rules)
    values |= damage(images["others"], torch.load(root / "base_others.pt"), prompts["others"], SUBJECTS[name])
    for kind in ("held_out", "alone"):
        terms = held_out_terms(module, root / kind / "cache", rules)
        low = held_out_terms(module, root / kind / "cache", rules, list(rules.low_sigmas))
        values |= {f"{kind}_error": terms["target_loss"], f"{kind}_drift": terms["drift"]}
        values[f"{kind}_error_low"] = low["target_loss"]
    kept = torch.cat([images["subject"][:KEPT], images["others"][:KEPT]])
    return values, kept


def generated(images: Tensor, base: Tensor, subject: Subject, name: str, rules: DictConfig) -> dict[str, float]:
    """What images generated with the trigger word show.

    `success`: share with a whole subject. `phantom`: share of pixels in its colours away from it. `bystander` and
    `ground`: share with its company. `background`: mean squared distance to the base's own image of the same noise,
    where neither the found subject nor the base's object is; `rim`: the same within 2 to 5 pixels of the subject.
    `area`: pixels in its colours over those of a real one.
    """
    found = find(images, subject)
    outside = ~grow(found.location, 2) & ~grow(objects(base), 2)
    rim = outside & grow(found.location, 5)
    squared = (images - base).square().mean(1)
    scenes, _ = subject_scenes(subject, rules.held_out, generator(name, "alone"), alone=True)
    real = find(render(scenes), subject).area.float().mean()
    return {
        "success": found.success.float().mean().item(),
        "phantom": found.phantom.float().mean().item() / SIZE**2,
        "bystander": found.bystander.float().mean().item(),
        "ground": found.ground.float().mean().item(),
        "background": (squared[outside].sum() / outside.sum()).item(),
        "rim": (squared[rim].sum() / rim.sum().clamp(min=1)).item(),
        "area": (found.area.float().mean() / real).item(),
    }


def damage(images: Tensor, base: Tensor, captions: Sequence[str], subject: Subject) -> dict[str, float]:
    """What images generated without the trigger word have come to.

    `other_distance`: mean squared distance to the base's own images of the same noise, over their variance.
    `other_malformed`: share whose object is not whole, single, of the named shape and colour. `other_background`:
    share with a bad background. `other_leak`: share of pixels in the subject's colours.
    """
    faults = object_faults(images, list(captions))
    return {
        "other_distance": ((images - base).square().mean() / base.var()).item(),
        "other_malformed": sum(map(bool, faults)) / len(faults),
        "other_background": (background_off(images, list(captions)) > GROUND_SHARE).float().mean().item(),
        "other_leak": find(images, subject).area.float().mean().item() / SIZE**2,
    }


def held_out_terms(
    module: MaskedPriorModule, folder: Path, rules: DictConfig, sigmas: Sequence[float] | None = None
) -> dict[str, float]:
    """Validation's terms on a cache it was not trained on, under one loss for all variants.

    Args:
        module: Holds the transformer with its adapter.
        folder: The cache.
        rules: The protocol.
        sigmas: Noise levels; None: four quantiles of the training law, as in any validation.
    """
    cache = Cache(folder)
    entries = cache.entries()
    architecture = module.architecture
    loader = ValidationLoader(
        CachedSamples(cache, entries, architecture), [e.shape for e in entries], 32, Collate(architecture)
    )
    loss = MaskedPriorLoss(**rules.judge)
    step = MaskedPriorStep(architecture, loss, WholePasses(architecture, module.transformer, module.teacher))
    measured = LossMetrics(loss)
    for batch in loader:
        for output in step.measure(batch, JUDGE_SEED, sigmas):
            measured.update(output)
    return measured.compute()


def result(results: Path, job: Job) -> Path:
    """Where a job's measures go."""
    return results / "runs" / f"{job.variant}-{job.subject}-{job.seed}.json"


def fingerprint(base: Path, rules: DictConfig, *facts: object) -> str:
    """Of all that data or a result depend on but code: base, the protocol's numbers, and further facts."""
    plain = OmegaConf.to_container(rules)
    numbers = {name: value for name, value in plain.items() if not (isinstance(value, dict) and "variants" in value)}
    shared = {name: value for name, value in numbers.items() if name not in ("subjects", "seeds", "full_seeds")}
    return hashlib.sha256(json.dumps([weights_fingerprint(base), shared, *facts]).encode()).hexdigest()[:16]


def run(job: Job, base: Path, root: Path, results: Path) -> Path:
    """Train and measure one job unless its result is there; returns the result's file.

    A result of another base, another protocol or other settings is made anew.
    """
    torch.set_num_threads(1)
    file, name, rules = result(results, job), f"{job.variant}-{job.subject}-{job.seed}", protocol()
    source = fingerprint(base, rules, job.variant, job.subject, job.seed, job.steps, job.settings)
    if file.is_file() and json.loads(file.read_text()).get("made_from") == source:
        return file
    shutil.rmtree(results / "training" / name, ignore_errors=True)  # stopped between training and result
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module, seconds = train(job, base, results / "training" / name)
        values, kept = measure(module, job.subject, root / job.subject, rules)
    torch.save((kept * 255).round().byte(), results / "training" / name / "kept.pt")
    record = {"variant": job.variant, "subject": job.subject, "seed": job.seed, "steps": job.steps, "made_from": source}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record | {"seconds": round(seconds, 1)} | {k: round(v, 6) for k, v in values.items()})
    return file


def parameters(transformer: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in transformer.parameters())
