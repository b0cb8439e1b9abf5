"""LoRA files for other tools: names, scales and fused layers. Pure conversion of tensors.

What the names and alpha mean:

- ComfyUI: Comfy-Org/ComfyUI `comfy/lora.py` (`diffusion_model.<module>`, and diffusers' names where a model has both)
  and `comfy/weight_adapter/{lora,lokr,loha}.py`: W + alpha / rank * B @ A, without alpha W + B @ A; LoKr applies alpha
  only if a factor is decomposed; LoHa is W + alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b); DoRA is
  `dora_scale * (W + B @ A) / |W|`. The file's metadata is not read.
- kohya's tools: `networks/{lora,lokr,loha}.py` of sd-scripts and musubi-tuner (`lora_unet_<module_with_underscores>`).
- diffusers: `loaders/lora_conversion_utils.py`. The readers of `diffusion_model.` names take `lora_A` and `lora_B`;
  those of FLUX.2 and HunyuanVideo fail on an alpha. The readers of `lora_unet_` names take `lora_down`, `lora_up` and
  alpha, and WAN's fails without alpha.

So the scale of a file for ComfyUI is in B, and its alpha is the rank, or not there: the same to readers that know alpha
and to those that do not.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mpp.lora.adapters import SCALED
from mpp.lora.files import DORA_SCALE, Update
from mpp.models.contract import NativeRule

_DOWN, _UP = "lora_A.weight", "lora_B.weight"
_HADAMARD = (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a"))  # each a product as of (_DOWN, _UP)
_KOHYA = {_DOWN: "lora_down.weight", _UP: "lora_up.weight"}
_INSTEAD = "export.format=diffusers, export.format=peft and merge=true can"


def to_native(
    found: Mapping[str, Update],
    rules: Sequence[NativeRule],
    sizes: Mapping[str, int],
    norms: Callable[[str], Tensor] | None = None,
) -> dict[str, Update]:
    """The same updates by a program's module names, several of diffusers' layers fused into one where it has one.

    Args:
        found: By diffusers' module names.
        rules: The program's names; none: they are diffusers'.
        sizes: Output features of diffusers' modules.
        norms: Of the rows of a module's weight, which a DoRA of a part of a fused layer needs.

    Raises:
        ValueError: An update that these formats cannot say exactly, or a module without native name.
    """
    for module, update in found.items():
        _check(module, update)
    if not rules:
        return dict(found)
    native: dict[str, Update] = {}
    shares: dict[str, dict[str, Update]] = {}
    stacks: dict[str, tuple[str, ...]] = {}
    nameless = []
    for module, update in found.items():
        named = native_name(module, rules)
        if named is None:
            nameless.append(module)
        elif named[1]:
            name, stacks[name] = named
            shares.setdefault(name, {})[module] = update
        else:
            assert named[0] not in native, f"two modules are called {named[0]}"
            native[named[0]] = update
    if nameless:
        raise ValueError(
            f"{len(nameless)} modules have no known name in the original implementation (first: {nameless[0]}), so "
            f"this format cannot hold them; {_INSTEAD}"
        )
    return native | {name: _fuse(name, share, stacks[name], sizes, norms) for name, share in shares.items()}


def comfyui(native: Mapping[str, Update], prefix: str | None = None) -> dict[str, Tensor]:
    """`diffusion_model.<module>.lora_A.weight`, `.lora_B.weight` and `.alpha`; no alpha below another prefix.

    The scale is in `lora_B`, or in LoKr's or LoHa's first factor, and alpha is the rank, so that alpha / rank is 1.
    """
    found = {}
    for name, update in native.items():
        module = f"{'diffusion_model.' if prefix is None else prefix}{name}"
        found |= {f"{module}.{factor}": tensor for factor, tensor in _scale_inside(update).items()}
        if prefix is None:
            found[f"{module}.alpha"] = torch.tensor(float(_rank(update)))
    return found


def kohya(native: Mapping[str, Update], prefix: str | None = None) -> dict[str, Tensor]:
    """`lora_unet_<module with underscores>.lora_down.weight`, `.lora_up.weight` and a float32 `.alpha`.

    LoKr's and LoHa's scale is in the first factor, and the alpha is the rank: readers divide by that, or ignore alpha.
    """
    if any(DORA_SCALE in update.factors for update in native.values()):
        raise ValueError(f"this is a DoRA, which kohya's tools do not read; export.format=comfyui, {_INSTEAD}")
    found = {}
    for name, update in native.items():
        module = f"{'lora_unet_' if prefix is None else prefix}{name.replace('.', '_')}"
        if _DOWN in update.factors:
            factors, alpha = update.factors, update.scale * update.factors[_DOWN].shape[0]
        else:
            factors, alpha = _scale_inside(update), _rank(update)
        found |= {f"{module}.{_KOHYA.get(factor, factor)}": tensor for factor, tensor in factors.items()}
        found[f"{module}.alpha"] = torch.tensor(float(alpha))
    return found


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors in another precision; alphas stay in float32. None keeps what each has.

    Raises:
        ValueError: A value is too large for the precision.
    """
    found = {}
    for name, tensor in tensors.items():
        keep = dtype is None or name.endswith(".alpha")
        found[name] = (tensor if keep else tensor.to(dtype)).contiguous()
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{name} has values too large for {found[name].dtype}; choose export.dtype=float32")
    return found


