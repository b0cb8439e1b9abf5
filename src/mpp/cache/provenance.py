"""What a cache file was made from and how: records here, JSON in the header of the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A file, or a folder that counts as one, as it was when it was read.

    Attributes:
        fingerprint: What tells from outside whether it has changed: its place as `source`, its size as `bytes`, and
            what else its storage says.
        content: Hash of what it holds.
    """

    fingerprint: Mapping[str, Any]
    content: str

    @property
    def path(self) -> str:
        """Where it lies."""
        return self.fingerprint["source"]


def _later(default: T, *, compare: bool) -> T:
    """A field that caches of earlier versions lack, which means its default."""
    return field(default=default, compare=compare, metadata={"later": True})


@dataclass(frozen=True)
class Provenance:
    """What the header of a cache file says. Fields made by `_later` stand there only where they say something."""

    def header(self) -> dict[str, Any]:
        """As JSON-able values."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        silent = {f.name for f in fields(self) if f.metadata.get("later") and found[f.name] == f.default}
        return {name: value for name, value in found.items() if name not in silent}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """Inverse of `header`, after a way through JSON.

        Raises:
            KeyError, TypeError, ValueError: It is another kind of record's, or damaged.
        """
        found = {f.name: header[f.name] for f in fields(cls) if f.name in header or not f.metadata.get("later")}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


@dataclass(frozen=True)
class TextProvenance(Provenance):
    """Of a caption's embeddings.

    Attributes:
        caption: The caption.
        seen: Identities of the images that the text encoder saw.
        unread: Words of the caption beyond the text encoder's length. Seen on the way, so no part of a comparison.
    """

    caption: str
    seen: tuple[str, ...]
    unread: str = _later("", compare=False)


@dataclass(frozen=True)
class PromptProvenance(Provenance):
    """Of a prompt's whole conditioning: the prompt, and the model by family, settings and fingerprints of weights.

    Attributes:
        text_weights: What the text encoders' weights were kept in.
    """

    caption: str
    family: str
    settings: Mapping[str, Any]
    vae: str | None
    text_encoder: str | None
    text_weights: str = _later("bf16", compare=True)


@dataclass(frozen=True)
class MediaProvenance(Provenance):
    """Of what is made from media.

    Attributes:
        sources: The files.
        geometry: Width and height of the upright media, width and height of the bucket, and whether it is mirrored.
        frames: Numbers of the source frames that a clip shows; None of a whole image.
    """

    sources: tuple[Source, ...]
    geometry: tuple[int, int, int, int, bool]
    frames: tuple[int, ...] | None

    def header(self) -> dict[str, Any]:
        """As JSON-able values, each source flat."""
        return super().header() | {
            "sources": [{**known.fingerprint, "content": known.content} for known in self.sources]
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """Inverse of `header`, after a way through JSON.

        Raises:
            KeyError, TypeError, ValueError: It is another kind of record's, or damaged.
        """
        rows = [dict(row) for row in header["sources"]]
        return super().from_header(
            {**header, "sources": [Source(content=row.pop("content"), fingerprint=row) for row in rows]}
        )


@dataclass(frozen=True)
class LatentsProvenance(MediaProvenance):
    """Of latents, and of the image conditioning beside them.

    Attributes:
        vae: Fingerprint of the VAE.
        alpha: Whether the media has an alpha that is not opaque. Seen on the way, so no part of a comparison.
        images: Shapes of the image conditioning by field name. No part of a comparison either.
        srgb: Whether colours of a source were converted to sRGB, which earlier versions never did.
        tiled: Whether the VAE was told to encode in tiles. It is the same but for blended borders, so no part of a
            comparison.
    """

    vae: str | None
    alpha: bool = field(default=False, compare=False)
    images: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    srgb: bool = _later(default=False, compare=True)
    tiled: bool = _later(default=False, compare=False)

    def header(self) -> dict[str, Any]:
        """As of any media; `images` are called `pictures` in the file."""
        found = super().header()
        return {"pictures": found.pop("images"), **found}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """As of any media, with shapes as tuples."""
        shapes = {name: tuple(shape) for name, shape in header["pictures"].items()}
        return super().from_header({**header, "images": shapes})


@dataclass(frozen=True)
class MaskProvenance(MediaProvenance):
    """Of a mask.

    Attributes:
        kind: Where it was found, as `Item.mask_kind`, or `alpha`; None: nowhere.
        shape: Of the mask: latent frames, height and width.
        invert: Whether it is 1 where the file is black.
    """

    kind: str | None
    shape: tuple[int, ...]
    invert: bool
