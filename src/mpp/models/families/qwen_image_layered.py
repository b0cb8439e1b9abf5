"""Qwen-Image-Layered: one image into RGBA layers, on diffusers' `QwenImageTransformer2DModel`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mpp.memory.settings import EncoderMemory
from mpp.models import qwen
from mpp.models.conditioning import Conditioning, Tensors
from mpp.models.contract import Generation, ImageInputs, LatentSpec, ModelId, Prompt
from mpp.models.family import DTYPES, captions_of
from mpp.models.padding import pad_with_mask
from mpp.models.text_limit import TextLimit


class SizedLayeredPipeline(qwen.ImagePipeline, QwenImageLayeredPipeline):
    """diffusers' pipeline at any size; its own `__call__` knows only sizes of about 640x640 or 1024x1024 pixels."""

    home = pipeline_qwenimage_layered

    def __call__(self, *, width: int, height: int, **arguments: Any) -> Any:  # noqa: ANN401
        """The pipeline's call at a size."""
        self.sizes = lambda area, ratio: (width, height)
        return super().__call__(**arguments)


class BaselessLayeredPipeline(SizedLayeredPipeline):
    """Generates layers alone: with `layers=n` the n + 1 frames it denoises are all layers."""

    def _unpack_latents(self, *arguments: Any) -> Float[Tensor, "b c f h w"]:  # noqa: ANN401
        """With a frame in front, which the pipeline takes for the base frame and drops before it decodes."""
        layers = super()._unpack_latents(*arguments)
        return torch.cat([layers[:, :, :1], layers], 2)


@dataclass(frozen=True)
class LayeredConditioning(Conditioning):
    """Text embeddings, True for real tokens once batched, and the whole image's clean latents."""

    text: Tensor
    mask: Tensor | None = None
    condition: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class QwenImageLayered(qwen.QwenFamily):
    """Qwen-Image-Layered: a whole image and its RGBA layers, as frames; the whole image is the condition too.

    Sigma is shifted as Qwen-Image's, as musubi-tuner trains it too, here by the tokens of all frames: factor 2.4 for a
    image with four layers at 640x640. diffusers' pipeline has another rule, mu = sqrt(tokens of one frame / 256): 2.5
    there.

    Args:
        vae: Folder or hub id of the RGBA VAE, which is not Qwen-Image's; None: `pretrained`.
        drop_base_frame: The whole image is condition alone: neither generated nor learnt, which saves its tokens
            (musubi-tuner's --remove_first_image_from_target). The published model generates it as its first frame.

    Raises:
        ValueError: Latents that are not layered.
    """

    latents: LatentSpec = LatentSpec(channels=16, spatial_stride=8, temporal_stride=1, patch=(1, 2, 2), layered=True)
    drop_base_frame: bool = False

    family = "qwen_image_layered"
    model_id = ModelId("Qwen-Image-Layered", "https://github.com/QwenLM/Qwen-Image-Layered", "qwen_image_layered")
    conditioning = LayeredConditioning
    images = ImageInputs(first_frame=True)

    def __post_init__(self) -> None:
        """Refuse latents that are no layers."""
        super().__post_init__()
        if not self.latents.layered:
            raise ValueError("Qwen-Image-Layered needs model.latents.layered=true")
        self.given_frames = int(self.drop_base_frame)

    def expected_config(self) -> dict[str, object]:
        """The transformer's channels, and what tells it from other Qwen-Images."""
        return {
            "in_channels": self.latents.channels * 4,
            "use_additional_t_cond": True,
            "use_layer3d_rope": True,
            "zero_cond_t": False,
        }

    def load_encoders(
        self, device: torch.device | str, memory: EncoderMemory | None = None
    ) -> "QwenImageLayeredEncoders":
        """VAE and text encoder on `device`, each loaded when first used."""
        return QwenImageLayeredEncoders(self, device, memory)

    def collate(self, items: Sequence[LayeredConditioning]) -> LayeredConditioning:
        """Pad every text to the longest, with a mask; stack the whole images.

        Raises:
            ValueError: They differ in size.
        """
        condition = qwen.stack_images([item.condition for item in items], "the latents of the whole image")
        return LayeredConditioning(*pad_with_mask([item.text for item in items]), condition)

    def blank(self, config: Mapping[str, Any], shape: Sequence[int]) -> LayeredConditioning:
        """Zeros for a text of `text_length` tokens, and for the whole image."""
        channels, _, *sides = shape
        dim = config["joint_attention_dim"]
        text = torch.zeros(self.text_length, dim, dtype=DTYPES[self.text_dtype])
        return LayeredConditioning(text, condition=torch.zeros(channels, 1, *sides))

    def velocity(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "b c f h w"],
        sigma: Float[Tensor, " b"],
        conditioning: LayeredConditioning,
    ) -> Float[Tensor, "b c f h w"]:
        """Predicted `noise - latents` of the frames; the clean whole image stands behind them."""
        return qwen.qwen_velocity(
            transformer,
            noisy,
            sigma,
            (conditioning.text, conditioning.mask),
            [conditioning.condition],
            # the pipeline's `is_rgb`: always 0
            additional_t_cond=torch.zeros(len(noisy), dtype=torch.long, device=noisy.device),
        )

    def pipeline(self, transformer: nn.Module, encoders: "QwenImageLayeredEncoders") -> DiffusionPipeline:
        """Diffusers' pipeline around the transformer and the VAE."""
        kind = BaselessLayeredPipeline if self.given_frames else SizedLayeredPipeline
        return kind(
            tokenizer=None,
            processor=None,
            text_encoder=encoders.vae(),  # it is only asked for the dtype of the image, which the VAE encodes
            vae=encoders.vae(),
            scheduler=self.scheduler(self.default_scheduler()),
            transformer=transformer,
        )

    def arguments(
        self, positive: LayeredConditioning, negative: LayeredConditioning | None, generation: Generation
    ) -> dict[str, Any]:
        """Text embeddings, guidance, layers and the image to take apart.

        Raises:
            ValueError: Not exactly one image.
        """
        if len(generation.controls) != 1:
            raise ValueError(
                f"a sample image has {len(generation.controls)} control images, qwen_image_layered takes 1: the image "
                "to take apart"
            )
        return {
            **qwen.text_arguments(
                (positive.text, positive.mask),
                None if negative is None else (negative.text, negative.mask),
                generation.guidance_scale,
                self.dtype,
            ),
            "prompt": "given as embeddings",  # without any the pipeline would caption the image
            "image": generation.controls[0].convert("RGBA"),
            "layers": generation.frames - self.given_frames,
        }


