"""A LoRA as it is read: put on a transformer, merged into it, its updates."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from mpp.lora.adapters import ADAPTER
from mpp.memory.bases import dequantise, is_quantised

PREFIX = "transformer."
_TENSOR = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector|lokr_[a-z0-9_]+|hada_[a-z0-9_]+)")
_MAGNITUDE, DORA_SCALE = "lora_magnitude_vector", "dora_scale"
DIFFERENCES = {"diff": "weight", "diff_b": "bias"}  # what files call them, and of what they are


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        path: Where it was read from.
        tensors: By PEFT's names, such as `blocks.0.attn1.to_q.lora_A.weight`, in float32.
        described: The PEFT configuration.
        metadata: The file's own metadata as it stands.
        differences: What is added to whole weights besides, by their names.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    described: Mapping[str, Any]
    metadata: Mapping[str, str]
    differences: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes, which other programs count by the norms of the base."""
        return any(name.endswith(_MAGNITUDE) for name in self.tensors)

    @property
    def kind(self) -> str:
        """Its kind, as `Adapter.kind` has it, but for how it is scaled."""
        return "dora" if self.is_dora else str(self.described.get("peft_type", "LORA")).lower()

    @property
    def layers(self) -> set[str]:
        """Names of the layers that it changes."""
        return _by_module(self.tensors).keys() | {name.rpartition(".")[0] for name in self.differences}

    def adapter_alone(self) -> "LoraFile":
        """Without the differences of whole weights."""
        return replace(self, differences={})

    def within(self, owned: Callable[[str], bool]) -> "LoraFile":
        """What it has for some of the tensors, by whether their names are owned."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if owned(name)}
        modules = sorted(_by_module(tensors))
        described = {**self.described, "target_modules": modules}
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = self.described.get(name) or {}
            fits = [p for p in patterns if any(get_pattern_key([p], module) == p for module in modules)]
            described[name] = {pattern: patterns[pattern] for pattern in fits}
        differences = {name: tensor for name, tensor in self.differences.items() if owned(name)}
        return replace(self, tensors=tensors, differences=differences, described=described)

    @property
    def record(self) -> dict[str, Any]:
        """How mpp made it; {} for files of others."""
        return json_of(self.metadata.get("mpp"))


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one layer's weight: the scale times the product of the factors.

    Attributes:
        factors: By PEFT's names: `lora_A.weight` and `lora_B.weight`, or `lokr_w1`, `lokr_w2_a`, ..., or `hada_w1_a`,
            ...; of a DoRA also `dora_scale`, `(rows, 1)`, by which the adapted weight over the norm of the base's rows
            is multiplied.
        scale: As trained: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    factors: Mapping[str, Tensor]
    scale: float


def read_own(path: Path) -> LoraFile:
    """A LoRA file that was just written by `save_lora`."""
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
        tensors = {key.removeprefix(PREFIX): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return LoraFile(path, tensors, {}, metadata)


def attach(transformer: nn.Module, lora: LoraFile, *, name: str = ADAPTER, strength: float = 1.0) -> PeftConfig:
    """Put a LoRA on a transformer by PEFT, in float32; on the meta device its shapes and scales only.

    Args:
        transformer: With other adapters, perhaps.
        lora: What is put on it.
        name: The adapter's.
        strength: By which its scale is multiplied.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: The transformer lacks its modules, they have other sizes, a strength that its kind has not, or
            differences of whole weights, which no adapter can say.
    """
    if lora.differences:
        raise ValueError(
            f"lora={lora.path} holds differences of {len(lora.differences)} whole weights, which can only be a part of "
            "the base: model.loras=[FILE]"
        )
    check_strength(lora, strength)
    misfit = _misfit(transformer, lora)
    if not misfit:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of several adapters in a model
                warnings.simplefilter("error", RuntimeWarning)  # of modules that tensors and configuration differ in
                _inject(transformer, lora, name)
        except RuntimeWarning:
            misfit = "its tensors and its configuration of PEFT are about different modules"
        except Exception as error:  # noqa: BLE001 (PEFT raises whatever it meets in a foreign or damaged configuration)
            misfit = " ".join(str(error).split())[:300] or type(error).__name__
    if misfit:
        made_for = f", made for {lora.record['family']}," if "family" in lora.record else ""
        raise ValueError(
            f"lora={lora.path}{made_for} does not fit this {type(transformer).__name__}: {misfit}; choose the model "
            "config that it was trained with"
        )
    odd = sorted(get_peft_model_state_dict(transformer, adapter_name=name).keys() ^ lora.tensors.keys())
    if odd:
        raise ValueError(f"lora={lora.path}: its tensors and its metadata disagree on {len(odd)} (first: {odd[0]})")
    for parameter, tensor in _parameters(transformer, lora, name):
        parameter.data = tensor.to(parameter.device)  # PEFT casts it to the base's precision
    for layer in (m for m in transformer.modules() if isinstance(m, BaseTunerLayer) and name in m.scaling):
        layer.scaling[name] *= strength
        if not math.isfinite(layer.scaling[name]):
            raise ValueError(f"lora={lora.path} has a scale of {layer.scaling[name]}; its metadata is damaged")
    return transformer.peft_config[name]


def _inject(transformer: nn.Module, lora: LoraFile, name: str) -> None:
    config, tensors = PeftConfig.from_peft_type(**lora.described), dict(lora.tensors)
    inject_adapter_in_model(config, transformer, adapter_name=name, low_cpu_mem_usage=True, state_dict=tensors)
    set_peft_model_state_dict(transformer, tensors, adapter_name=name, low_cpu_mem_usage=True)


def check_strength(lora: LoraFile, strength: float) -> None:
    """Refuse a strength that its kind has not.

    Raises:
        ValueError: It is a DoRA, whose directions and norms programs scale differently.
    """
    if lora.is_dora and strength != 1:
        raise ValueError(f"lora={lora.path} is a DoRA, for which programs differ in what a strength is; use it at 1")


def _misfit(transformer: nn.Module, lora: LoraFile) -> str:
    """What the transformer lacks; told apart here because PEFT leaves out what it does not find."""
    modules, found = dict(transformer.named_modules()), _by_module(lora.tensors)
    missing = sorted(found.keys() - modules.keys())
    if missing:
        return f"it lacks {len(missing)} of the {len(found)} modules (first: {missing[0]})"
    for name, factors in found.items():
        weight, shape = getattr(modules[name], "weight", None), _shape(factors)
        if "hada_w2_a" in factors and shape != (factors["hada_w2_a"].shape[0], factors["hada_w2_b"].shape[1]):
            return f"the two products of its LoHa of {name} have different sizes"
        if weight is None:
            return f"its {name} is no layer with weights"
        is_linear = isinstance(modules[name], nn.Linear)  # whose weight may be packed
        size = (modules[name].out_features, modules[name].in_features) if is_linear else tuple(weight.shape)
        if len(size) == 2 and shape is not None and size != shape:
            return f"its {name} is {size}, the LoRA's {shape}"
    return ""


def _shape(factors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Output and input features of the layer that the factors are for; None if they are not all there."""
    whole = [("lora_B.weight", "lora_A.weight"), ("hada_w1_a", "hada_w1_b")]
    pairs = [pair for pair in whole if pair[1] in factors]
    for name in () if pairs else ("lokr_w1", "lokr_w2"):
        pairs.append((name, name) if name in factors else (f"{name}_a", f"{name}_b"))
    if not all(name in factors for pair in pairs for name in pair):
        return None
    return math.prod(factors[up].shape[0] for up, _ in pairs), math.prod(factors[down].shape[1] for _, down in pairs)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, factor = _split(key)
        factors.setdefault(module, {})[factor] = tensor
    return factors


