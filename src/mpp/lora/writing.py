"""LoRA files as training writes them."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpp.files import write_atomically
from mpp.lora.adapters import ADAPTER, SCALED, part_state
from mpp.lora.metadata import save_file
from mpp.models.experts import parts_of


def lora_files(path: Path, transformer: nn.Module) -> list[Path]:
    """The files of a LoRA: with experts one each, `NAME_EXPERT.safetensors`."""
    return [path.with_stem(f"{path.stem}_{part}") if part else path for part, _ in parts_of(transformer)]


def step_of_lora(file: Path) -> int | None:
    """The step of a run that a LoRA file was saved at; None where it is missing, damaged or of another program."""
    try:
        with safe_open(file, "pt") as handle:
            return json.loads((handle.metadata() or {})["mpp"])["steps"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def scale_is_said(file: Path) -> bool:
    """Whether a LoRA file has to be read with its metadata: without, its strength or its kind is another."""
    with safe_open(file, "pt") as handle:
        config = json.loads((handle.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    said = {name.removeprefix("transformer."): value for name, value in config.items()}
    alpha = said.get("lora_alpha", said.get("alpha")), said.get("alpha_pattern")
    return bool(said.get("use_dora") or said.get("use_rslora") or alpha != (said.get("r"), said.get("rank_pattern")))


def save_lora(
    path: Path,
    transformer: nn.Module,
    state: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    describe: Callable[[str], Mapping[str, str]] = lambda _: {},
) -> list[Path]:
    """Write a LoRA file in diffusers' format, atomically; with experts one file each, `NAME_EXPERT.safetensors`.

    Keys are `transformer.<module>.lora_A.weight` and so on; rank, alpha and kind stand in the metadata where
    diffusers' loader looks for them, and how the file was made under `mpp`. Scales that are powers of two are in the
    factors, which is exact, and alpha is the rank: so programs that read no metadata find the same strength.

    Args:
        path: The file.
        transformer: With the adapter.
        state: The adapter's tensors, as `adapter_state` gives them.
        provenance: How it was made.
        describe: From an expert to more metadata, for other programs.

    Returns:
        The files written.
    """
    written = lora_files(path, transformer)
    for target, (part, model) in zip(written, parts_of(transformer), strict=True):
        record = {**provenance, "expert": part} if part else dict(provenance)
        tensors, config = _scaled(model, part_state(state, part))
        metadata = {
            "format": "pt",
            LORA_ADAPTER_METADATA_KEY: described(config),
            "mpp": json.dumps(record, sort_keys=True, default=str),
            **describe(part),
        }
        tensors = {f"transformer.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(target, partial(save_file, tensors, metadata=metadata))
    return written


def _scaled(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, object]]:
    """The adapter and its configuration at the scale 1, where that loses nothing; else as they are."""
    config = model.peft_config[ADAPTER].to_dict()
    scales = {name: m.scaling[ADAPTER] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not all(math.frexp(scale)[0] == 0.5 for scale in scales.values()):
        return state, config
    held = {f"{module}.{factor}": scale for module, scale in scales.items() for factor in SCALED}
    alpha = "lora_alpha" if "lora_alpha" in config else "alpha"
    config |= {alpha: config["r"], "alpha_pattern": config["rank_pattern"]}
    config |= {"use_rslora": False} if "use_rslora" in config else {}
    return {name: tensor * held[name] if name in held else tensor for name, tensor in state.items()}, config


def described(config: Mapping[str, object]) -> str:
    """PEFT's configuration as diffusers' loader looks for it in a file."""
    entries = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(entries, indent=2, sort_keys=True, default=str)
