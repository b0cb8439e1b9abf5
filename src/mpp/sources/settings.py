"""Settings of one dataset, and several of them in one YAML."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import yaml
from pydantic import ConfigDict

from mpp.media.paths import absolute, as_path, join, real
from mpp.sources.captions import CaptionVariants
from mpp.sources.items import MaskSource
from mpp.sources.tables import as_record, read_text

PATHS = (
    "image_dir",
    "manifest",
    "captions",
    "mask_dir",
    "control_dir",
    "val_image_dir",
    "val_mask_dir",
    "val_control_dir",
)
_INSIDE = PATHS[3:]  # folders that hold no training media, wherever they lie
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Where the media, masks and captions of a dataset lie.

    Each path may be a URL that fsspec knows (`s3://`, `gs://`, `https://`, ...).

    Args:
        image_dir: Folder of images and videos, searched with its subfolders. `NAME.txt`, or else `NAME.caption`,
            beside one is its caption, `NAME.layer0.png`, `NAME.layer1.png`, ... are an image's layers from bottom to
            top, for layered models.
        manifest: A JSONL file that names each media with its mask and caption, instead of folders.
        captions: A table of captions (`.jsonl`, `.csv` or `.tsv`) that is read instead of `NAME.txt`.
        mask_dir: Folder of masks, matched by path below it and stem: an image, for videos also a video or a folder of
            frames. Layers have masks of their own as `NAME.layer0.png`, ...; without any, the image's mask holds for
            all layers.
        control_dir: Folder of control images (edited images, references) for models that see them: `NAME.png`, or
            several as `NAME_0.png`, `NAME_1.png`, ...
        val_image_dir: Folder of media for validation only.
        val_mask_dir: Masks for these.
        val_control_dir: Control images for these.
        mask_sources: Which kinds of mask are taken, the first found wins: `folder` (`mask_dir`), `masklabel`
            (`NAME-masklabel.png` beside the media), `sidecar` (`NAME.mask.png`, `NAME_mask.png`, `NAME.mask.mp4`,
            `NAME.mask`, or a folder `NAME.mask` of frames beside the media), and last `alpha` (the image's alpha
            channel, where it is not opaque).
        invert_mask: Masks are 1 (learn) where their file, or the alpha channel, is black.
        require_mask: Refuse media without a mask instead of training on all of them.
        repeats: How often an epoch visits each training media, >= 1.
        caption_variants: Trigger word and shuffled tags.

    Raises:
        ValueError: Settings that contradict each other, or an unknown mask source.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    image_dir: str | None = None
    manifest: str | None = None
    captions: str | None = None
    mask_dir: str | None = None
    control_dir: str | None = None
    val_image_dir: str | None = None
    val_mask_dir: str | None = None
    val_control_dir: str | None = None
    mask_sources: Sequence[MaskSource] = get_args(MaskSource)
    invert_mask: bool = False
    require_mask: bool = False
    repeats: int = 1
    caption_variants: CaptionVariants = field(default_factory=CaptionVariants)

    def __post_init__(self) -> None:
        """Refuse unknown words and what contradicts itself."""
        object.__setattr__(self, "mask_sources", tuple(self.mask_sources))  # as equal records compare
        sources = list(self.mask_sources)
        unknown = [kind for kind in sources if kind not in get_args(MaskSource)]
        if unknown:
            raise ValueError(f"data.mask_sources may name {', '.join(get_args(MaskSource))}, got {unknown[0]!r}")
        if "alpha" in sources[:-1]:
            raise ValueError(f"data.mask_sources={sources}: alpha must be the last, for what has no mask file")
        if self.repeats < 1:
            raise ValueError(f"data.repeats must be at least 1, got {self.repeats}")
        for name in PATHS:
            if not (getattr(self, name) or "null").strip():
                raise ValueError(f"data.{name} is empty; leave it out (null) for none")
        self._check_paths()

    def _check_paths(self) -> None:
        given = [name for name in PATHS if getattr(self, name) is not None]
        if self.manifest is not None and len(given) > 1:
            other = next(name for name in given if name != "manifest")
            raise ValueError(f"data.manifest names media, masks and captions itself; leave out data.{other}")
        for name in ("val_mask_dir", "val_control_dir"):
            if getattr(self, name) is not None and self.val_image_dir is None:
                raise ValueError(f"data.{name} has no data.val_image_dir to go with")
        for media in ("image_dir", "val_image_dir"):
            for name in _INSIDE:
                if name != media and getattr(self, media) is not None and getattr(self, name) == getattr(self, media):
                    if "image" in name:
                        continue  # to measure on what is trained on
                    raise ValueError(
                        f"data.{name} and data.{media} are both {getattr(self, name)}, so images would be their own "
                        "masks or control images; put those into a folder of their own"
                    )

    def paths(self) -> dict[str, str]:
        """The settings that name paths, without those left out."""
        return {name: value for name in PATHS if (value := getattr(self, name)) is not None}

    def inside(self) -> set[str]:
        """Folders that hold no training media, as `real` gives them."""
        return {real(as_path(value)) for name, value in self.paths().items() if name in _INSIDE}

    def absolute(self) -> "SourceSettings":
        """The same from any working directory."""
        return replace(self, **{name: absolute(value) for name, value in self.paths().items()})


def read_datasets(
    datasets: Mapping[str, Mapping[str, Any]] | str, defaults: SourceSettings
) -> dict[str, SourceSettings]:
    """Several datasets by name.

    Args:
        datasets: Settings of each, or a YAML file that holds them; places in such a file are relative to its folder.
        defaults: Settings that are not paths, for datasets that do not say them.

    Raises:
        ValueError: The file is no such YAML, or a dataset has an unknown setting, one of the wrong type, or no media.
    """
    where = "data.datasets"
    if isinstance(datasets, str):
        folder, where = as_path(datasets).parent, datasets
        datasets = _load(datasets)
        datasets = {
            name: {
                option: str(join(folder, value)) if option in PATHS and isinstance(value, str) and value else value
                for option, value in settings.items()
            }
            if isinstance(settings, Mapping)
            else settings
            for name, settings in datasets.items()
        }
    if not datasets:
        raise ValueError(f"{where} names no dataset; write it as {{NAME: {{image_dir: ...}}, ...}}")
    return {name: _read(name, settings, defaults, where) for name, settings in datasets.items()}


def _read(name: object, settings: object, defaults: SourceSettings, where: str) -> SourceSettings:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a dataset's name must be letters, digits, `_`, `-` and `.`, got {name!r}")
    at = f"{where}.{name}" if where == "data.datasets" else f"{where}: {name}"
    if not isinstance(settings, Mapping):
        raise ValueError(f"{at} should be settings like {{image_dir: ...}}, got {settings!r}")
    shared = {option: value for option, value in asdict(defaults).items() if option not in PATHS}
    own = dict(settings)
    variants = own.get("caption_variants")
    if isinstance(variants, Mapping):
        own["caption_variants"] = shared["caption_variants"] | {k: v for k, v in variants.items() if k != "_target_"}
    dataset = as_record(SourceSettings, shared | own, at, below=".")
    if dataset.image_dir is None and dataset.manifest is None:
        raise ValueError(f"{at} has neither image_dir nor manifest")
    return dataset


def _load(text: str) -> Mapping[object, object]:
    path = as_path(text)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"data.datasets={text} must be a .yaml file, or the datasets themselves")
    content = read_text(path)
    try:
        found = yaml.load(content, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{text} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{text} should map names of datasets to their settings, got {type(found).__name__}")
    return found


class _Loader(yaml.SafeLoader):
    """Refuses two entries of one name, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                continue  # refused below
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
