"""What TensorBoard, W&B and other loggers of Lightning get besides numbers."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image

from mpp import __version__

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "safetensors")


def log_image(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    """Hand an image to a logger that takes any."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)


def log_settings(logger: Logger, settings: Mapping[str, Any], prompts: Sequence[str], step: int) -> None:
    """Hand a run's settings, prompts and versions to a logger: as texts to TensorBoard, as its configuration to others.

    Args:
        logger: It.
        settings: Resolved, as plain values.
        prompts: Of samples.
        step: Optimizer steps behind the run where it begins.
    """
    if isinstance(logger, TensorBoardLogger):
        texts = {"config": yaml.safe_dump(dict(settings), sort_keys=False), "versions": yaml.safe_dump(versions())}
        for name, text in texts.items():
            logger.experiment.add_text(name, f"```yaml\n{text}```", step)
        if prompts:
            logger.experiment.add_text(
                "prompts", "\n".join(f"{n}. {prompt}" for n, prompt in enumerate(prompts, 1)), step
            )
    else:
        logger.log_hyperparams({**settings, "versions": versions()})


def log_hparams(logger: Logger, settings: Mapping[str, Any], measured: Mapping[str, float], step: int) -> None:
    """Show a run in TensorBoard's table of runs, with what it is judged by; the newest point of a name is shown.

    Args:
        logger: Any other has had the settings already.
        settings: Resolved, as plain values.
        measured: By logged names.
        step: At which that was measured.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(settings), metrics=dict(measured), step=step)


def versions() -> dict[str, str]:
    """What a run depends on."""
    found = {"mpp": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return found
