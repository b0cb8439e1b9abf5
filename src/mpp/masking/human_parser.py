"""Tiers from a model that names every pixel: face, hair, clothes, ..."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from mpp.masking.segment import check_tiers, enlarged, load_model, load_processor, model_device, needs_model
from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool
from mpp.media.mask import Mask


@dataclass(frozen=True)
class HumanParser(Tool):
    """Masks with tiers by the labels of a semantic segmentation model. Frames of videos are looked at one by one.

    Args:
        model: Folder or hub id of a model that transformers' `AutoModelForSemanticSegmentation` loads.
        tiers: Mask value in [0, 1] of each label that is learned, such as `{Face: 1.0, Hair: 0.3}`.
        other: Value of all other labels, in [0, 1].
        device: Where the model runs.

    Raises:
        ValueError: A setting is missing or out of range.
    """

    model: str | None = None
    tiers: Mapping[str, float] | None = None
    other: float = 0.0
    device: str = "cpu"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse what is missing or out of range."""
        needs_model(self.model)
        if not self.tiers:
            raise ValueError("tool.tiers is missing; give mask values by label, as {Face: 1.0, Hair: 0.3}")
        check_tiers("tool.tiers", list(self.tiers.values()))
        check_tiers("tool.other", [self.other])

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(AutoModelForSemanticSegmentation, self.model, self.device)

    @cached_property
    def _processor(self) -> Any:  # noqa: ANN401 (by the model)
        processor = load_processor(self.model)
        if getattr(processor, "do_pad", False):
            raise ValueError(f"tool.model={self.model} pads its images, which is not undone here; choose another model")
        return processor

    @cached_property
    def _values(self) -> torch.Tensor:
        """Mask value of each label number.

        Raises:
            ValueError: The model lacks a label.
        """
        labels = {name: int(number) for number, name in self._model.config.id2label.items()}
        unknown = [name for name in self.tiers if name not in labels]
        if unknown:
            raise ValueError(
                f"tool.tiers: {', '.join(unknown)} is no label of {self.model}; it has {', '.join(labels)}"
            )
        values = torch.full((max(labels.values()) + 1,), float(self.other))
        for name, value in self.tiers.items():
            values[labels[name]] = value
        return values

    def prepare(self, clips: Sequence[FrameSequence]) -> None:
        """Load model and processor, and look the labels up."""
        del clips
        _ = self._values, self._processor

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks."""
        del other
        return (self._parsed(image.rgb) for image in clip.images())

    @torch.no_grad()
    def _parsed(self, image: Image.Image) -> Mask:
        inputs = self._processor(image, return_tensors="pt", **self._whole())
        logits = self._model(pixel_values=inputs["pixel_values"].to(model_device(self._model))).logits[0]
        best = enlarged(logits[0], image.size)
        labels = torch.zeros_like(best, dtype=torch.long)
        for number in range(1, len(logits)):  # one by one: all labels of a large image at once are gigabytes
            score = enlarged(logits[number], image.size)
            labels[score > best] = number
            best = torch.maximum(best, score)
        return Mask(self._values[labels.cpu()].numpy())

    def _whole(self) -> dict[str, Any]:
        """Settings with which a processor that crops shows the model the whole image instead."""
        if not getattr(self._processor, "do_center_crop", False):
            return {}
        crop = self._processor.crop_size
        return {"do_center_crop": False, "size": {"height": crop["height"], "width": crop["width"]}}
