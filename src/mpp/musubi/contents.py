"""How a family's samples lie in caches of musubi-tuner and blissful-tuner.

A sample is two safetensors files, latents and text. A key is a content's name with `varlen_` before it and sizes and
dtype behind: `latents_1x64x64_bfloat16` holds `latents`, `varlen_t5_bfloat16` holds `t5`, `llm_mask` itself. Here are
contents; `musubi_files` knows files and keys, `musubi_formats` what each family has.

Facts from musubi-tuner's `dataset/cache_io.py`, `dataset/architectures.py`, `*_cache_latents.py`,
`*_cache_text_encoder_outputs.py`, and the `scale_shift_latents` of its `*_train_network.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mpp.models.conditioning import Conditioning, Tensors

Contents = Mapping[str, Tensor]

_CONTROL = "latents_control_"
CONTROLS = _CONTROL + r"\d+"


def no_images(contents: Contents) -> dict[str, Tensors]:
    """Of families that see none."""
    del contents
    return {}


def no_contents(record: Conditioning, latents: Tensor) -> dict[str, Tensor]:
    """Of families that see none."""
    del record, latents
    return {}


@dataclass(frozen=True)
class MusubiFormat:
    """One architecture of musubi-tuner as one of our model configs reads it.

    Attributes:
        names: Short names in file names, and for each what metadata may state as `architecture`; the first is written.
        text: Contents of the text file and their number of axes, by field of the record; the first is the one that
            `tokens` and `padded` are about.
        latents_dtype: In which musubi-tuner stores latents by default.
        shift: What it subtracts from cached latents when it trains, before it multiplies by `scale`.
        scale: See `shift`; cached latents are as the VAE makes them where there is one.
        flat: Latents have no axis of frames.
        sizes: Numbers in the key of latents and mask: 3 are frames, rows and columns, 2 rows and columns.
        padded: Tokens that every text is padded to, with a content `<text>_mask` of the real ones; None: trimmed, as
            `varlen_`, unless `tokens` says one length.
        tokens: Fewest and most tokens of a text.
        varlen: Whether keys of text begin with `varlen_`.
        reads: Regex of contents besides `latents` that `images` looks at.
        ignores: Regex of contents of both files that may be there and that this model does not see.
        images: From contents, `latents` normalised, to image fields of the record. Works on meta tensors too.
        contents: The inverse: from a record and its latents to contents in the dtypes that are stored.
        mistyped: Contents whose keys say the latents' dtype, whatever their own is.
        widths: Width of the text by short name, where it tells one from the other.
    """

    names: Mapping[str, tuple[str, ...]]
    text: Mapping[str, tuple[str, int]]
    latents_dtype: torch.dtype
    shift: float = 0.0
    scale: float = 1.0
    flat: bool = False
    sizes: int = 3
    padded: int | None = None
    tokens: tuple[int, int] = (1, 1 << 20)
    varlen: bool = True
    reads: str = ""
    ignores: str = ""
    images: Callable[[Contents], dict[str, Tensors]] = no_images
    contents: Callable[[Conditioning, Tensor], dict[str, Tensor]] = no_contents
    mistyped: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)

    def latents(self, stored: Float[Tensor, "..."]) -> Float[Tensor, "c f h w"]:
        """Stored latents in our normalisation, float32.

        Raises:
            ValueError: They have another number of axes.
        """
        axes = 3 if self.flat else 4
        if stored.ndim != axes:
            raise ValueError(f"holds latents of shape {tuple(stored.shape)}, wanted are {axes} axes")
        latents = (stored[:, None] if self.flat else stored).float()
        return latents if self._as_is else (latents - self.shift) * self.scale

    def stored(self, latents: Float[Tensor, "c f h w"]) -> Float[Tensor, "..."]:
        """Inverse of `latents`, in the dtype that musubi-tuner has."""
        raw = (latents if self._as_is else latents / self.scale + self.shift).to(self.latents_dtype)
        return raw[:, 0] if self.flat else raw

    def text_fields(self, contents: Contents) -> dict[str, Tensor]:
        """Text fields of the record, each text without padding.

        Raises:
            ValueError: No token is real.
        """
        found = {name: contents[content] for name, (content, _) in self.text.items()}
        if self.padded is not None:
            name, content = next(iter(self.text)), self.main_text
            found[name] = found[name][contents[f"{content}_mask"].bool()]
            if not len(found[name]):
                raise ValueError(f"holds {content}_mask that leaves no token")
        return found

    def text_contents(self, record: Conditioning) -> dict[str, Tensor]:
        """Inverse of `text_fields`, padded as musubi-tuner stacks them.

        Raises:
            ValueError: A text is longer than it may be.
        """
        found = {content: getattr(record, name) for name, (content, _) in self.text.items()}
        content = self.main_text
        count, most = found[content].shape[0], self.padded or self.tokens[1]
        if count > most:
            raise ValueError(f"has {count} tokens of text, musubi-tuner takes at most {most}")
        if self.padded is not None:
            found[content] = functional.pad(found[content], (0, 0, 0, self.padded - count))
            found[f"{content}_mask"] = (torch.arange(self.padded) < count).long()
        return found

    @property
    def main_text(self) -> str:
        """The content that `tokens` and `padded` are about."""
        return next(iter(self.text.values()))[0]

    @property
    def text_axes(self) -> dict[str, int]:
        """Number of axes of the contents that a text file must have."""
        axes = dict(self.text.values())
        return axes if self.padded is None else {**axes, f"{self.main_text}_mask": 1}

    @property
    def _as_is(self) -> bool:
        return self.scale == 1 and self.shift == 0


def needed(contents: Contents, name: str, axes: int) -> Tensor:
    """A content that the model cannot do without.

    Raises:
        ValueError: It is not there, or has another number of axes.
    """
    if name not in contents:
        raise ValueError(f"holds no {name}, which this model sees")
    tensor = contents[name]
    if tensor.ndim != axes:
        raise ValueError(f"holds {name} of shape {tuple(tensor.shape)}, wanted are {axes} axes")
    return tensor


def controls(contents: Contents, least: int, most: int, axes: int) -> dict[str, Tensors]:
    """The field `controls` of control images, which are numbered from 0.

    Raises:
        ValueError: One is missing, or there are too few, too many, or of other shapes than latents.
    """
    numbers = sorted(int(name.removeprefix(_CONTROL)) for name in contents if re.fullmatch(CONTROLS, name))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"holds control images {', '.join(map(str, numbers))}, wanted are 0, 1, ...")
    if not least <= len(numbers) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"holds {len(numbers)} control images, this model takes {wanted}")
    found = tuple(needed(contents, f"{_CONTROL}{number}", axes).float() for number in numbers)
    channels = contents["latents"].shape[0]
    for number, control in enumerate(found):
        shape = tuple(control.shape)
        if shape[0] != channels or shape[1:-2] not in ((), (1,)) or 0 in shape:
            raise ValueError(f"holds {_CONTROL}{number} of shape {shape}, wanted is one image of {channels} channels")
    return {"controls": found} if found else {}


def control_contents(images: tuple[Tensor, ...] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inverse of `controls`."""
    return {f"{_CONTROL}{number}": image.to(dtype) for number, image in enumerate(images or ())}
