"""Prompts to generate from during training and by `python -m mpp.sample`, and their cached conditioning."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from mpp.cache.format import Cache, are_finite, made_from, text_name, write_tensors
from mpp.cache.provenance import PromptProvenance
from mpp.cache.reader import Reader
from mpp.files import content_hash
from mpp.media.geometry import Geometry, crop_image, image_tensor
from mpp.media.images import image_head, read_image
from mpp.models.conditioning import flat_tensors
from mpp.models.contract import Architecture, Conditioning, Encoders, Generation, Identity, Prompt
from mpp.sampling.prompt_lines import PromptLine, prompt_lines


@dataclass(frozen=True)
class ReadyPrompt:
    """One prompt ready to generate from, its conditioning as `collate` gives it."""

    prompt: str
    generation: Generation
    positive: Conditioning
    negative: Conditioning | None


@dataclass(frozen=True)
class Prompts:
    """What is generated.

    Args:
        prompts: Captions, with settings of their own behind them where they differ (`a cat --w 832 --h 480 --f 49
            --d 42`); or one prompt, or a `.txt` file with a prompt on each line. None: nothing is generated.
        negative_prompt: Read where the guidance is above 1.
        controls: For each prompt its conditioning images (files), for models that see them: the edited image,
            references, or the first frame.
        width: Pixels.
        height: Pixels.
        frames: Frames of a clip, or layers of an image; 1 is an image.
        steps: Sampling steps; None: the family's.
        guidance_scale: Classifier-free guidance; 1 is none; None: the family's.
        seed: Of the noise; base and LoRA begin with the same.

    Raises:
        ValueError: A setting is out of its range, or controls that do not pair with the prompts.
    """

    prompts: Sequence[str] | str = ()
    negative_prompt: str = ""
    controls: Sequence[Sequence[str]] | None = None
    width: int = 512
    height: int = 512
    frames: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.controls is not None and len(self.controls) != len(self.lines):
            raise ValueError(
                f"sampling.controls has {len(self.controls)} lists of images for {len(self.lines)} prompts; "
                "give one list for each prompt"
            )
        twice = next((line for line in self.lines if "controls" in line.options), None)
        if self.controls is not None and twice is not None:
            raise ValueError(f"{twice.where} names its images, as sampling.controls does; leave out one of them")
        if self.frames < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"sampling.frames and steps must be at least 1, got {self.frames} and {self.steps}")

    @cached_property
    def lines(self) -> list[PromptLine]:
        """The prompts as they are written; a file is read once."""
        return prompt_lines(self.prompts)

    @cached_property
    def each(self) -> list["Wanted"]:
        """The prompts with all their settings."""
        names = ("negative_prompt", "width", "height", "frames", "steps", "guidance_scale", "seed")
        shared = {name: getattr(self, name) for name in names}
        controls = self.controls if self.controls is not None else [()] * len(self.lines)
        return [
            Wanted(line, **{**shared, "controls": files, **line.options})
            for line, files in zip(self.lines, controls, strict=True)
        ]

    def check(self, architecture: Architecture) -> None:
        """Refuse what the model cannot generate; reads the conditioning images.

        Raises:
            ValueError: Sizes off the model's grid, a wrong number of conditioning images, or unreadable ones.
        """
        for wanted in self.each:
            wanted.check(architecture)

    def encode(
        self,
        architecture: Architecture,
        encoders: Encoders,
        cache: Cache,
        identity: Identity,
        *,
        text_weights: str = "bf16",
    ) -> int:
        """Cache the conditioning of all prompts, and of the negative one, as far as it is not there.

        All texts come first, then all images: text encoders and VAE are never loaded at once.

        Args:
            architecture: The family.
            encoders: Its encoders.
            cache: Where it goes.
            identity: Of the model's weights.
            text_weights: What those of the text encoders are kept in, as `EncoderMemory.text_weights`.

        Returns:
            Number of prompts.

        Raises:
            ValueError: One comes out NaN or infinite.
        """
        todo: dict[Path, tuple[PromptProvenance, Generation, bool]] = {}
        settings = dict(architecture.cache_settings)
        for wanted in self.each:
            generation = wanted.generation(architecture)
            for text, negative in wanted.texts(generation):
                path = cache.generation_path(wanted.name(architecture, text, negative=negative))
                weights = identity.vae, identity.text_encoder, text_weights
                made = PromptProvenance(text, architecture.family, settings, *weights)
                if made_from(path, PromptProvenance) != made:
                    todo[path] = made, generation, _sees(architecture, negative=negative)
        prompts = [
            Prompt(made.caption, generation.controls if sees else ()) for made, generation, sees in todo.values()
        ]
        if prompts:
            encoders.release()
        texts = [encoders.encode_text([prompt])[0] for prompt in prompts]
        encoders.release()
        for (path, (made, generation, _)), record in zip(todo.items(), texts, strict=True):
            fields = flat_tensors(encode_inputs(architecture, encoders, generation))
            tensors = {**record.tensors(), **fields}
            if not are_finite(tensors):
                raise ValueError(
                    f"the prompt {made.caption!r}: its conditioning came out NaN or infinite; use "
                    "model.text_dtype=float32 and model.vae_dtype=float32"
                )
            write_tensors(path, tensors, made.header())
        return len(self.each)

    def read(self, architecture: Architecture, cache: Reader) -> list[ReadyPrompt]:
        """All prompts with their cached conditioning.

        Raises:
            ValueError: One was not prepared.
        """
        found = []
        for wanted in self.each:
            generation = wanted.generation(architecture)
            records = []
            for text, negative in wanted.texts(generation):
                record = cache.prompt(wanted.name(architecture, text, negative=negative), architecture)
                if record is None:
                    raise ValueError(
                        f"the cache {cache.folder} has no embeddings of the prompt {text!r} for samples; run "
                        "`python -m mpp.prepare` again with the same sampling settings"
                    )
                records.append(architecture.collate([record]))
            negatives = records[1] if len(records) > 1 else None
            found.append(ReadyPrompt(wanted.line.text, generation, records[0], negatives))
        return found


@dataclass(frozen=True)
class Wanted:
    """One prompt with all its settings, which are named as in `Prompts`."""

    line: PromptLine
    negative_prompt: str
    controls: Sequence[str]
    width: int
    height: int
    frames: int
    steps: int | None
    guidance_scale: float | None
    seed: int

    def check(self, architecture: Architecture) -> None:
        """See `Prompts.check`."""
        spec, inputs = architecture.latents, architecture.images
        for name in ("width", "height"):
            if getattr(self, name) < spec.pixel_step or getattr(self, name) % spec.pixel_step:
                raise ValueError(
                    f"{self._said(name)} must be a multiple of {spec.pixel_step} for this model, "
                    f"got {getattr(self, name)}"
                )
        if (self.frames - 1) % spec.temporal_stride:
            raise ValueError(
                f"{self._said('frames')} must be a multiple of {spec.temporal_stride} plus 1 for this model, "
                f"got {self.frames}"
            )
        given = architecture.given_frames
        if spec.shape(spec.frames.length(self.frames), self.height, self.width)[1] <= given:
            raise ValueError(
                f"{self._said('frames')}={self.frames}: this model is given the first {given} latent frames, so "
                f"nothing would be generated; set at least {given * spec.temporal_stride + 1}"
            )
        least, most = (1, 1) if inputs.first_frame else (inputs.least, inputs.most)
        files = self._files()
        if not least <= len(files) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise ValueError(
                f"{self._said('controls')}: the prompt {self.line.text!r} has {len(files)} images, this model takes "
                f"{count}"
            )
        for file in files:
            read_image(file)

    def _said(self, name: str) -> str:
        """Where a setting was said."""
        return f"{self.line.where}: {name}" if name in self.line.options else f"sampling.{name}"

    def texts(self, generation: Generation) -> list[tuple[str, bool]]:
        """The prompt, and where there is guidance the negative one; and which it is."""
        found = [(self.line.text, False)]
        return found + ([(self.negative_prompt, True)] if generation.guidance_scale > 1 else [])

    def _files(self) -> list[Path]:
        return [Path(file).expanduser() for file in self.controls]

    def name(self, architecture: Architecture, text: str, *, negative: bool) -> str:
        """Under what the cache holds the conditioning of one of its texts."""
        parts = [f"{content_hash(file)}{_colours(file)}" for file in self._files()]
        inputs = architecture.images
        if parts or inputs.first_frame:
            parts += [architecture.family, f"{self.width}x{self.height}x{self.frames}"]
        if inputs.in_text and not _sees(architecture, negative=negative):
            parts += ["unseen"]
        return text_name(text, parts)

    def generation(self, architecture: Architecture) -> Generation:
        """What the model is told."""
        controls = [read_image(file, srgb=True).rgb for file in self._files()]
        if architecture.images.first_frame:
            controls = [crop_image(c, Geometry(c.size, (self.width, self.height))) for c in controls]
        scale = architecture.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return Generation(
            width=self.width,
            height=self.height,
            frames=self.frames,
            steps=architecture.steps if self.steps is None else self.steps,
            guidance_scale=scale,
            seed=self.seed,
            controls=tuple(controls),
        )


def _sees(architecture: Architecture, *, negative: bool) -> bool:
    inputs = architecture.images
    return inputs.in_text and (inputs.in_negative or not negative)


def encode_inputs(architecture: Architecture, encoders: Encoders, generation: Generation) -> dict[str, object]:
    """Image fields of a prompt's conditioning: a clip that stands still on its first frame, or control images."""
    inputs, spec = architecture.images, architecture.latents
    if not inputs.first_frame:
        return encoders.encode_images(torch.zeros(1, 3, 1, generation.height, generation.width), generation.controls)
    first = image_tensor(_one(generation.controls))
    opaque = first.new_ones(spec.frames.channels - len(first), *first.shape[1:])
    frames = spec.frames.length(generation.frames)
    return encoders.encode_images(torch.cat([first, opaque])[None].repeat(1, 1, frames, 1, 1), ())


def _colours(file: Path) -> str:
    """What tells an image whose colours are converted from the same one as earlier versions read it."""
    return " sRGB" if image_head(file).profile == "converted" else ""


def _one(images: Sequence[Image.Image]) -> Image.Image:
    (image,) = images
    return image
