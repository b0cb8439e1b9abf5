"""What the headers of a musubi-tuner cache's files say of a sample, checked against the model that trains."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mpp.models.conditioning import flat_tensors
from mpp.models.contract import LatentSpec
from mpp.musubi.contents import MusubiFormat
from mpp.musubi.names import MASK, Header, LatentsName, Stored, blaming, read_header
from mpp.wording import few

T = TypeVar("T")


@dataclass(frozen=True)
class LatentsRecord:
    """One latents file.

    Attributes:
        shape: Of the latents (c, f, h, w).
        images: Shapes of the image conditioning by field name.
        baked: Gamma and floor that its mask was cached with; None without a mask.
    """

    shape: tuple[int, ...]
    images: dict[str, tuple[int, ...]]
    baked: tuple[float, float] | None


@dataclass(frozen=True)
class Text:
    """One text file.

    Attributes:
        caption: The caption itself.
        widths: Size of the last axis of its embeddings, by content.
    """

    caption: str
    widths: dict[str, int]


def describe_latents(path: Path, name: LatentsName, form: MusubiFormat, spec: LatentSpec) -> LatentsRecord:
    """Look at a latents file.

    Raises:
        ValueError: Names the file: it is missing, damaged, of another architecture than its name says, or its shapes
            disagree with its keys, its mask or the model.
    """
    header = read_header(path)
    with blaming(path):
        _check_metadata(header, form.names[name.short], name.short)
        _check_name(header, name)
        _check_known(header, f"latents|{MASK}|{form.reads}|{form.ignores}")
        seen = {key: stored for key, stored in header.contents.items() if re.fullmatch(f"latents|{form.reads}", key)}
        for content, stored in seen.items():
            stored.check_sizes()
            if content not in form.mistyped:
                stored.check_dtype()
        metas = {content: stored.meta for content, stored in seen.items()}
        _check_floats(metas)
        metas["latents"] = form.latents(have(metas, "latents"))
        shape = tuple(metas["latents"].shape)
        _check_shape(shape, spec)
        images = {field: tuple(meta.shape) for field, meta in flat_tensors(form.images(metas)).items()}
        baked = _baked(header, shape)
    return LatentsRecord(shape, images, baked)


def describe_text(path: Path, short: str, form: MusubiFormat) -> Text:
    """Look at a text file.

    Raises:
        ValueError: Names the file: it is missing, damaged, of another architecture than its name says, or not what the
            model sees.
    """
    header = read_header(path)
    with blaming(path):
        _check_metadata(header, form.names[short], short)
        _check_known(header, "|".join([*form.text_axes, form.ignores]))
        if "caption1" not in header.metadata:
            raise ValueError("states no caption1 in its metadata")
        metas = {name: have(header.contents, name).meta for name in form.text_axes}
        for name, axes in form.text_axes.items():
            header.contents[name].check_dtype()
            if metas[name].ndim != axes:
                raise ValueError(f"holds {name} of shape {tuple(metas[name].shape)}, wanted are {axes} axes")
        embeddings = {name: metas[name] for name, _ in form.text.values()}
        _check_floats(embeddings)
        _check_tokens(metas, form)
    return Text(header.metadata["caption1"], {name: meta.shape[-1] for name, meta in embeddings.items()})


def check_cells(mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask of other cells than the latents (c, f, h, w); axes of one in front do not count.

    Raises:
        ValueError: Both shapes are said.
    """
    if _stripped(mask.shape) != _stripped(shape[1:]):
        raise ValueError(f"holds a mask of shape {tuple(mask.shape)} for latents of shape {tuple(shape)}")


def have(contents: Mapping[str, T], name: str) -> T:
    """One of the contents.

    Raises:
        ValueError: It is not there.
    """
    if name not in contents:
        raise ValueError(f"holds no {name}")
    return contents[name]


def _check_metadata(header: Header, names: Sequence[str], short: str) -> None:
    """Refuse a file of another architecture than its name says, or of another version."""
    stated = header.metadata.get("architecture")
    if stated not in names:
        raise ValueError(f"states architecture={stated} in its metadata, its name says {short} ({' or '.join(names)})")
    version = header.metadata.get("format_version", "1.0.1")
    if not version.startswith("1."):
        raise ValueError(f"has format_version={version}, known are versions 1")


def _check_name(header: Header, name: LatentsName) -> None:
    """Refuse a file whose metadata says another size or number of frames than its name."""
    said = {"width": name.size[0], "height": name.size[1]}
    if name.window:
        said["frame_count"] = name.window[1]
    for field, number in said.items():
        stated = header.metadata.get(field, str(number))
        if stated != str(number):
            raise ValueError(f"states {field}={stated} in its metadata, its name says {number}")


def _check_known(header: Header, names: str) -> None:
    strange = [name for name in header.contents if not re.fullmatch(names, name)]
    if strange:
        raise ValueError(f"holds {', '.join(few(sorted(strange)))}, which this model knows nothing of")


def _check_floats(metas: Mapping[str, Tensor]) -> None:
    for name, meta in metas.items():
        if not meta.is_floating_point():
            raise ValueError(f"holds {name} as {meta.dtype}, wanted are floats")


def _check_shape(shape: Sequence[int], spec: LatentSpec) -> None:
    """Refuse latents that are not the model's."""
    fits = all(size > 0 and size % patch == 0 for size, patch in zip(shape[1:], spec.patch, strict=True))
    if shape[0] != spec.channels or not fits:
        raise ValueError(
            f"holds latents of shape {tuple(shape)}, this model has {spec.channels} channels and patches of "
            f"{'x'.join(map(str, spec.patch))} cells"
        )


def _check_tokens(metas: Mapping[str, Tensor], form: MusubiFormat) -> None:
    """Refuse a text that is too long or short, or whose mask is of another length."""
    (least, most), tokens = form.tokens, metas[form.main_text].shape[0]
    if form.padded is not None:
        mask = metas[f"{form.main_text}_mask"].shape[0]
        if mask != tokens:
            raise ValueError(f"holds {tokens} tokens of {form.main_text} and a mask of {mask}")
    elif not least <= tokens <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise ValueError(f"holds {tokens} tokens of {form.main_text}, this model takes {wanted}")


def _baked(header: Header, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Gamma and floor of the mask, after a look at its shape; None without a mask."""
    stored: Stored | None = header.contents.get(MASK)
    if stored is None:
        return None
    check_cells(stored.meta, shape)
    stored.check_dtype()
    if stored.sizes and (1,) * (3 - len(stored.sizes)) + stored.sizes != shape[1:]:
        raise ValueError(f"has {stored.key} beside latents of shape {shape}")
    gamma = _number(header.metadata, "cache_mask_gamma", 1.0)
    if not 0 < gamma < math.inf:
        raise ValueError(f"states cache_mask_gamma={header.metadata['cache_mask_gamma']}, wanted is a number above 0")
    floor = _number(header.metadata, "cache_mask_min_weight", 0.0)
    if not 0 <= floor < 1:
        stated = header.metadata["cache_mask_min_weight"]
        raise ValueError(f"states cache_mask_min_weight={stated}, wanted is a number from 0 to below 1")
    return gamma, floor


def _number(metadata: Mapping[str, str], name: str, default: float) -> float:
    """NaN where it is no number."""
    try:
        return float(metadata.get(name, default))
    except ValueError:
        return math.nan


def _stripped(shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return sizes
