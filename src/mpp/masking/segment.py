"""What tools with segmentation models share: loading them, whole or not at all, and their image processors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import logging

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def load_model(kind: Any, source: str, device: str) -> PreTrainedModel:  # noqa: ANN401 (a model class, or one of the Auto classes)
    """A model for use, in float32.

    Args:
        kind: Its class.
        source: Folder or hub id.
        device: Where it runs.

    Raises:
        ValueError: It is not there, is another kind of model, lacks weights, or the device is not there.
    """
    try:
        with _quiet():
            model, report = kind.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except _FAILURES as error:
        raise ValueError(f"tool.model={source} cannot be loaded as a {kind.__name__}: {_short(error)}") from error
    lacking = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if lacking:
        raise ValueError(
            f"tool.model={source} lacks {len(lacking)} weights of a {type(model).__name__}, such as {lacking[0]}; "
            "another model is needed for this"
        )
    try:
        return model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {_short(error)}") from error


def load_processor(source: str, kind: Any = None) -> Any:  # noqa: ANN401 (each model has its own class)
    """A model's image processor, on Pillow, so that it gives the same on every machine.

    Args:
        source: Folder or hub id.
        kind: The class to read its settings with; None: its own.

    Raises:
        ValueError: It is not there, or needs a package that is not.
    """
    try:
        with _quiet():
            if kind is not None:
                return kind.from_pretrained(source)
            return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (ImportError, *_FAILURES) as error:
        remedy = "; pip install 'mpp[segment]'" if "torchvision" in str(error).lower() else ""
        raise ValueError(
            f"tool.model={source}: its image processor cannot be read ({_short(error)}){remedy}"
        ) from error


def needs_model(model: str | None) -> None:
    """Refuse a tool without its model.

    Raises:
        ValueError: As said.
    """
    if not model:
        raise ValueError("tool.model=... is missing: give a folder or a hub id")


def enlarged(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring scores `(height, width)` to an image's width and height (bilinear)."""
    width, height = size
    return functional.interpolate(scores[None, None].float(), (height, width), mode="bilinear", align_corners=False)[
        0, 0
    ]


def check_tiers(option: str, tiers: Sequence[float]) -> None:
    """Refuse mask values out of range.

    Raises:
        ValueError: As said.
    """
    wrong = [value for value in tiers if not 0 <= value <= 1]
    if wrong:
        raise ValueError(f"{option} must have values between 0 and 1, got {wrong[0]}")


def model_device(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's report of what was loaded, which the checks above read."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
