"""The on-disk cache: latents, masks and text embeddings in files of their own, and an index that names them.

```
cache.json                      what the cache was made with; written first
index.jsonl                     one line per sample; written last, so it only names complete files
latents/KEY.safetensors         "latents" (c, f, h, w) float32, normalised
masks/KEY.safetensors           "mask" (1, f, h, w) float32 in [0, 1]; only samples that have one
text/HASH.safetensors           the family's conditioning tensors of one caption, shared by equal captions
pictures/KEY.safetensors        the family's conditioning tensors of a sample's images; only where it has any
samples/HASH.safetensors        the whole conditioning of a prompt to generate from during training
previews/KEY.jpg                the image in its bucket, for logs and reports; layers as KEY.layer0.jpg, ...; of a
                                clip its first frame, and other latent frames as KEY.frame7.jpg, ...
notes.json                      where the samples came from, and what was left out
unsynced/                       while files are written, or after that was interrupted: see preparing/unsynced.py
```

Every tensor file carries its format version, what it was made from and a checksum in its header. All writing is atomic.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpp import __version__
from mpp.cache.index import Entry, Index, write_index
from mpp.cache.provenance import LatentsProvenance, MaskProvenance, PromptProvenance, Provenance
from mpp.core.loss import MaskedPriorLoss
from mpp.files import write_atomically, write_json
from mpp.models.contract import Architecture, Conditioning, Identity, LatentSpec

P = TypeVar("P", bound=Provenance)

FORMAT = 3
_CHECKED = 10_000
_AGAIN = "run `python -m mpp.prepare` again"


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache was made with; a run must agree.

    Attributes:
        family: Of the model.
        latents: Their shape.
        vae: Fingerprint of its weights; None where it was not known.
        text_encoder: The same.
        settings: Settings of the model that shape what is cached.
        given_frames: Leading latent frames that the model is given, for reports.
        text_weights: What the text encoders' weights were kept in, `bf16` as `model.text_dtype` says; None of a run
            that goes with any.
    """

    family: str
    latents: LatentSpec
    vae: str | None
    text_encoder: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    given_frames: int = 0
    text_weights: str | None = None

    @classmethod
    def of(cls, model: Architecture, identity: Identity, text_weights: str | None = None) -> "CacheIdentity":
        """What a run's caches are made with."""
        settings, weights = dict(model.cache_settings), (identity.vae, identity.text_encoder)
        return cls(model.family, model.latents, *weights, settings, model.given_frames, text_weights)

    def check(self, wanted: "CacheIdentity", folder: Path) -> list[str]:
        """Refuse a cache of another model; VAE and text encoder are compared where both are known.

        Returns:
            Names of what could not be compared because it is not on this machine.

        Raises:
            ValueError: Family, latent shape, VAE, text encoder or the bits of its weights, or a setting that shapes
                caches differ.
        """
        unknown = []
        for name in ("family", "latents", "vae", "text_encoder", "settings"):
            cached, run = getattr(self, name), getattr(wanted, name)
            if name in ("vae", "text_encoder") and (cached is None or run is None):
                unknown.append(name)
            elif cached != run:
                raise ValueError(
                    f"the cache {folder} was made with another {name} ({cached}) than this run's ({run}); choose the "
                    "model it was made with, or prepare into another data.cache_dir"
                )
        if None not in (wanted.text_weights, self.text_weights) and wanted.text_weights != self.text_weights:
            raise ValueError(
                f"the cache {folder} holds embeddings of a text encoder in {self.text_weights}, which do not mix with "
                f"those of memory.text_encoder={wanted.text_weights}; set it to {self.text_weights}, or prepare into "
                "another data.cache_dir"
            )
        return unknown


@dataclass(frozen=True)
class Notes:
    """What a preparation found besides its samples.

    Attributes:
        sources: Settings with which media and masks can be looked for again.
        unused: Names of masks and control images that belong to no media.
        skipped: Why media were left out.
    """

    sources: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def triggers(self) -> list[str]:
        """The trigger words that captions were prepared with, each once; of several datasets those of all."""
        datasets = self.sources.get("datasets") or {"": self.sources}
        found = [(settings.get("caption_variants") or {}).get("trigger") for settings in datasets.values()]
        return list(dict.fromkeys(" ".join(word.split()) for word in found if word))


