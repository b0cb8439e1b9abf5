"""LoRA files with diffusers' names: read, put on a transformer, merged into it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpp.lora.adapters import ADAPTER, adapter_state

PREFIX = "transformer."
_TENSOR = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector|lokr_[a-z0-9_]+)")
_MAGNITUDE, DORA_SCALE = "lora_magnitude_vector", "dora_scale"
_FOREIGN = ("diffusion_model.", "lora_unet_", "base_model.model.", "lycoris_")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        path: Where it was read from.
        tensors: By PEFT's names, such as `blocks.0.attn1.to_q.lora_A.weight`.
        described: The PEFT configuration; None where the file says none: every scale is 1, as diffusers has it.
        metadata: The file's own metadata as it stands.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    described: Mapping[str, Any] | None
    metadata: Mapping[str, str]

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes, which other programs count by the norms of the base."""
        return any(name.endswith(_MAGNITUDE) for name in self.tensors)

    @property
    def record(self) -> dict[str, Any]:
        """How mpp made it; {} for files of others."""
        found = _json(self.metadata.get("mpp"))
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one layer's weight: the scale times the product of the factors.

    Attributes:
        factors: By PEFT's names: `lora_A.weight` and `lora_B.weight`, or `lokr_w1`, `lokr_w2_a`, ...; of a DoRA also
            `dora_scale`, `(rows, 1)`, by which the adapted weight over the norm of the base's rows is multiplied.
        scale: As trained: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    factors: Mapping[str, Tensor]
    scale: float


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file as `save_lora` and diffusers' `save_lora_weights` write it.

    Raises:
        ValueError: Not there, damaged, no LoRA, or one with another tool's names.
    """
    if not path.is_file():
        raise ValueError(f"lora={path} is not there; give a LoRA file, or the output folder of a run")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"lora={path} is not a complete .safetensors file ({error})") from error
    foreign = next((key for key in tensors if key.startswith(_FOREIGN)), None)
    if foreign is not None:
        raise ValueError(
            f"lora={path} has another tool's names ({foreign}); give the file that training wrote, whose names begin "
            f"with {PREFIX}"
        )
    odd = next((k for k in tensors if not k.startswith(PREFIX) or not _TENSOR.fullmatch(k)), None)
    if odd is not None or not tensors:
        raise ValueError(f"lora={path} is no LoRA: it holds {odd or 'nothing'}; give the file that training wrote")
    broken = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise ValueError(f"lora={path}: {broken} holds values that are not finite; the training has diverged")
    described = _json(metadata.get(LORA_ADAPTER_METADATA_KEY))
    if described is not None:
        described = {k.removeprefix(PREFIX): v for k, v in described.items() if k.startswith(PREFIX)}
    return LoraFile(path, {k.removeprefix(PREFIX): v for k, v in tensors.items()}, described or None, metadata)


def find_loras(path: Path, parts: Sequence[str]) -> dict[str, LoraFile]:
    """The LoRA of each expert; of a lone transformer, which is called `""`, the one.

    Args:
        path: A file, or the output folder of a run.
        parts: The model's transformers.

    Raises:
        ValueError: The folder lacks one, the file does not say for which expert it is, or as `read_lora`.
    """
    if path.is_dir():
        files = {part: path / (f"lora_{part}.safetensors" if part else "lora.safetensors") for part in parts}
        missing = [file.name for file in files.values() if not file.is_file()]
        if missing:
            there = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))) or "no .safetensors file"
            raise ValueError(
                f"lora={path} holds {there}, but this model config needs {', '.join(missing)}; name a file, or choose "
                "the model config that it was trained with"
            )
        return {part: read_lora(file) for part, file in files.items()}
    lora = read_lora(path)
    if list(parts) == [""]:
        return {"": lora}
    expert = lora.record.get("expert") or path.stem.rpartition("_")[2]
    if expert not in parts:
        raise ValueError(
            f"lora={path} does not say which expert it is for; end its name in "
            f"{' or '.join(f'_{part}.safetensors' for part in parts)}"
        )
    return {expert: lora}


def attach(transformer: nn.Module, lora: LoraFile) -> PeftConfig:
    """Put a LoRA on a transformer by diffusers' own loader; on the meta device its shapes and scales only.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: The transformer lacks its modules, or they have other sizes.
    """
    misfit = _misfit(dict(transformer.named_modules()), lora)
    if not misfit:
        try:
            transformer.load_lora_adapter(
                dict(lora.tensors),
                prefix=None,
                metadata=None if lora.described is None else dict(lora.described),
                adapter_name=ADAPTER,
                low_cpu_mem_usage=True,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            misfit = " ".join(str(error).split())[:300]
    if misfit:
        made_for = f", made for {lora.record['family']}," if "family" in lora.record else ""
        raise ValueError(
            f"lora={lora.path}{made_for} does not fit this {type(transformer).__name__}: {misfit}; choose the model "
            "config that it was trained with"
        )
    odd = sorted(adapter_state(transformer).keys() ^ lora.tensors.keys())
    if odd:
        raise ValueError(f"lora={lora.path}: its tensors and its metadata disagree on {len(odd)} (first: {odd[0]})")
    _restore_precision(transformer, lora)
    return transformer.peft_config[ADAPTER]


def _misfit(modules: Mapping[str, nn.Module], lora: LoraFile) -> str:
    """What the modules lack; told apart here because the loader logs a line per tensor."""
    found = _by_module(lora.tensors)
    missing = sorted(found.keys() - modules.keys())
    if missing:
        return f"it lacks {len(missing)} of the {len(found)} modules (first: {missing[0]})"
    for name, factors in found.items():
        weight, shape = getattr(modules[name], "weight", None), _shape(factors)
        if weight is None:
            return f"its {name} is no layer with weights"
        if weight.ndim == 2 and shape is not None and tuple(weight.shape) != shape:
            return f"its {name} is {tuple(weight.shape)}, the LoRA's {shape}"
    return ""


def _shape(factors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Output and input features of the layer that the factors are for; None if they are not all there."""
    pairs = [("lora_B.weight", "lora_A.weight")] if "lora_A.weight" in factors else []
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


