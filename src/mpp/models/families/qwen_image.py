"""Qwen-Image and its editing sisters (Edit, Edit 2509, Edit 2511) on diffusers' `QwenImageTransformer2DModel`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mpp.memory.settings import EncoderMemory
from mpp.models import qwen
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Generation, ImageInputs, ModelId, Prompt
from mpp.models.family import DTYPES, captions_of
from mpp.models.padding import pad_with_mask
from mpp.models.text_limit import TextLimit

_FAMILIES = {"text": "qwen_image", "edit": "qwen_image_edit", "edit_plus": "qwen_image_edit_plus"}
_IDS = {"text": "Qwen-Image", "edit": "Qwen-Image-Edit", "edit_plus": "Qwen-Image-Edit-Plus"}
_CONTROLS = {"text": (0, 0), "edit": (1, 1), "edit_plus": (1, 3)}


class _EditPipeline(qwen.ImagePipeline, QwenImageEditPipeline):
    home = pipeline_qwenimage_edit


class _EditPlusPipeline(qwen.ImagePipeline, QwenImageEditPlusPipeline):
    home = pipeline_qwenimage_edit_plus


@dataclass(frozen=True)
class QwenImageConditioning(Conditioning):
    """Text embeddings, True for real tokens once batched, and latents of the control images."""

    text: Tensor
    mask: Tensor | None = None
    controls: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True, eq=False)
class QwenImage(qwen.QwenFamily):
    """Qwen-Image: text to image, or editing of control images.

    For editing, captions hold the images and, as in the pipeline, are not cut at `text_length`.

    Args:
        text_encoder: Folder or hub id of Qwen2.5-VL, its tokenizer and (for editing) its processor; None: `pretrained`.
        task: `text` is text to image; `edit` edits one control image (Qwen-Image-Edit); `edit_plus` one to three
            (Edit 2509 and 2511). The text encoder sees control images too.
        control_pixels: Area of a control image for the VAE (and, with `edit`, for the text encoder); its aspect ratio
            is kept. It is part of the cache: prepare again when it changes.
        zero_cond_t: Control images count as clean in the transformer's modulation (Edit 2511).

    Raises:
        ValueError: An unknown task, or an area out of range.
    """

    task: Literal["text", "edit", "edit_plus"] = "text"
    control_pixels: int = VAE_IMAGE_SIZE
    zero_cond_t: bool = False

    conditioning = QwenImageConditioning

    def __post_init__(self) -> None:
        """What follows from the task."""
        super().__post_init__()
        if self.task not in _FAMILIES:
            raise ValueError(f"model.task must be one of {', '.join(_FAMILIES)}, got {self.task!r}")
        if self.control_pixels < 32 * 32:
            raise ValueError(f"model.control_pixels must be at least 1024 (32x32), got {self.control_pixels}")
        self.family = _FAMILIES[self.task]
        least, most = _CONTROLS[self.task]
        name = "Qwen-Image-Edit-2511" if self.zero_cond_t else _IDS[self.task]
        version = "qwen_image_edit" if most else "qwen_image"
        self.model_id = ModelId(name, "https://github.com/QwenLM/Qwen-Image", version)
        self.images = ImageInputs(least, most, in_text=most > 0)
        if most:
            self.cached_settings = ("text_length", "control_pixels")
        self.single_file = qwen.original_file(zero_cond_t=self.zero_cond_t)

    def expected_config(self) -> dict[str, object]:
        """The transformer's channels, and what tells Edit 2511 and Layered from the others."""
        return {
            "in_channels": self.latents.channels * 4,
            "zero_cond_t": self.zero_cond_t,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
        }

    def load_encoders(self, device: torch.device | str, memory: EncoderMemory | None = None) -> "QwenImageEncoders":
        """VAE and text encoder on `device`, each loaded when first used."""
        return QwenImageEncoders(self, device, memory)

    def collate(self, items: Sequence[QwenImageConditioning]) -> QwenImageConditioning:
        """Pad every text to the longest, with a mask; stack the control images.

        Raises:
            ValueError: The samples differ in number or size of their control images.
        """
        counts = sorted({len(item.controls or ()) for item in items})
        if len(counts) > 1:
            raise ValueError(
                f"the samples of a batch have {' and '.join(map(str, counts))} control images; batch those that are "
                "alike"
            )
        controls = tuple(
            qwen.stack_images([item.controls[number] for item in items], f"the latents of control {number}")
            for number in range(counts[0])
        )
        return QwenImageConditioning(*pad_with_mask([item.text for item in items]), controls or None)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> QwenImageConditioning:
        """Zeros for a text of `text_length` tokens, and for control images of the sample's size where it needs some."""
        channels, _, *sides = shape
        controls = tuple(torch.zeros(channels, 1, *sides) for _ in range(self.images.least))
        dim = config["joint_attention_dim"]
        text = torch.zeros(self.text_length, dim, dtype=DTYPES[self.text_dtype])
        return QwenImageConditioning(text, controls=controls or None)

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: QwenImageConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents`; clean control images stand behind the noisy one."""
        text = conditioning.text, conditioning.mask
        return qwen.qwen_velocity(transformer, noisy, sigma, text, conditioning.controls or ())

    def pipeline(self, transformer: nn.Module, encoders: "QwenImageEncoders") -> DiffusionPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        parts = {
            "tokenizer": None,
            "text_encoder": None,
            "vae": encoders.vae(),
            "scheduler": self.scheduler(self.default_scheduler()),
            "transformer": transformer,
        }
        if self.task == "text":
            return QwenImagePipeline(**parts)
        pipe = (_EditPipeline if self.task == "edit" else _EditPlusPipeline)(**parts, processor=None)
        pipe.sizes = self.pipeline_size
        return pipe

    def pipeline_size(self, area: int, ratio: float) -> tuple[int | None, ...]:
        """As the pipelines' `calculate_dimensions`, with `control_pixels` for their area of control images."""
        size = self.control_size(area, ratio)
        return size if self.task == "edit_plus" else (*size, None)

    def control_size(self, area: int, ratio: float) -> tuple[int, int]:
        """Width and height of a control image that a pipeline gives an area."""
        return calculate_dimensions(self.control_pixels if area == VAE_IMAGE_SIZE else area, ratio)

    def arguments(
        self, positive: QwenImageConditioning, negative: QwenImageConditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings, guidance and control images."""
        self.check_controls(generation.controls, "a sample image")
        arguments = qwen.text_arguments(
            (positive.text, positive.mask),
            None if negative is None else (negative.text, negative.mask),
            generation.guidance_scale,
            self.dtype,
        )
        if self.task == "text":
            return arguments
        images = [image.convert("RGB") for image in generation.controls]
        return {**arguments, "image": images if self.task == "edit_plus" else images[0]}

    def check_controls(self, controls: Sequence[Image.Image], what: str) -> None:
        """Refuse too few or too many control images: raise ValueError that names `what` has them."""
        least, most = self.images.least, self.images.most
        if not least <= len(controls) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f"{what} has {len(controls)} control images, {self.family} takes {wanted}")


class QwenImageEncoders(qwen.QwenEncoders):
    """AutoencoderKLQwenImage and Qwen2.5-VL, each loaded on first use and freed by `release`."""

    model: QwenImage

    def text_limit(self) -> TextLimit | None:
        """None for editing."""
        return self.template_limit(self.text_pipeline(QwenImagePipeline)) if self.model.task == "text" else None

    def encode_text(self, prompts: Sequence[Prompt]) -> list[QwenImageConditioning]:
        """Qwen2.5-VL's last hidden states without the template, as the pipeline takes them, each at its own length.

        Raises:
            ValueError: For editing, a prompt without its control images.
        """
        if self.model.task == "text":
            pipe = self.text_pipeline(QwenImagePipeline)
            captions = captions_of(prompts)
            texts = self.texts(pipe.encode_prompt, prompt=captions, max_sequence_length=self.model.text_length)
        else:
            texts = [self._text_with_images(prompt) for prompt in prompts]
        return [QwenImageConditioning(text) for text in texts]

    def encode_pixels(self, pixels: Float[Tensor, "b 3 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior, `(z - mean) / std` per channel in float32.

        Raises:
            ValueError: A clip instead of an image.
        """
        if pixels.shape[2] != 1:
            raise ValueError(f"Qwen-Image learns single images, got a clip of {pixels.shape[2]} frames; use images")
        return self.latents_of(pixels)

    def encode_images(
        self, pixels: Float[Tensor, "1 3 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Latents of the control images, each of about `control_pixels` in multiples of 32, as in the pipelines.

        Raises:
            ValueError: Too few or too many.
        """
        del pixels
        self.model.check_controls(controls, "a sample")
        if not controls:
            return {}
        processor = self._image_processor()
        latents = []
        for image in controls:
            width, height = self.model.control_size(VAE_IMAGE_SIZE, image.width / image.height)
            frame = processor.preprocess(image.convert("RGB"), height, width)[:, :, None]
            latents.append(self.latents_of(frame)[0])
        return {"controls": tuple(latents)}

    def _text_with_images(self, prompt: Prompt) -> Tensor:
        self.model.check_controls(prompt.images, f"the caption {prompt.text!r}")
        one = self.model.task == "edit"
        pipe = self.text_pipeline(
            QwenImageEditPipeline if one else QwenImageEditPlusPipeline,
            processor=self.tokenizer("processor", qwen.ImageProcessor),
        )
        images = []
        for shown in prompt.images:
            area = VAE_IMAGE_SIZE if one else CONDITION_IMAGE_SIZE
            width, height = self.model.control_size(area, shown.width / shown.height)
            images.append(self._image_processor().resize(shown.convert("RGB"), height, width))
        image = images[0] if one else images
        (text,) = self.texts(pipe.encode_prompt, prompt=[prompt.text], image=image)
        return text

    def _image_processor(self) -> VaeImageProcessor:
        """As the pipelines make theirs."""
        return VaeImageProcessor(vae_scale_factor=self.model.latents.pixel_step)