def text_name(caption: str, seen: Sequence[str] = ()) -> str:
    """File name of a caption's embeddings, together with the images that the text encoder saw."""
    text = "\0".join((caption, *seen))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """A cache folder. Constructing one touches nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def latents_path(self, key: str) -> Path:
        """Where a sample's latents lie."""
        return self.folder / "latents" / f"{key}.safetensors"

    def mask_path(self, key: str) -> Path:
        """Where a sample's mask lies."""
        return self.folder / "masks" / f"{key}.safetensors"

    def text_path(self, name: str) -> Path:
        """Where a caption's embeddings lie."""
        return self.folder / "text" / f"{name}.safetensors"

    def images_path(self, key: str) -> Path:
        """Where a sample's image conditioning lies."""
        return self.folder / "pictures" / f"{key}.safetensors"

    def generation_path(self, name: str) -> Path:
        """Where the conditioning of a prompt to generate from lies."""
        return self.folder / "samples" / f"{name}.safetensors"

    def preview(self, key: str, suffix: str = "") -> Path | None:
        """The preview at `preview_path`; None where there is none."""
        path = self.preview_path(key, suffix)
        return path if path.is_file() else None

    def preview_path(self, key: str, suffix: str = "") -> Path:
        """Where the preview of a sample's first frame lies, or with `FrameAxis.suffix` that of another one."""
        return self.folder / "previews" / f"{key}{suffix}.jpg"

    def identity(self) -> CacheIdentity:
        """What the cache was made with.

        Raises:
            ValueError: There is no cache, or one of another format version.
        """
        path = self.folder / "cache.json"
        if not path.is_file():
            raise ValueError(
                f"no cache at {self.folder}; make one with `python -m mpp.prepare data.cache_dir={self.folder}`"
            )
        content = _json(path.read_bytes(), path)
        if content.get("format") != FORMAT:
            raise ValueError(
                f"the cache {self.folder} has format version {content.get('format')}, this mpp reads {FORMAT}; "
                "prepare into another data.cache_dir"
            )
        spec = content["latents"]
        latents = LatentSpec(**{**spec, "patch": tuple(spec["patch"])})
        return CacheIdentity(
            content["family"],
            latents,
            content["vae"],
            content["text_encoder"],
            content["settings"],
            content["given_frames"],
            content.get("text_weights") or "bf16",  # all that earlier versions knew
        )

    def write_identity(self, identity: CacheIdentity) -> None:
        """Record what the cache is made with."""
        write_json(self.folder / "cache.json", {"format": FORMAT, "mpp": __version__, **asdict(identity)})

    def notes(self) -> Notes:
        """What its preparation found; empty where there are no notes."""
        path = self.folder / "notes.json"
        if not path.is_file():
            return Notes()
        content = _json(path.read_bytes(), path)
        try:
            return Notes(content["sources"], tuple(content["unused"]), tuple(content["skipped"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error

    def write_notes(self, notes: Notes) -> None:
        """Record what a preparation found."""
        write_json(self.folder / "notes.json", asdict(notes))

    def entries(self) -> Index:
        """The samples of a finished cache.

        Raises:
            ValueError: The cache was never finished, or its index is damaged.
        """
        path = self.folder / "index.jsonl"
        if not path.is_file():
            raise ValueError(f"the cache {self.folder} is not finished: it has no index; {_AGAIN}, all shards of it")
        return Index.open(path)

    def write_index(self, entries: Sequence[Entry]) -> None:
        """Write the index; everything it names must be on disk already."""
        write_index(self.folder / "index.jsonl", entries)

    def latents(self, entry: Entry) -> Tensor:
        """A sample's latents `(c, f, h, w)`.

        Raises:
            ValueError: The file is missing, damaged, of another shape than the index says, or not finite.
        """
        path = self.latents_path(entry.key)
        latents = _tensor(path, "latents", entry.shape)
        _check_finite({"latents": latents}, f"{entry.key}: its latents hold", path)
        return latents

    def mask(self, entry: Entry) -> Tensor:
        """A sample's mask `(1, f, h, w)`; all ones without one.

        Raises:
            ValueError: The file is missing, damaged, not finite, or disagrees with the latents.
        """
        shape = (1, *entry.shape[1:])
        if entry.mask is None:
            return torch.ones(shape)
        path = self.mask_path(entry.key)
        mask = _tensor(path, "mask", shape)
        _check_finite({"mask": mask}, f"{entry.key}: its mask holds", path)
        return mask

    def latents_made_from(self, entry: Entry) -> LatentsProvenance | None:
        """What a sample's latents were made from; None where their file is damaged."""
        return made_from(self.latents_path(entry.key), LatentsProvenance)

    def mask_made_from(self, entry: Entry) -> MaskProvenance | None:
        """What a sample's mask was made from; None where there is none, or its file is damaged."""
        return made_from(self.mask_path(entry.key), MaskProvenance)

    def has_text(self, name: str) -> bool:
        """Whether embeddings of that name are there."""
        return self.text_path(name).is_file()

    def prompt(self, name: str, model: Architecture) -> Conditioning | None:
        """A prompt's conditioning, as it was prepared for a model's family and settings; None where it was not.

        Raises:
            ValueError: The file is of another family, or not finite.
        """
        path = self.generation_path(name)
        made = made_from(path, PromptProvenance)
        if made is None or (made.family, made.settings) != (model.family, dict(model.cache_settings)):
            return None
        tensors = read_tensors(path)
        _check_finite(tensors, f"the prompt {made.caption!r}: its conditioning holds", path)
        return as_conditioning(tensors, model.conditioning, path)

    def conditioning(self, entry: Entry, record: type[Conditioning]) -> Conditioning:
        """A sample's text embeddings and image conditioning as the family's record.

        Raises:
            ValueError: A file is missing, damaged, not finite, or of another family.
        """
        path = self.text_path(entry.text)
        tensors = read_tensors(path)
        _check_finite(tensors, f"{entry.key}: its text embeddings hold", path)
        if entry.images:
            images = read_tensors(self.images_path(entry.key))
            _check_finite(images, f"{entry.key}: its image conditioning holds", self.images_path(entry.key))
            tensors |= images
        return as_conditioning(tensors, record, path)

    def advice(self, loss: MaskedPriorLoss) -> list[str]:
        """Warnings about using this cache with a loss; there are none about our own."""
        del loss
        return []

    def check_some(self, entries: Sequence[Entry]) -> None:
        """`check_files` of at most 10,000 samples, evenly spread; more would delay the start of a run.

        Raises:
            ValueError: As `check_files` raises.
        """
        for entry in evenly_spread(entries):
            self.check_files(entry)

    def check_files(self, entry: Entry) -> None:
        """Refuse a sample whose files are missing, cut short or disagree, from their headers alone.

        Raises:
            ValueError: As `latents`, `mask` and `text` raise, but for values.
        """
        _check_shape(self.latents_path(entry.key), "latents", entry.shape)
        if entry.mask is not None:
            _check_shape(self.mask_path(entry.key), "mask", (1, *entry.shape[1:]))
        with _open(self.text_path(entry.text)):
            pass
        for name, shape in entry.images.items():
            _check_shape(self.images_path(entry.key), name, shape)


def evenly_spread(entries: Sequence[Entry], most: int = _CHECKED) -> Sequence[Entry]:
    """At most `most` of the entries, evenly spread: looking at more would delay the start of a run."""
    return entries[:: max(1, -(-len(entries) // most))]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a cache file.

    Raises:
        ValueError: It is missing or damaged.
    """
    with _open(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def as_conditioning(tensors: Mapping[str, Tensor], record: type[Conditioning], path: Path) -> Conditioning:
    """Tensors as the family's record.

    Raises:
        ValueError: They are another family's.
    """
    try:
        return record.from_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path} is not this model's conditioning ({error}); {_AGAIN}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object], *, synced: bool = True
) -> None:
    """Write a cache file atomically; its header says what it was made from, as `Provenance.header` gives it.

    Args:
        path: The file.
        tensors: What it holds.
        header: What it was made from.
        synced: As `write_atomically` takes it.

    Raises:
        ValueError: A tensor is not finite; nothing was written.
    """
    if not are_finite(tensors):
        raise ValueError(f"NaN or infinity is not written into {path}")
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    made = json.dumps(dict(header), sort_keys=True)
    metadata = {"format": str(FORMAT), "made_from": made, "crc32": _checksum(contents)}
    write_atomically(path, lambda temporary: save_file(contents, temporary, metadata=metadata), synced=synced)


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    # `aminmax` hands NaN on, and takes a twentieth of the time of looking at each value
    extremes = [torch.stack(tensor.aminmax()) for tensor in tensors.values() if tensor.numel()]
    return all(bool(pair.isfinite().all()) for pair in extremes)


def is_whole(path: Path) -> bool:
    """Whether a file, read whole, holds what was written: tensors by their checksum, a preview by its ends."""
    try:
        if path.suffix == ".jpg":
            content = path.read_bytes()
            return content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")
        with safe_open(path, "pt") as handle:
            said = (handle.metadata() or {}).get("crc32")
            return said is None or said == _checksum({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of the bytes of all tensors, in the order of their names; files of earlier versions have none."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def made_from(path: Path, kind: type[P]) -> P | None:
    """What a cache file was made from; None where it is missing, damaged, or of another kind or format version."""
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
        if metadata.get("format") != str(FORMAT):
            return None
        return kind.from_header(json.loads(metadata["made_from"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        state = "damaged or cut short" if path.is_file() else "missing"
        raise ValueError(f"{path} is {state}; {_AGAIN}") from error


def _check_shape(path: Path, name: str, shape: Sequence[int]) -> None:
    with _open(path) as handle:
        if name not in handle.keys():  # noqa: SIM118
            raise ValueError(f"{path} holds no {name}; {_AGAIN}")
        got = tuple(handle.get_slice(name).get_shape())
    if got != tuple(shape):
        raise ValueError(f"{path}: {name} is {got}, the sample's latents call for {tuple(shape)}; {_AGAIN}")


def _tensor(path: Path, name: str, shape: Sequence[int]) -> Tensor:
    _check_shape(path, name, shape)
    with _open(path) as handle:
        return handle.get_tensor(name)


def _check_finite(tensors: Mapping[str, Tensor], what: str, path: Path) -> None:
    if not are_finite(tensors):
        raise ValueError(f"{what} NaN or infinity ({path}); delete the file and {_AGAIN}")


def _json(text: bytes, path: Path) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no object); {_AGAIN}")
    return content


T = TypeVar("T")


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items, the last perhaps shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
