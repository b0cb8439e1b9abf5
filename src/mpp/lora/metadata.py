"""Metadata of LoRA files as programs that list them read it: ModelSpec, the trainers' `ss_*`, and hashes.

`modelspec.*` is Stability's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). `ss_*` and `sshs_*` are those of
sd-scripts (library/train_util.py) and musubi-tuner (hv_train_network.py). Read by ComfyUI
(app/assets/services/metadata_extract.py), ComfyUI-Lora-Manager (py/utils/lora_metadata.py) and SwarmUI.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from PIL import Image
from torch import Tensor

from mpp.lora.record import base_name, public_record
from mpp.media.images import read_image
from mpp.models.contract import Architecture

_SPEC = "1.0.1"
_TEXTS = ("title", "author", "license", "description", "tags", "trigger_phrase", "usage_hint")
_LONGEST = {"description": 32_768}  # characters
_LONG = 2_048  # what ComfyUI keeps of a value
_THUMBNAIL = 512  # pixels
_KEPT = ("modelspec.", "ss_", "ssmd_")  # of a file's metadata by its exports
_COUNTED = "captions"  # what `ss_tag_frequency` counts in, which the trainers call by the folder of images
_LEGACY = slice(0x100000, 0x110000)  # bytes of the older hash of web UIs
_BLANK = {"modelspec.hash_sha256": "0x" + "0" * 64, "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the user says of a LoRA in its files. Texts have up to 2048 characters, "" is none.

    Args:
        title: Its name for people; None: that of the run's folder.
        author: Who made it.
        license: Its terms: their name, a link, or in full.
        description: What it does, up to 32768 characters.
        tags: Separated by commas.
        trigger_phrase: Words that prompts need, separated by commas; None: the trigger word of the prepared captions.
        usage_hint: How to use it, in short.
        thumbnail: An image of at most 512 pixels in the file: true for the newest sample of training (its first prompt,
            by the LoRA), or an image file.
        full_record: Put the whole record of the run in, with its paths and prompts.

    Raises:
        ValueError: A text that is too long or holds control characters, or a thumbnail that is no image.
    """

    title: str | None = None
    author: str | None = None
    license: str | None = None
    description: str | None = None
    tags: str | None = None
    trigger_phrase: str | None = None
    usage_hint: str | None = None
    thumbnail: bool | str = False
    full_record: bool = False

    def __post_init__(self) -> None:
        """Refuse what no file should hold."""
        for name in _TEXTS:
            text, most = getattr(self, name) or "", _LONGEST.get(name, _LONG)
            if len(text) > most:
                raise ValueError(f"export.metadata.{name} may have {most} characters, got {len(text)}; shorten it")
            odd = next((sign for sign in text if not (sign.isprintable() or sign in "\n\t")), None)
            if odd is not None:
                raise ValueError(f"export.metadata.{name} holds {odd!r}, which is no text; leave it out")
        if isinstance(self.thumbnail, str):
            _thumbnail(self.thumbnail)

    @property
    def words(self) -> list[str]:
        """The words of the trigger phrase."""
        return _words(self.trigger_phrase or "")

    def record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What of a run's record goes into its files."""
        return dict(record) if self.full_record else public_record(record)

    def over(self, described: Mapping[str, str], *, part: str = "", image: Image.Image | None = None) -> dict[str, str]:
        """Metadata with what the user says in place of what was found.

        Args:
            described: As `describe` gives it, or as it stands in a file.
            part: The expert that the file is for, which its title says.
            image: The newest sample, where there is one.
        """
        said = {f"modelspec.{name}": value for name in _TEXTS if (value := getattr(self, name)) is not None}
        found = {**described, **said}
        if self.title:
            found["modelspec.title"] = _titled(self.title, part)
        if self.trigger_phrase is not None:
            known = json.loads(found.get("ss_tag_frequency", "{}")).get(_COUNTED, {})
            counts = {word: known.get(word, 1) for word in self.words}
            found["ss_tag_frequency"] = json.dumps({_COUNTED: counts}) if counts else ""
        source = self.thumbnail if isinstance(self.thumbnail, str) else image if self.thumbnail else None
        if source is not None:
            encoded = _thumbnail(source)
            found["modelspec.thumbnail"] = f"data:image/jpeg;base64,{encoded}"
            found["ssmd_cover_images"] = json.dumps([encoded])
        return {key: value for key, value in found.items() if value}


@dataclass(frozen=True)
class Facts:
    """What is known of a LoRA besides its run's record.

    Attributes:
        name: Of its run, or of its file.
        date: When it was saved, by ISO 8601.
        size: Width and height of most samples, in pixels.
        samples: How many it was trained on.
        words: Trigger words, and how many captions hold them.
    """

    name: str
    date: str | None = None
    size: tuple[int, int] | None = None
    samples: int | None = None
    words: Mapping[str, int] = field(default_factory=dict)


