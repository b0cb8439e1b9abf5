"""Runs and measures of the experiment; everything trains through `mpp.train`."""

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
from torch import Tensor, nn

import mpp.train
from benchmarks.phantom_limb.detectors import GROUND_SHARE, background_off, find, grow, object_faults, objects
from benchmarks.phantom_limb.fine_tune_sets import configured, generate, generator, prompts_of
from benchmarks.phantom_limb.world import (
    SIZE,
    SUBJECTS,
    Subject,
    render,
    subject_scenes,
)
from mpp.batching.batch import Collate
from mpp.batching.datamodule import CachedSamples
from mpp.batching.loader import ValidationLoader
from mpp.cache.format import Cache
from mpp.core.loss import MaskedPriorLoss
from mpp.files import weights_fingerprint, write_json
from mpp.training.metrics import LossMetrics
from mpp.training.module import MaskedPriorModule
from mpp.training.passes import WholePasses
from mpp.training.step import MaskedPriorStep

HERE = Path(__file__).parent
BASE = HERE / "base"
CACHES = {  # `data` of the protocol: set and cache
    "train": ("train", "cache"),
    "unmasked": ("train", "unmasked"),
    "clean": ("clean", "unmasked"),
    "paste": ("paste", "unmasked"),
    "paste_masks": ("paste", "cache"),
    "paste_unjudged": ("paste_unjudged", "unmasked"),
}
JUDGE_SEED = 12345
KEPT = 8  # images of each run that are kept for the grid


def protocol() -> DictConfig:
    """The protocol as committed."""
    return OmegaConf.load(HERE / "protocol.yaml")


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
    found = []
    for seed in seeds:
        for subject in rules.subjects:
            for name, variant in variants.items():
                cache = root / subject / Path(*CACHES[variant.get("data", "train")])
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
