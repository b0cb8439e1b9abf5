"""What several tests need: configs, drawn images, batches."""

import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jaxtyping
import numpy as np
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors import safe_open

import mpp.prepare
import mpp.train
from mpp import cli
from mpp.batching.batch import Batch
from mpp.config import CONFIG_DIR, build, compose
from mpp.core.loss import MaskedPriorLoss
from mpp.lora.adapters import Adapter
from mpp.models.families.wan import WanConditioning
from mpp.training.module import MaskedPriorModule
from mpp.training.step import Position
from mpp.training.teacher import Teacher

QUIET = ["trainer.enable_progress_bar=false"]


PLAIN = ["callbacks.report.pictures=0", "callbacks.page=null"]  # which are a third of a short run
_SETTING = re.compile(r"(?!hydra\.)((?!_target_)\w+\.?)+=")
_SHOWN = re.compile(r"~?callbacks\.(report|page)|resume=|ckpt_path=")  # whoever types these gets both


def unchecked_error(call: Callable[..., object], *arguments, **settings) -> str:
    """Type and message of a call's error, or `accepted`; without the run's type checker, which would answer first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        call(*arguments, **settings)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return "accepted"


def config(name, overrides):
    """A composed configuration, as the command line makes it; preparing without worker processes of its own.

    Composing takes longer than many a test, so it is done once for all that differ in plain settings alone: these are
    put into a copy, by the function that does so while composing.
    """
    words = cli.overrides(name, ["prepare.workers=0", *overrides] if name == "prepare" else overrides)
    if any(word.startswith(("resume=", "ckpt_path=")) for word in words):
        return compose(name, words)  # what is composed lies in a file
    plain = [word for word in words if _SETTING.match(word) and not (CONFIG_DIR / word.partition("=")[0]).is_dir()]
    try:
        composed = pickle.loads(_composed(name, *(word for word in words if word not in plain)))
        typed = OverridesParser.create().parse_overrides(plain)
    except (HydraException, ValueError):  # of all words together, more may be said
        return compose(name, words)
    if not all(_is_checked_later(override, composed) for override in typed):
        return compose(name, words)
    ConfigLoaderImpl._apply_overrides_to_config(typed, composed)
    return composed


def _is_checked_later(override, composed):
    """Whether nothing is said while composing of what is typed: it is of a class, or a value in place of another."""
    above, _, name = override.key_or_group.rpartition(".")
    node = OmegaConf.select(composed, above, default=None) if above else composed
    if override.is_sweep_override() or not isinstance(node, DictConfig) or name not in node.keys():  # noqa: SIM118 (???)
        return False
    values = override.value(), node._get_node(name)
    return "_target_" in node or values[0] is None or not any(isinstance(value, dict | DictConfig) for value in values)


@cache
def _composed(name, *overrides):
    return pickle.dumps(compose(name, list(overrides)))  # read in a fifth of the time that a deep copy takes


def architecture(pipeline, *overrides):
    """The tiny WAN with its weights at `pipeline`."""
    cfg = config("prepare", ["model=tiny_wan", f"model.pretrained={pipeline}", "data.cache_dir=x", *overrides])
    return build(cfg.model)


def draw_photos(photos: Path, masks: Path, count: int = 8):
    """Noise images in two shapes with a bright rectangle; a mask of it for all but every fourth; captions."""
    random = np.random.default_rng(0)
    photos.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(count):
        height, width = ((64, 64), (48, 96))[number % 2]
        pixels = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        box = slice(8 + number, 40), slice(10, 24 + 4 * number)
        pixels[box] = (250, 240, 30 * number)
        mask[box] = 255
        mask[:8, :8] = 80
        Image.fromarray(pixels).save(photos / f"p{number}.png")
        (photos / f"p{number}.txt").write_text(f"a yellow box {number % 3}\n")
        if number % 4 != 3:
            Image.fromarray(mask).save(masks / f"p{number}.png")


def prepare(pipeline, root: Path, *overrides):
    """Run prepare on `root/photos` and `root/masks` into `root/cache`."""
    cfg = config(
        "prepare",
        [
            "model=tiny_wan",
            f"model.pretrained={pipeline}",
            f"data.image_dir={root / 'photos'}",
            f"data.mask_dir={root / 'masks'}",
            f"data.cache_dir={root / 'cache'}",
            "data.resolution=64",
            "device=cpu",
            *overrides,
        ],
    )
    return mpp.prepare.run(cfg)


def held_by(folder: Path):
    """What the files of a folder hold, by name: safetensors as tensors and metadata, whose order is left to chance."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        held = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
                held = repr(sorted(handle.metadata().items())), {n: (t.dtype, t.tolist()) for n, t in tensors.items()}
        found[path.relative_to(folder).as_posix()] = held
    return found


