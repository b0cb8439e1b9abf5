"""Masks of what lies in a box or at a point; in clips the mask follows it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Sam2Model, Sam2VideoInferenceSession, Sam2VideoModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mpp.masking.segment import enlarged, load_model, load_processor, model_device, needs_model
from mpp.masking.segment_prompts import SegmentPrompt, from_mask, from_settings, read_prompts
from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool, one_of, together
from mpp.media.mask import Mask


@dataclass(frozen=True)
class Sam2(Tool):
    """Masks of subjects that are shown to a SAM 2 model: by boxes, by points, or by coarse masks.

    Args:
        model: Folder or hub id of a SAM 2 model.
        boxes: Boxes that hold for all inputs: `[[left, top, right, bottom], ...]` relative to the image; the mask is
            all their subjects.
        points: Points that hold for all inputs: `[[x, y], ...]`, or `[x, y, 0]` for one that is not of the subject.
        prompts: JSON file with boxes or points of each input by its path below the folder, without suffix:
            `{"NAME": {"boxes": [[0.1, 0.2, 0.6, 0.9]]}, "CLIP": {"points": [[0.5, 0.5]], "frame": 12}}`.
        masks: Folder of coarse masks, such as those of another tool; what is at least 0.5 there is the subject.
        coarse: What is taken of these: their bounding `box`, or the point at their `centre`.
        track: In clips, follow the subject from one frame on (the prompt's; with moving coarse masks, the first that
            is not empty), forwards and backwards. Else each frame is looked at by itself.
        device: Where the model runs.

    Raises:
        ValueError: A setting is missing or out of range, or there is not exactly one kind of prompt.
    """

    model: str | None = None
    boxes: Sequence[Sequence[float]] | None = None
    points: Sequence[Sequence[float]] | None = None
    prompts: str | None = None
    masks: str | None = None
    coarse: Literal["box", "centre"] = "box"
    track: bool = True
    device: str = "cpu"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse what is missing or out of range."""
        needs_model(self.model)
        one_of("tool.coarse", self.coarse, ("box", "centre"))
        direct = self.boxes is not None or self.points is not None
        if [direct, self.prompts is not None, self.masks is not None].count(True) != 1:
            raise ValueError(
                "tool=sam2 needs one of tool.boxes or tool.points, tool.prompts=FILE.json, tool.masks=FOLDER"
            )
        if direct:
            _ = self._given
        if self.prompts is not None:
            _ = self._by_key

    @cached_property
    def _given(self) -> SegmentPrompt:
        return from_settings(self.boxes or (), self.points or (), "tool")

    @cached_property
    def _by_key(self) -> dict[str, SegmentPrompt]:
        return read_prompts(self.prompts, "tool.prompts")

    @cached_property
    def _image_model(self) -> Sam2Model:
        return load_model(Sam2Model, self.model, self.device)

    @cached_property
    def _video_model(self) -> Sam2VideoModel:
        return load_model(Sam2VideoModel, self.model, self.device)

    @cached_property
    def _processor(self) -> ViTImageProcessorPil:
        # SAM 2's own processor needs torchvision; for images it is this one: resize, rescale, normalise
        return load_processor(self.model, ViTImageProcessorPil)

    def prepare(self, clips: Sequence[FrameSequence]) -> None:
        """Load what is needed: the model for videos is another one."""
        _ = self._processor
        if self.track and any(clip.moving for clip in clips):
            _ = self._video_model
        if not self.track or any(not clip.moving for clip in clips):
            _ = self._image_model

    def settings(self, key: str) -> dict[str, Any]:
        """With the clip's own prompt instead of the file's name."""
        prompt = self._by_key.get(key) if self.prompts is not None else None
        return super().settings(key) | {"prompts": None if prompt is None else asdict(prompt)}

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The masks, black and white."""
        images = (decoded.rgb for decoded in clip.images())
        if clip.moving and self.track:
            if other is None:
                return self._tracked(clip, images, self._prompt(clip))
            found = [from_mask(mask.values, self.coarse, number) for number, mask in enumerate(other.masks())]
            if other.moving:
                images = (image for image, _ in together(clip, images, other, iter(range(len(found)))))
            return self._tracked(clip, images, next((prompt for prompt in found if prompt is not None), None))
        if other is not None:
            both = together(clip, images, other, other.masks())
            return (self._found(image, from_mask(mask.values, self.coarse)) for image, mask in both)
        prompt = self._prompt(clip)
        if prompt.frame and not clip.moving:
            raise ValueError(f"{clip.path} is an image, and its prompt is for frame {prompt.frame}")
        return (self._found(image, prompt) for image in images)

    def _prompt(self, clip: FrameSequence) -> SegmentPrompt:
        if self.prompts is None:
            return self._given
        if clip.key not in self._by_key:
            raise ValueError(f"{clip.path}: tool.prompts={self.prompts} has no {clip.key!r}")
        return self._by_key[clip.key]

    @torch.no_grad()
    def _found(self, image: Image.Image, prompt: SegmentPrompt | None) -> Mask:
        """The subjects in one image; none without a prompt."""
        if prompt is None:
            return _nothing(image)
        model, pixels = self._image_model, self._pixels(image)
        device = model_device(model)
        embeddings = model.get_image_embeddings(pixels.to(device))
        scores = []
        for points, labels in prompt.subjects(pixels.shape[-1]):
            result = model(
                image_embeddings=embeddings,
                input_points=points.to(device),
                input_labels=labels.to(device),
                multimask_output=labels.shape[-1] == 1,  # one point is ambiguous: the best of several masks
            )
            scores.append(result.pred_masks[0, 0, int(result.iou_scores[0, 0].argmax())])
        return _any(scores, image)

    def _tracked(
        self, clip: FrameSequence, images: Iterator[Image.Image], prompt: SegmentPrompt | None
    ) -> Iterator[Mask]:
        if prompt is None:
            yield from map(_nothing, images)
            return
        before, forwards, number = [], self._tracker(prompt), -1
        for number, image in enumerate(images):
            if number < prompt.frame:
                before.append(image)
                continue
            if number == prompt.frame and before:
                backwards = self._tracker(prompt)
                backwards.follow(image)
                yield from [backwards.follow(earlier) for earlier in reversed(before)][::-1]
                before.clear()
            yield forwards.follow(image)
        if number < prompt.frame:
            raise ValueError(f"{clip.path} has {number + 1} frames, its prompt is for frame {prompt.frame} (from 0)")

    def _tracker(self, prompt: SegmentPrompt) -> "Tracker":
        return Tracker(self._video_model, self._pixels, prompt)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self._processor(image, return_tensors="pt")["pixel_values"]


class Tracker:
    """Follows subjects through frames, shown one after the other, from the first one, where they are.

    It remembers as many frames as the model looks back to, however long the clip is.

    Args:
        model: The model.
        pixels: Image to what the model sees, `(1, 3, side, side)`.
        prompt: Where the subjects are in the first frame.
    """

    def __init__(self, model: Sam2VideoModel, pixels: Callable[[Image.Image], Tensor], prompt: SegmentPrompt) -> None:
        self._model, self._pixels, self._shown = model, pixels, 0
        self._session = Sam2VideoInferenceSession(inference_device=model_device(model), dtype=torch.float32)
        self._memory = max(model.config.num_maskmem, model.config.max_object_pointers_in_encoder)
        for number, (points, labels) in enumerate(prompt.subjects(model.config.image_size)):
            subject = self._session.obj_id_to_idx(number)
            self._session.add_point_inputs(subject, 0, {"point_coords": points, "point_labels": labels})
            self._session.obj_with_new_inputs.append(number)

    @torch.no_grad()
    def follow(self, image: Image.Image) -> Mask:
        """The subjects in the next frame."""
        pixels = self._pixels(image).to(model_device(self._model))
        scores = self._model(self._session, frame_idx=self._shown, frame=pixels).pred_masks
        self._session.processed_frames.pop(self._shown)
        for outputs in self._session.output_dict_per_obj.values():
            outputs["non_cond_frame_outputs"].pop(self._shown - self._memory, None)
        self._shown += 1
        return _any(list(scores[:, 0]), image)


def _any(scores: Sequence[Tensor], image: Image.Image) -> Mask:
    """White where any subject's score, brought to the image's size, is above 0."""
    found = torch.stack([enlarged(score, image.size) > 0 for score in scores]).any(0)
    return Mask(found.float().cpu().numpy())


def _nothing(image: Image.Image) -> Mask:
    return Mask(np.zeros((image.height, image.width), np.float32))
