"""Names, keys and headers of the files of a musubi-tuner or blissful-tuner cache.

```
NAME_WIDTHxHEIGHT_SHORT.safetensors                 latents and mask of an image; sizes are the original's
NAME_START-FRAMES_WIDTHxHEIGHT_SHORT.safetensors    of a clip of a video
NAME_SHORT_te.safetensors                           text of an image, or of all clips of a video
```

What the keys hold is for `musubi_contents` to say.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MASK = "mask_weights"
REMEDY = "cache it again with the tool that wrote it, or prepare with `python -m mpp.prepare`"

_LATENTS = re.compile(r"(?P<item>.+)_(?P<width>\d+)x(?P<height>\d+)_(?P<short>[^_.]+)", re.DOTALL)
_TEXT = re.compile(r"(?P<item>.+)_(?P<short>[^_.]+)_te", re.DOTALL)
_WINDOW = re.compile(r"(?P<video>.+)_\d+-(?P<frames>\d+)(?:-\d+)?", re.DOTALL)
_KEY = re.compile(
    r"(?:varlen_)?(?P<content>.+?)(?:_(?P<sizes>\d+x\d+(?:x\d+)?))?(?:_(?P<dtype>bool|u?int\d+|b?float\d+(?:_e\d+m\d+\w*)?))?",
    re.DOTALL,
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class LatentsName:
    """What the name of a latents file says.

    Attributes:
        stem: The name without suffix.
        item: Name of the image or clip.
        size: Width and height of the original.
        short: Short name of the architecture.
    """

    stem: str
    item: str
    size: tuple[int, int]
    short: str

    @classmethod
    def read(cls, stem: str) -> "LatentsName | None":
        """The name of a latents file; None for others."""
        match = _LATENTS.fullmatch(stem)
        if match is None or _TEXT.fullmatch(stem):
            return None
        return cls(stem, match["item"], (int(match["width"]), int(match["height"])), match["short"])

    @property
    def window(self) -> tuple[str, int] | None:
        """Video and number of frames, where the item may be a clip."""
        match = _WINDOW.fullmatch(self.item)
        return None if match is None else (match["video"], int(match["frames"]))


def text_short(stem: str) -> str | None:
    """Short name of the architecture in the name of a text file; None for other files."""
    match = _TEXT.fullmatch(stem)
    return None if match is None else match["short"]


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a file describes it, without its values.

    Attributes:
        key: Its key.
        sizes: Numbers in the key; () without.
        dtype: The dtype that the key says; None without.
        meta: Its shape and dtype.
    """

    key: str
    sizes: tuple[int, ...]
    dtype: str | None
    meta: Tensor

    def check_dtype(self) -> None:
        """Refuse a key that says another dtype than the tensor's.

        Raises:
            ValueError: Both are said.
        """
        dtype = str(self.meta.dtype).removeprefix("torch.")
        if self.dtype not in (None, dtype):
            raise ValueError(f"holds {self.key} as {dtype}")

    def check_sizes(self) -> None:
        """Refuse a key that says other sizes than those of the latents it is of.

        Raises:
            ValueError: Both are said.
        """
        shape = tuple(self.meta.shape)
        cells = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
        if self.sizes and (1,) * (3 - len(self.sizes)) + self.sizes != cells:
            raise ValueError(f"holds {self.key} of shape {shape}")


@dataclass(frozen=True)
class Header:
    """What a file's header says: metadata, and its tensors by content."""

    metadata: Mapping[str, str]
    contents: Mapping[str, Stored]


def read_header(path: Path) -> Header:
    """Look at a file without reading its tensors.

    Raises:
        ValueError: It is missing or damaged, or holds one content twice or in a dtype that is not known here.
    """
    with _opened(path) as handle:
        metadata = dict(handle.metadata() or {})
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        described = {key: (found.get_shape(), found.get_dtype()) for key, found in slices.items()}
    contents: dict[str, Stored] = {}
    with blaming(path):
        for key, (shape, dtype) in described.items():
            match = _KEY.fullmatch(key)
            name, sizes, said = match.group("content", "sizes", "dtype") if match else (key, None, None)
            if name in contents:
                raise ValueError(f"holds {name} twice, as {contents[name].key} and {key}")
            if dtype not in _DTYPES:
                raise ValueError(f"holds {key} in the dtype {dtype}, which is not known here")
            numbers = tuple(int(number) for number in sizes.split("x")) if sizes else ()
            try:
                meta = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
            except (RuntimeError, OverflowError, TypeError) as error:
                raise ValueError(f"holds {key} of a shape that cannot be: {shape}") from error
            contents[name] = Stored(key, numbers, said, meta)
    return Header(metadata, contents)


def read_contents(path: Path, wanted: str) -> dict[str, Tensor]:
    """Contents whose names match a regex; floats of 8 bits, with which nothing computes, as bfloat16.

    Raises:
        ValueError: As `read_header` raises, or NaN or infinity.
    """
    found = {}
    keys = {name: stored.key for name, stored in read_header(path).contents.items() if re.fullmatch(wanted, name)}
    with _opened(path) as handle:
        for name, key in keys.items():
            found[name] = handle.get_tensor(key)
    with blaming(path):
        for name, tensor in found.items():
            if not tensor.is_floating_point():
                continue
            if tensor.itemsize == 1:
                found[name] = tensor.bfloat16()
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"holds NaN or infinity in {keys[name]}")
    return found


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Have an error name the file and say what to do.

    Raises:
        ValueError: In place of one from inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} {error}; {REMEDY}") from error


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        state = f"is damaged or cut short ({error})" if path.exists() else "is missing"
        raise ValueError(f"{path} {state}; {REMEDY}") from error