def describe(model: Architecture, record: Mapping[str, Any], facts: Facts, *, part: str = "") -> dict[str, str]:
    """Metadata of a LoRA by what is known of it; what is not known is left out.

    Args:
        model: The family.
        record: Of the run; {} for files of others.
        facts: What else is known.
        part: The expert that the file is for.
    """
    known, adapter = model.model_id, record.get("adapter") or {}
    name, low, high = _titled(facts.name, part), *_sigmas(model, part)
    found = {
        "modelspec.sai_model_spec": _SPEC,
        "modelspec.architecture": f"{known.architecture}/lora",
        "modelspec.implementation": known.implementation,
        "modelspec.title": name,
        "modelspec.date": facts.date,
        "modelspec.resolution": facts.size and "{}x{}".format(*facts.size),
        "modelspec.trigger_phrase": ", ".join(facts.words),
        "modelspec.timestep_range": None if (low, high) == (0, 1) else f"{low * 1000:.0f},{high * 1000:.0f}",
        "ss_base_model_version": known.version,
        "ss_sd_model_name": base_name(model.pretrained),
        "ss_sd_model_hash": _file_hash(model.pretrained),
        "ss_output_name": name,
        "ss_network_dim": adapter.get("rank"),
        "ss_network_alpha": adapter.get("alpha"),
        "ss_network_dropout": adapter.get("dropout"),
        "ss_network_args": adapter.get("kind") and json.dumps({"algo": adapter["kind"]}),
        "ss_resolution": facts.size and "({}, {})".format(*facts.size),
        "ss_steps": record.get("steps"),
        "ss_seed": record.get("seed"),
        "ss_num_train_items": facts.samples,
        "ss_tag_frequency": facts.words and json.dumps({_COUNTED: dict(facts.words)}),
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "", {})} | network_module(None, {})


def network_module(format: str | None, described: Mapping[str, str]) -> dict[str, str]:
    """`ss_network_module` of a file: what reads it in the trainers, or PEFT.

    Args:
        format: The file's; None: as it was trained.
        described: Its metadata, which says the kind of adapter.
    """
    if format != "kohya":
        return {"ss_network_module": "peft"}
    kind = json.loads(described.get("ss_network_args", "{}")).get("algo")
    return {"ss_network_module": "networks.lora" if kind in (None, "lora", "rslora") else "lycoris.kohya"}


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What exports keep of a file's metadata; {} where it has none for other programs."""
    described = "modelspec.sai_model_spec" in metadata
    return {key: value for key, value in metadata.items() if described and key.startswith(_KEPT)}


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whose bytes follow from what it holds alone; described ones get their hashes.

    `modelspec.hash_sha256` and `sshs_model_hash` are of the bytes after the header. `sshs_legacy_hash` is of 64 KiB at
    1 MiB of the file that holds `ss_*` alone, as sd-scripts makes it (train_util.py, precalculate_safetensors_hashes).

    Raises:
        OSError: The disk is full or not writable.
    """
    described = "modelspec.sai_model_spec" in metadata
    safetensors.torch.save_file(dict(tensors), path, metadata={**metadata, **(_BLANK if described else {})})
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        layout = json.loads(file.read(start - 8))
        del layout["__metadata__"]
        header = _header(layout, {**metadata, **(_hashes(file, start, layout, metadata) if described else {})})
        assert len(header) == start  # only the order is another, and what was blank
        file.seek(0)
        file.write(header)


def _hashes(file: BinaryIO, start: int, layout: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of a file at the end of its header."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    trained = _header(layout, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    head, after = trained[_LEGACY], [max(0, at - len(trained)) for at in (_LEGACY.start, _LEGACY.stop)]
    file.seek(start + after[0])
    legacy = hashlib.sha256(head + file.read(after[1] - after[0])).hexdigest()[:8]
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest, "sshs_legacy_hash": legacy}


def _header(layout: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded to 8 bytes; safetensors itself leaves the order of the metadata to chance."""
    entries = {"__metadata__": dict(sorted(metadata.items())), **layout}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _thumbnail(source: str | Image.Image) -> str:
    """A JPEG in base64."""
    if isinstance(source, str):
        source = read_image(Path(source).expanduser(), srgb=True).rgb
    image = source.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return base64.b64encode(written.getvalue()).decode()


def _words(phrase: str) -> list[str]:
    return [word for part in phrase.split(",") if (word := " ".join(part.split()))]


def _titled(title: str, part: str) -> str:
    return f"{title} ({part})" if part else title


def _sigmas(model: Architecture, part: str) -> tuple[float, float]:
    """The range of sigma that a LoRA was trained on."""
    low, high = model.sigma.min_sigma, model.sigma.max_sigma
    if part:
        number = list(model.folders).index(part)
        ends = (0.0, *model.boundaries, 1.0)
        low, high = max(low, ends[number]), min(high, ends[number + 1])
    return low, high


def _file_hash(source: str) -> str | None:
    """The older hash of a base that is one file, as sd-scripts has it (train_util.py, model_hash)."""
    path = Path(source).expanduser()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(_LEGACY.start)
        return hashlib.sha256(file.read(_LEGACY.stop - _LEGACY.start)).hexdigest()[:8]
