"""Single files in fp8, scaled or not: which of their tensors are weights, and which say how others are read.

The formats are ComfyUI's (its QUANTIZATION.md; comfy/utils.py, convert_old_quants; comfy/ops.py; comfy/quant_ops.py):

- older files have `LAYER.scale_weight` beside fp8 weights, and an empty tensor `scaled_fp8`;
- newer ones have `LAYER.weight_scale`, and say what a layer is in JSON, as the tensor `LAYER.comfy_quant` or in the
  header's `_quantization_metadata`;
- files without any of these are plain numbers in e4m3 or e5m2.

A weight is its numbers times the scale: one for all, or one for each output row. `LAYER.scale_input` and
`LAYER.input_scale` scale activations for fp8 products, which nothing here makes, and are passed over.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mpp.memory.scaled import ScaledLinear, dequantized
from mpp.wording import few

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_NAMES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # of comfy_quant
_FLOATS = ("F32", "F16", "BF16")
_SCALES = (".scale_weight", ".weight_scale")
_MARK, _QUANT = "scaled_fp8", ".comfy_quant"
_ASIDE = (".scale_input", ".input_scale", ".comfy_attention.config")


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a single file holds, by names without prefixes.

    Attributes:
        shapes: Of the tensors that are the model's.
        fp8: Formats of those that are in fp8.
        scales: Names in the file of their scales; {} where the file has none.
    """

    shapes: Mapping[str, list[int]]
    fp8: Mapping[str, torch.dtype]
    scales: Mapping[str, str]