def _check(module: str, update: Update) -> None:
    names = set(update.factors) - {DORA_SCALE}
    whole = {_DOWN, _UP}, {name for pair in _HADAMARD for name in pair}
    if names not in whole and not all(name.startswith("lokr_w") for name in names):
        raise ValueError(f"{module} has {', '.join(sorted(names))}, which this format cannot say; {_INSTEAD}")


def native_name(module: str, rules: Sequence[NativeRule]) -> tuple[str, tuple[str, ...]] | None:
    """A program's name of a module of diffusers', and the modules that it keeps as one under that name, if several."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, module)
        if match is not None:
            return match.expand(rule.name), tuple(match.expand(part) for part in rule.parts)
    return None


def _fuse(
    name: str,
    share: Mapping[str, Update],
    parts: Sequence[str],
    sizes: Mapping[str, int],
    norms: Callable[[str], Tensor] | None,
) -> Update:
    """One update of a layer that stacks the outputs of `parts`: each has its rows, its ranks and its scale.

    LoHa's two products are stacked each by itself: their product by elements is then that of each part in its rows.
    """
    assert set(share) <= set(parts), f"the rule of {name} leaves out {set(share) - set(parts)}"
    pairs = next((p for p in (((_DOWN, _UP),), _HADAMARD) if all(p[0][0] in u.factors for u in share.values())), None)
    if pairs is None:
        raise ValueError(
            f"the original implementation has {', '.join(parts)} as one layer ({name}), and LoKr's of the parts are no "
            f"LoKr of the whole, so this format cannot say it; {_INSTEAD}"
        )
    present = [part for part in parts if part in share]
    scales = []
    if any(DORA_SCALE in update.factors for update in share.values()):  # rows without one stay as they are
        scales = [share[part].factors[DORA_SCALE] if part in share else norms(part)[:, None] for part in parts]
    factors = {}
    for number, (down, up) in enumerate(pairs):
        factors[down] = torch.cat([share[part].factors[down] for part in present])
        factors[up] = factors[down].new_zeros(sum(sizes[part] for part in parts), factors[down].shape[0])
        column = 0
        for part in present:
            row = sum(sizes[before] for before in parts[: parts.index(part)])
            block = _times(share[part].factors[up], 1.0 if number else share[part].scale)
            factors[up][row : row + block.shape[0], column : column + block.shape[1]] = block
            column += block.shape[1]
    return Update(factors | ({DORA_SCALE: torch.cat(scales)} if scales else {}), 1.0)


def _scale_inside(update: Update) -> dict[str, Tensor]:
    """The factors of an update whose scale is 1."""
    held = next(name for name in SCALED if name in update.factors)
    return {**update.factors, held: _times(update.factors[held], update.scale)}


def _times(tensor: Tensor, scale: float) -> Tensor:
    return (tensor.float() * scale).to(tensor.dtype)


def _rank(update: Update) -> int:
    """What readers divide alpha by; of LoKr the rank of the second factor if decomposed, else of the first; else 1."""
    names = (_DOWN, "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
    return next((update.factors[name].shape[0] for name in names if name in update.factors), 1)