def _parameters(transformer: nn.Module, lora: LoraFile, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The adapter's parameters with what they hold; none on the meta device."""
    for full, parameter in transformer.named_parameters():
        key = full.replace(f".{name}", "")
        tensor = lora.tensors.get(key, lora.tensors.get(key.removesuffix(".weight")))  # DoRA's file has no .weight
        if f".{name}" in full and tensor is not None and not parameter.is_meta:
            yield parameter, tensor


def updates(transformer: nn.Module, tensors: Mapping[str, Tensor], *, magnitudes: bool = False) -> dict[str, Update]:
    """The update of each module, with the scale that PEFT gave it.

    Args:
        transformer: With the adapter.
        tensors: The adapter's, by PEFT's names.
        magnitudes: Leave a DoRA's as PEFT has them.
    """
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        name: Update(
            dict(found) if magnitudes else _by_norms(found, layers[name]), float(layers[name].scaling[ADAPTER])
        )
        for name, found in _by_module(tensors).items()
    }


def _by_norms(factors: Mapping[str, Tensor], layer: BaseTunerLayer) -> dict[str, Tensor]:
    """A DoRA's magnitude as other programs have it: by the norms of the base's rows, not of the adapted ones.

    DoRA's weight is `m * (W + sBA) / |W + sBA|` by rows (arXiv 2402.09353); ComfyUI makes
    `dora_scale * (W + sBA) / |W|` of its file (comfy/weight_adapter/base.py, weight_decompose). All others stay.
    """
    magnitude = factors.get(_MAGNITUDE)
    if magnitude is None:
        return dict(factors)
    base = dequantise(layer.get_base_layer()).float()
    down, up = (factors[name].to(base.device, torch.float32) for name in ("lora_A.weight", "lora_B.weight"))
    adapted = base + float(layer.scaling[ADAPTER]) * (up @ down)
    scale = magnitude.to(base.device, torch.float32).flatten() * base.norm(dim=1) / adapted.norm(dim=1)
    others = {name: tensor for name, tensor in factors.items() if name != _MAGNITUDE}
    return {**others, DORA_SCALE: scale[:, None].to(magnitude.device)}


def merge(transformer: nn.Module) -> None:
    """Add the attached adapter to the weights by PEFT's own merge and remove it.

    Computed in float32 and rounded to the weight's dtype once, one layer at a time.

    Raises:
        ValueError: A merged weight is not finite, or quantised.
    """
    for layer in [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]:
        base = layer.get_base_layer()
        if is_quantised(base):
            raise ValueError("a LoRA cannot be merged into quantised weights; merge it into those in bf16")
        dtype = base.weight.dtype
        layer.float()
        layer.merge(safe_merge=True)
        base.to(dtype)
    transformer.unload_lora()


def _split(key: str) -> tuple[str, str]:
    match = _TENSOR.fullmatch(key)
    assert match is not None, key
    return match[1], match[2]


def json_of(text: str | None) -> dict[str, Any]:
    """A record in a file's metadata; {} where it is none."""
    try:
        found = None if text is None else json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