def _restore_precision(transformer: nn.Module, lora: LoraFile) -> None:
    """PEFT casts a loaded adapter to the base's dtype: over a bf16 base that rounds what was trained in float32."""
    for name, parameter in transformer.named_parameters():
        key = name.replace(f".{ADAPTER}", "")
        tensor = lora.tensors.get(key, lora.tensors.get(key.removesuffix(".weight")))  # DoRA's file has no .weight
        if tensor is not None and not parameter.is_meta:
            parameter.data = tensor.to(parameter.device)


def updates(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    """The update of each module, with the scale that PEFT gave it.

    Args:
        transformer: With the adapter.
        tensors: The adapter's, by PEFT's names.
    """
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        name: Update(_by_norms(found, layers[name]), float(layers[name].scaling[ADAPTER]))
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
    base = layer.get_base_layer().weight.detach().float()
    down, up = (factors[name].to(base.device, torch.float32) for name in ("lora_A.weight", "lora_B.weight"))
    adapted = base + float(layer.scaling[ADAPTER]) * (up @ down)
    scale = magnitude.to(base.device, torch.float32).flatten() * base.norm(dim=1) / adapted.norm(dim=1)
    others = {name: tensor for name, tensor in factors.items() if name != _MAGNITUDE}
    return {**others, DORA_SCALE: scale[:, None].to(magnitude.device)}


def merge(transformer: nn.Module) -> None:
    """Add the attached adapter to the weights by PEFT's own merge and remove it.

    Computed in float32 and rounded to the weight's dtype once, one layer at a time.

    Raises:
        ValueError: A merged weight is not finite.
    """
    for layer in [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.float()
        layer.merge(safe_merge=True)
        base.to(dtype)
    transformer.unload_lora()


def _split(key: str) -> tuple[str, str]:
    match = _TENSOR.fullmatch(key)
    assert match is not None, key
    return match[1], match[2]


def _json(text: str | None) -> Any:  # noqa: ANN401
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