def train_config(pipeline, cache, out, *overrides):
    """A short float32 run on the tiny WAN."""
    return config(
        "train",
        [
            "model=tiny_wan",
            f"model.pretrained={pipeline}",
            f"data.cache_dir={cache}",
            f"output_dir={out}",
            "data.batch_size=2",
            "data.num_workers=0",
            "trainer.max_steps=4",
            "trainer.precision=32-true",
            "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu",
            "optimizer.lr=1e-3",
            "lora.rank=4",
            "logger=csv",
            *QUIET,
            *(() if any(_SHOWN.match(word) for word in overrides) else PLAIN),
            *overrides,
        ],
    )


def train(pipeline, cache, out, *overrides):
    """Run it."""
    return mpp.train.run(train_config(pipeline, cache, out, *overrides))


def logged(out: Path):
    """Rows of a run's CSV log as dicts of floats by step."""
    (path,) = Path(out).glob("csv/*/metrics.csv")
    lines = path.read_text().splitlines()
    names = lines[0].split(",")
    return [
        {name: float(value) for name, value in zip(names, line.split(","), strict=True) if value} for line in lines[1:]
    ]


def module(arch, loss=None, **settings):
    """A MaskedPriorModule outside any trainer, float32."""
    built = MaskedPriorModule(
        architecture=arch,
        adapter=settings.pop("adapter", Adapter(rank=4, alpha=4)),
        loss=loss or MaskedPriorLoss(prior_weight=1.0, normalization="per_sample"),
        teacher=settings.pop("teacher", Teacher()),
        optimizer=settings.pop("optimizer", torch.optim.AdamW),
        **settings,
    )
    built.configure_model()
    return built


def batch(masks, channels=16, seed=0):
    """A batch with the given masks `(b, 1, f, h, w)`, random latents and text."""
    random = torch.Generator().manual_seed(seed)
    count, _, *cells = masks.shape
    return Batch(
        keys=tuple(f"s{n}" for n in range(count)),
        latents=torch.randn(count, channels, *cells, generator=random),
        mask=masks,
        conditioning=WanConditioning(torch.randn(count, 64, 32, generator=random)),
    )


def corrupted(built, data, epoch=0, sigma=None):
    """A batch with the noise of an epoch."""
    return built.step.corrupt(data, Position(built.seed, epoch), sigma)


def teacher_of(built, noisy, data):
    """What the base model predicts for a batch, where it has something to preserve."""
    samples = built.loss.weights(data.mask).needs_prior().nonzero().flatten().tolist()
    return built.teacher.predict(built.architecture, built.transformer, noisy, data.conditioning, samples)


def student_of(built, noisy, data):
    """What the adapted model predicts for a batch."""
    return built.architecture.velocity(built.transformer, noisy.latents, noisy.sigma, data.conditioning)


def loss_of(built, data):
    """The loss of one batch, as training has it without accumulation on one process."""
    return built.loss.terms(built.step(data, Position(built.seed, 0)).sums).total


def four_masks():
    """Four samples: half, full, tiered, full."""
    masks = torch.ones(4, 1, 1, 8, 8)
    masks[0, ..., 4:] = 0
    masks[2, ..., :4] = 0.5
    masks[2, ..., :2, :] = 0.05
    return masks


def randomise_adapter(transformer, scale=0.1):
    """Give every adapter tensor random values, so that it does something."""
    random = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=random)
