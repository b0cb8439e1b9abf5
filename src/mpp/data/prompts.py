"""Prompts that are painted during training and by `python -m mpp.sample`, and their cached conditioning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mpp.data.cache import Cache, made_from, text_name, write_tensors
from mpp.data.media import Geometry, crop_picture, picture_tensor, read_picture
from mpp.data.provenance import PromptProvenance
from mpp.data.reader import Reader
from mpp.files import content_hash
from mpp.models.base import Architecture, Conditioning, Encoders, Identity, Prompt, Shot
from mpp.models.conditioning import flat_tensors


@dataclass(frozen=True)
class Painted:
    """One prompt ready to be painted, its conditioning as `collate` gives it."""

    prompt: str
    shot: Shot
    positive: Conditioning
    negative: Conditioning | None


@dataclass(frozen=True)
class Prompts:
    """What is painted.

    Args:
        prompts: Captions; none: nothing is painted.
        negative_prompt: Read where the guidance is above 1.
        controls: For each prompt its conditioning pictures (files), for models that see them: the edited picture,
            references, or the first frame.
        width: Pixels.
        height: Pixels.
        frames: Frames of a clip, or layers of a picture; 1 is a picture.
        steps: Sampling steps; None: the family's.
        guidance_scale: Classifier-free guidance; 1 is none; None: the family's.
        seed: Of the noise; base and LoRA begin with the same.

    Raises:
        ValueError: A setting is out of its range, or controls that do not pair with the prompts.
    """

    prompts: Sequence[str] = ()
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
        if self.controls is not None and len(self.controls) != len(self.prompts):
            raise ValueError(
                f"sampling.controls has {len(self.controls)} lists of pictures for {len(self.prompts)} prompts; "
                "give one list for each prompt"
            )
        if self.frames < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"sampling.frames and steps must be at least 1, got {self.frames} and {self.steps}")

    def check(self, architecture: Architecture) -> None:
        """Refuse what the model cannot paint; reads the conditioning pictures.

        Raises:
            ValueError: Sizes off the model's grid, a wrong number of conditioning pictures, or unreadable ones.
        """
        if not self.prompts:
            return
        spec, inputs = architecture.latents, architecture.pictures
        for name in ("width", "height"):
            if getattr(self, name) < spec.pixel_step or getattr(self, name) % spec.pixel_step:
                raise ValueError(
                    f"sampling.{name} must be a multiple of {spec.pixel_step} for this model, got {getattr(self, name)}"
                )
        if (self.frames - 1) % spec.temporal_stride:
            raise ValueError(
                f"sampling.frames must be a multiple of {spec.temporal_stride} plus 1 for this model, got {self.frames}"
            )
        given = architecture.given_frames
        if spec.shape(spec.frames.length(self.frames), self.height, self.width)[1] <= given:
            raise ValueError(
                f"sampling.frames={self.frames}: this model is given the first {given} latent frames, so nothing would "
                f"be painted; set at least {given * spec.temporal_stride + 1}"
            )
        least, most = (1, 1) if inputs.first_frame else (inputs.least, inputs.most)
        for number, prompt in enumerate(self.prompts):
            files = self._files(number)
            if not least <= len(files) <= most:
                wanted = str(least) if least == most else f"{least} to {most}"
                raise ValueError(
                    f"sampling.controls: the prompt {prompt!r} has {len(files)} pictures, this model takes {wanted}"
                )
            for file in files:
                read_picture(file)

    def encode(self, architecture: Architecture, encoders: Encoders, cache: Cache, identity: Identity) -> int:
        """Cache the conditioning of all prompts, and of the negative one, as far as it is not there.

        Returns:
            Number of prompts.
        """
        todo: dict[Path, tuple[PromptProvenance, Shot, bool]] = {}
        settings = dict(architecture.cache_settings)
        for number in range(len(self.prompts)):
            shot = self._shot(architecture, number)
            for text, negative in self._texts(number, shot):
                path = cache.sample_path(self._name(architecture, text, number, negative=negative))
                made = PromptProvenance(text, architecture.family, settings, identity.vae, identity.text_encoder)
                if made_from(path, PromptProvenance) != made:
                    todo[path] = made, shot, self._sees(architecture, negative=negative)
        prompts = [Prompt(made.caption, shot.controls if sees else ()) for made, shot, sees in todo.values()]
        texts = [encoders.encode_text([prompt])[0] for prompt in prompts]
        encoders.release()
        for (path, (made, shot, _)), record in zip(todo.items(), texts, strict=True):
            fields = flat_tensors(encode_shot(architecture, encoders, shot))
            write_tensors(path, {**record.tensors(), **fields}, made.header())
        return len(self.prompts)

    def read(self, architecture: Architecture, cache: Reader) -> list[Painted]:
        """All prompts with their cached conditioning.

        Raises:
            ValueError: One was not prepared.
        """
        found = []
        for number, prompt in enumerate(self.prompts):
            shot = self._shot(architecture, number)
            records = []
            for text, negative in self._texts(number, shot):
                record = cache.prompt(self._name(architecture, text, number, negative=negative), architecture)
                if record is None:
                    raise ValueError(
                        f"the cache {cache.folder} has no embeddings of the prompt {text!r} for samples; run "
                        "`python -m mpp.prepare` again with the same sampling settings"
                    )
                records.append(architecture.collate([record]))
            found.append(Painted(prompt, shot, records[0], records[1] if len(records) > 1 else None))
        return found

    def _texts(self, number: int, shot: Shot) -> list[tuple[str, bool]]:
        """The prompt, and where there is guidance the negative one; and which it is."""
        found = [(self.prompts[number], False)]
        return found + ([(self.negative_prompt, True)] if shot.guidance_scale > 1 else [])

    @staticmethod
    def _sees(architecture: Architecture, *, negative: bool) -> bool:
        inputs = architecture.pictures
        return inputs.in_text and (inputs.in_negative or not negative)

    def _files(self, number: int) -> list[Path]:
        return [Path(file).expanduser() for file in self.controls[number]] if self.controls is not None else []

    def _name(self, architecture: Architecture, text: str, number: int, *, negative: bool) -> str:
        parts = [content_hash(file) for file in self._files(number)]
        inputs = architecture.pictures
        if parts or inputs.first_frame:
            parts += [architecture.family, f"{self.width}x{self.height}x{self.frames}"]
        if inputs.in_text and not self._sees(architecture, negative=negative):
            parts += ["unseen"]
        return text_name(text, parts)

    def _shot(self, architecture: Architecture, number: int) -> Shot:
        controls = [read_picture(file).rgb for file in self._files(number)]
        if architecture.pictures.first_frame:
            controls = [crop_picture(c, Geometry(c.size, (self.width, self.height))) for c in controls]
        scale = architecture.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return Shot(
            width=self.width,
            height=self.height,
            frames=self.frames,
            steps=architecture.steps if self.steps is None else self.steps,
            guidance_scale=scale,
            seed=self.seed,
            controls=tuple(controls),
        )


def encode_shot(architecture: Architecture, encoders: Encoders, shot: Shot) -> dict[str, object]:
    """Picture fields of a shot's conditioning: a clip that stands still on its first frame, or its control pictures."""
    inputs, spec = architecture.pictures, architecture.latents
    if not inputs.first_frame:
        return encoders.encode_pictures(torch.zeros(1, 3, 1, shot.height, shot.width), shot.controls)
    first = picture_tensor(_one(shot.controls))
    opaque = first.new_ones(spec.frames.channels - len(first), *first.shape[1:])
    frames = spec.frames.length(shot.frames)
    return encoders.encode_pictures(torch.cat([first, opaque])[None].repeat(1, 1, frames, 1, 1), ())


def _one(pictures: Sequence[Image.Image]) -> Image.Image:
    (picture,) = pictures
    return picture