class QwenImageLayeredEncoders(qwen.QwenEncoders):
    """AutoencoderKLQwenImage for RGBA and Qwen2.5-VL, each loaded on first use and freed by `release`."""

    colours = 4
    model: QwenImageLayered

    def text_limit(self) -> TextLimit:
        """`text_length` tokens behind the pipeline's template."""
        return self.template_limit(self.text_pipeline(QwenImageLayeredPipeline, processor=None))

    def encode_text(self, prompts: Sequence[Prompt]) -> list[LayeredConditioning]:
        """Qwen2.5-VL's last hidden states without the template, as the pipeline takes them, each at its own length."""
        pipe = self.text_pipeline(QwenImageLayeredPipeline, processor=None)
        captions = captions_of(prompts)
        texts = self.texts(pipe.encode_prompt, prompt=captions, max_sequence_length=self.model.text_length)
        return [LayeredConditioning(text) for text in texts]

    def encode_pixels(self, pixels: Float[Tensor, "b 4 frames height width"]) -> Float[Tensor, "b c f h w"]:
        """Mode of the VAE's posterior of every frame as an image of its own, `(z - mean) / std` in float32."""
        return self.latents_of(pixels)

    def vae_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Each layer is an image of its own."""
        channels, layers, height, width = shape
        return layers, channels, 1, height, width

    def encode_images(
        self, pixels: Float[Tensor, "1 4 frames height width"], controls: Sequence[Image.Image]
    ) -> dict[str, Tensors]:
        """Clean latents of the whole image, the first frame."""
        del controls
        return {"condition": self.latents_of(pixels[:, :, :1])[0]}
