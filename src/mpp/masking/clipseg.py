"""Masks from words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

from mpp.masking.segment import check_tiers, enlarged, load_model, load_processor, model_device, needs_model
from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool
from mpp.media.mask import Mask


@dataclass(frozen=True)
class ClipSeg(Tool):
    """Masks of what is described in words, by a CLIPSeg model. Frames of videos are looked at one by one.

    Args:
        model: Folder or hub id of a CLIPSeg model.
        prompts: What to look for, such as `["a person"]`; or with tiers, `{face: 1.0, hair: 0.3}`. Where several are
            found the highest tier counts.
        threshold: Probability from which a pixel belongs to a prompt, in (0, 1); None: the probability itself is the
            mask, times the tier.
        device: Where the model runs.

    Raises:
        ValueError: A setting is missing or out of range.
    """

    model: str | None = None
    prompts: Sequence[str] | Mapping[str, float] | None = None
    threshold: float | None = 0.4
    device: str = "cpu"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse what is missing or out of range."""
        needs_model(self.model)
        if not self.prompts or isinstance(self.prompts, str) or not all(str(word).strip() for word in self.prompts):
            raise ValueError(
                "tool.prompts says what to look for, as [a person] or {face: 1.0, hair: 0.3}, and no prompt is empty; "
                f"got {self.prompts!r}"
            )
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"tool.threshold must be between 0 and 1, both excluded, or null, got {self.threshold}")
        check_tiers("tool.prompts", list(self._tiers.values()))

    @property
    def _tiers(self) -> dict[str, float]:
        return dict(self.prompts) if isinstance(self.prompts, Mapping) else dict.fromkeys(self.prompts, 1.0)

    @cached_property
    def _model(self) -> CLIPSegForImageSegmentation:
        return load_model(CLIPSegForImageSegmentation, self.model, self.device)

    @cached_property
    def _processor(self) -> Any:  # noqa: ANN401 (by the model)
        return load_processor(self.model)

    @cached_property
    def _words(self) -> dict[str, torch.Tensor]:
        """The prompts as tokens.

        Raises:
            ValueError: There is no tokenizer, or a prompt is too long.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"tool.model={self.model} has no tokenizer that can be read") from error
        most = self._model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(self._tiers), padding=True, return_tensors="pt")
        for word, length in zip(self._tiers, tokens["attention_mask"].sum(1).tolist(), strict=True):
            if length > most:
                raise ValueError(f"tool.prompts: {word[:40]!r}... has {length} tokens, the model reads at most {most}")
        return {name: tokens[name].to(model_device(self._model)) for name in ("input_ids", "attention_mask")}

    def prepare(self, clips: Sequence[FrameSequence]) -> None:
        """Load model, processor and tokenizer."""
        del clips
        _ = self._model, self._processor, self._words

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks."""
        del other
        return (self._found(image.rgb) for image in clip.images())

    @torch.no_grad()
    def _found(self, image: Image.Image) -> Mask:
        pixels = self._processor(image, return_tensors="pt")["pixel_values"].to(model_device(self._model))
        logits = self._model(pixel_values=pixels.expand(len(self._tiers), -1, -1, -1), **self._words).logits
        scores = logits.reshape(len(self._tiers), *logits.shape[-2:])
        mask = torch.zeros(image.height, image.width)
        for score, tier in zip(scores, self._tiers.values(), strict=True):
            chance = enlarged(score, image.size).sigmoid().cpu()
            found = chance if self.threshold is None else (chance >= self.threshold).float()
            mask = torch.maximum(mask, found * tier)
        return Mask(mask.numpy())