def strip_prefix(key: str) -> str:
    """A tensor's name without the prefixes that other programs put before it."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def safetensors_header(file: Path) -> SafetensorsHeader:
    """What a `.safetensors` holds; reads its header, and the few numbers that say how others are read.

    Raises:
        ValueError: An incomplete file, weights of a kind that is not known here, scales that are missing for some
            weights or of another shape than one number or one for each row.
    """
    try:
        with safe_open(file, "pt") as handle:
            return _Reader(handle).header()
    except SafetensorError as error:
        raise ValueError(f"model.pretrained={file} is not a complete .safetensors file ({error})") from error
    except ValueError as error:
        raise ValueError(f"model.pretrained={file}{error}") from error


class _Reader:
    def __init__(self, handle: Any) -> None:  # noqa: ANN401 (safetensors' own)
        self.handle = handle
        self.keys = {strip_prefix(key): key for key in handle.keys()}  # noqa: SIM118
        slices = {name: handle.get_slice(key) for name, key in self.keys.items()}
        self.shapes = {name: slice.get_shape() for name, slice in slices.items()}
        self.kinds = {name: slice.get_dtype() for name, slice in slices.items()}

    def header(self) -> SafetensorsHeader:
        said = self._said()
        fp8 = {name: kind for name, kind in self.kinds.items() if kind in _FP8 and name != _MARK}
        fp8 |= {name: kind for name, kind in said.items() if self.kinds.get(name) == "U8"}
        scales = {}
        for suffix in _SCALES:
            found = {f"{n.removesuffix(suffix)}.weight": key for n, key in self.keys.items() if n.endswith(suffix)}
            _refuse(" has two scales for", found.keys() & scales.keys())
            scales |= found
        aside = {name for name in self.keys if name == _MARK or name.endswith((*_SCALES, *_ASIDE, _QUANT))}
        shapes = {name: shape for name, shape in self.shapes.items() if name not in aside}
        self._check_kinds(said, shapes, fp8)
        self._check_scales(scales, fp8, scaled=bool(scales or said) or _MARK in self.keys)
        scales = {name: key for name, key in scales.items() if name in fp8}
        return SafetensorsHeader(shapes, {name: _FP8[kind] for name, kind in fp8.items()}, scales)

    def _said(self) -> dict[str, str]:
        """What the file says of its weights in JSON, with safetensors' names for fp8."""
        metadata = (self.handle.metadata() or {}).get("_quantization_metadata")
        where = "_quantization_metadata"
        try:
            layers = {} if metadata is None else json.loads(metadata)["layers"]
            layers = {strip_prefix(name): layer for name, layer in layers.items()}
            for where in [name for name in self.keys if name.endswith(_QUANT)]:
                text = self.handle.get_tensor(self.keys[where])
                layers[where.removesuffix(_QUANT)] = json.loads(bytes(text.tolist()))
            said = {}
            for where, layer in layers.items():
                said[f"{where}.weight"] = str(layer["format"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f" does not say in what format its weights are ({where}: {type(error).__name__}: {error}); it is "
                "damaged, or newer than this program: give the bf16 file"
            ) from error
        unknown = {name: kind for name, kind in said.items() if kind not in _NAMES}
        if unknown:
            kinds = ", ".join(sorted(set(unknown.values())))
            _refuse(
                f" holds weights in {kinds}, which is not read here; give the bf16 file, or one in fp8 "
                f"({', '.join(_NAMES)}). These are",
                unknown,
            )
        return {name: _NAMES[kind] for name, kind in said.items()}

    def _check_kinds(self, said: Mapping[str, str], shapes: Mapping[str, Any], fp8: Mapping[str, str]) -> None:
        _refuse(" says the format of weights that it does not have:", said.keys() - shapes.keys())
        other = {name for name, kind in said.items() if self.kinds[name] not in ("U8", kind)}
        _refuse(" says another format of weights than it has them in:", other)
        known = fp8.keys() | {name for name in shapes if self.kinds[name] in ("F64", *_FLOATS)}
        packed = {name for name in shapes if name.endswith(".weight")} - known
        kinds = ", ".join(sorted({self.kinds[name] for name in packed}))
        _refuse(f" holds weights in {kinds}, of a quantisation not known here; give the bf16 file:", packed)

    def _check_scales(self, scales: Mapping[str, str], fp8: Mapping[str, str], *, scaled: bool) -> None:
        _refuse(" has scales of weights that it does not have:", scales.keys() - self.kinds.keys())
        if scaled:
            bare = fp8.keys() - scales.keys()
            _refuse(" has no scales for some of its fp8 weights, which mean nothing without; it is damaged:", bare)
        odd = set()
        for name, key in scales.items():
            scale = self.handle.get_slice(key)
            shape, rows = scale.get_shape(), self.shapes[name][:1]
            fits = shape[:1] in ([], [1], rows) and all(size == 1 for size in shape[1:])
            if not fits or scale.get_dtype() not in _FLOATS:
                odd.add(f"{name} ({scale.get_dtype()} {shape} for {self.shapes[name]})")
        _refuse(" has scales that are neither one number nor one for each output row:", odd)
        idle = {name for name in scales.keys() - fp8.keys() if (self.handle.get_tensor(scales[name]) != 1).any()}
        _refuse(" has scales for weights that are not in fp8:", idle)


def _refuse(why: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        raise ValueError(f"{why} {', '.join(few(names))}")


@dataclass(frozen=True)
class Fp8:
    """A tensor in fp8.

    Attributes:
        numbers: (rows, ...).
        scale: Of no dimension, or (rows, 1).
    """

    numbers: Tensor
    scale: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """Of the numbers."""
        return self.numbers.shape

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`."""
        return dequantized(self.numbers, self.scale, dtype)

    def layer(self, linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        """A layer that keeps it, in place of one on the meta device."""
        return ScaledLinear(self.numbers, self.scale, linear.bias, dtype)


def read_safetensors(
    file: Path, header: SafetensorsHeader, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor | Fp8]:
    """The tensors of a file under diffusers' names.

    Scales take the same way as their weights: each row of a weight has its own number, so whatever a conversion splits,
    joins or swaps, the numbers tell whose rows they are.

    Args:
        file: A `.safetensors`; its tensors stay in it until somebody reads them.
        header: What it holds.
        convert: Original state to diffusers' state.
    """
    found = {strip_prefix(key): tensor for key, tensor in load_file(file).items()}
    state: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name in header.shapes:
        format = header.fp8.get(name)
        state[name] = found[name] if format is None else found[name].view(format)
        rows[name] = torch.empty_like(state[name], device="meta")
        if format is not None:
            scale = found[strip_prefix(header.scales[name])] if name in header.scales else torch.ones(())
            rows[name] = scale.reshape(-1, 1).expand(len(state[name]), 1)
    scales = {name: _narrow(scale) for name, scale in convert(rows).items() if not scale.is_meta} if header.fp8 else {}
    return {name: Fp8(t, scales[name]) if name in scales else t for name, t in convert(state).items()}


def _narrow(scale: Tensor) -> Tensor:
    return scale[0, 0].clone() if (scale == scale[0]).all() else scale.contiguous()
