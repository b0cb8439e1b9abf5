"""A LoRA merged into an original single file: its names, its precision, and all that the LoRA leaves as it was."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mpp.lora.files import LoraFile, Update, attach, updates
from mpp.lora.meaning import Rows, meanings
from mpp.models.contract import Architecture

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def merged_original(
    lora: LoraFile, architecture: Architecture, skeleton: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of `model.pretrained` with a LoRA in it; computed in float32, rounded once.

    Raises:
        ValueError: `model.pretrained` is no original file, has LoRAs of its own besides, or lacks a layer.
    """
    file = Path(architecture.pretrained).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(
            f"export.format=original writes the names of a model's original file, which has to be the base: set "
            f"model.pretrained to it, a .safetensors file, got {architecture.pretrained}"
        )
    if architecture.loras:
        raise ValueError("export.format=original merges one LoRA; leave model.loras out, or merge into a folder")
    attach(skeleton, lora)
    found = updates(skeleton, lora.tensors, magnitudes=True)
    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata() or {}
    layers = _layers(tensors, architecture, skeleton)
    missing = sorted(found.keys() - layers.keys())
    if missing:
        raise ValueError(
            f"model.pretrained={file} has no layer for {missing[0]}, of which lora={lora.path} has an update"
        )
    for module, update in found.items():
        key, rows = layers[module]
        weight = tensors[key]
        if weight.dtype not in _DTYPES:
            raise ValueError(f"model.pretrained={file}: {key} is {weight.dtype}; merge into the file in bf16 instead")
        weight[rows.start : rows.stop] = applied(weight[rows.start : rows.stop].float(), update)
    return tensors, metadata


def _layers(
    tensors: Mapping[str, Tensor], architecture: Architecture, skeleton: nn.Module
) -> dict[str, tuple[str, Rows]]:
    """Where the file has each of diffusers' modules."""
    found = {}
    for program, table in meanings(architecture, skeleton).items():
        for prefix in ("", "model.diffusion_model.") if program in ("the original", "diffusers") else ():
            for name, rows in table.items():
                if f"{prefix}{name}.weight" in tensors:
                    found |= {row.module: (f"{prefix}{name}.weight", row) for row in rows}
    return found


def applied(weight: Tensor, update: Update) -> Tensor:
    """A layer's weight with an update, as PEFT merges it.

    Args:
        weight: `(rows, columns)`, float32.
        update: By PEFT's factors; a DoRA's weight is `m * (W + sBA) / |W + sBA|` by rows (arXiv 2402.09353).
    """
    factors = {name: tensor.float() for name, tensor in update.factors.items()}
    if "lora_A.weight" in factors:
        delta = factors["lora_B.weight"] @ factors["lora_A.weight"]
    elif "hada_w1_a" in factors:
        delta = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    else:
        pair = [factors[n] if n in factors else factors[f"{n}_a"] @ factors[f"{n}_b"] for n in ("lokr_w1", "lokr_w2")]
        delta = torch.kron(*pair)
    changed = weight + update.scale * delta
    magnitude = factors.get("lora_magnitude_vector")
    return changed if magnitude is None else changed * (magnitude / changed.norm(dim=1))[:, None]
