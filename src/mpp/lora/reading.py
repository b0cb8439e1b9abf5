"""LoRA files of any program: their keys tell names and scales, and out come PEFT's names on diffusers' modules.

Where the forms come from: kohya's tools and musubi-tuner (`lora_unet_<module>.lora_down.weight`), ComfyUI and
ai-toolkit (`diffusion_model.<module>.lora_A.weight`), diffusers (`transformer.`, `transformer_2.`, `unet.`), PEFT
(`base_model.model.`, `adapter_config.json`), DiffSynth-Studio (`.lora_A.default.weight`, no prefix, or `pipe.dit.`),
OneTrainer (`lora_transformer_`), LyCORIS (`lycoris_`, `lokr_*`, `hada_*`). The modules below a prefix are diffusers',
the original's, or another program's: `Architecture.names_in`.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpp.lora.files import LoraFile, json_of
from mpp.lora.meaning import CHOOSE, PEFT_FILES, meant
from mpp.models.contract import Architecture
from mpp.wording import few

log = logging.getLogger("mpp")

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "pipe.dit.", "dit.")
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_TEXT = re.compile(
    r"(base_model\.model\.)?(lora_te\d?_|te\d?\.|text_encoders?(_\d)?\.|clip_[lg]\.|t5xxl\.|cond_stage_model\.)"
)
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_[AB]|lora_(?:down|up|mid)|lora\.(?:down|up)|lora_magnitude_vector|dora_scale|alpha|"
    r"diff(?:_[bm])?|lokr_(?:w[12](?:_[ab])?|t[12])|hada_(?:w[12]_[ab]|t[12]))(?:\.default)?(?P<end>\.weight|\.bias)?"
)
_FACTORS = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}


@dataclass(frozen=True)
class _Key:
    """One key of a file: the transformer's folder where it says one, the name of the layer, and what of it it holds."""

    folder: str
    layer: str
    factor: str


# ---------------------------------------------------------------- which file


def asked(text: str) -> tuple[Path, float]:
    """`FILE:0.8` as a path and a strength; without one it is 1.

    Raises:
        ValueError: A strength that is 0 or not finite.
    """
    path, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not path or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(strength) or strength == 0:
        raise ValueError(f"lora={text}: the strength must be a number other than 0; leave the LoRA out instead")
    return Path(path), strength


def find_loras(path: Path, architecture: Architecture, parts: Mapping[str, nn.Module]) -> dict[str, LoraFile]:
    """The LoRA of each expert; of a lone transformer, which is called `""`, the one.

    Args:
        path: A file of any program, a folder that PEFT wrote, the output folder of a run, or a folder with one file for
            each expert, which their names tell.
        architecture: The family, which knows how programs name its modules.
        parts: The model's transformers, perhaps without weights, and without adapters.

    Raises:
        ValueError: The folder lacks one, the file does not say for which expert it is, or as `read_lora`.
    """
    if path.is_dir() and (path / PEFT_FILES[1]).is_file():
        path = path / PEFT_FILES[0]
    if path.is_dir():
        return {
            part: read_lora(file, architecture, {part: parts[part]})[part]
            for part, file in _in_folder(path, list(parts)).items()
        }
    found = read_lora(path, architecture, parts)
    if not found:
        raise ValueError(
            f"lora={path} does not say which expert it is for; end its name in "
            f"{' or '.join(f'_{part}.safetensors' for part in parts)}"
        )
    return found


def _in_folder(folder: Path, parts: Sequence[str]) -> dict[str, Path]:
    files = {part: folder / (f"lora_{part}.safetensors" if part else "lora.safetensors") for part in parts}
    missing = [file.name for file in files.values() if not file.is_file()]
    if not missing:
        return files
    there = sorted(folder.glob("*.safetensors"))
    named: dict[str, list[Path]] = {part: [file for file in there if _expert_by(file, parts) == part] for part in parts}
    if len(parts) > 1 and all(len(files) == 1 for files in named.values()):
        return {part: files[0] for part, files in named.items()}
    raise ValueError(
        f"lora={folder} holds {', '.join(file.name for file in there) or 'no .safetensors file'}, but this model "
        f"config needs {', '.join(missing)}; name a file, or {CHOOSE}"
    )


def _expert_by(path: Path, parts: Iterable[str]) -> str | None:
    """The expert that a file's name says, in the ways that people write it: `_high`, `HighNoise`, `-HN`, `_h`."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", path.stem)]
    said = {
        part
        for part in parts
        if part and ({part, f"{part}noise", f"{part[0]}n"} & set(words) or words[-1:] == [part[0]])
    }
    return said.pop() if len(said) == 1 else None


# ---------------------------------------------------------------- one file


def read_lora(path: Path, architecture: Architecture, parts: Mapping[str, nn.Module]) -> dict[str, LoraFile]:
    """Read a LoRA file that any program wrote.

    Args:
        path: The file.
        architecture: The family.
        parts: The model's transformers, perhaps without weights, and without adapters.

    Returns:
        What it holds for each of them; {} where it does not say for which of several it is.

    Raises:
        ValueError: Not there, damaged, no LoRA, half of one, one of another model, one whose names have two meanings,
            or one that PEFT cannot say; names the file.
    """
    if not path.is_file():
        raise ValueError(f"lora={path} is not there; give a LoRA file, or the output folder of a run")
    try:
        with safe_open(path, "pt") as handle:
            keys = _parsed(path, handle.keys(), architecture)
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in keys}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"lora={path} is not a complete .safetensors file ({error})") from error
    folders = {folder: part for part, folder in architecture.folders.items() if part in parts}
    by_part: dict[str, dict[str, dict[str, Tensor]]] = {}
    others = set()
    several = {key.folder for key in keys.values()} - {"", "transformer"}
    default = _only_part(path, metadata, list(parts))
    for name, key in keys.items():
        part = folders.get(key.folder) if several else default
        if part is None and not several:
            return {}
        if part is None:
            others.add(key.folder)
            continue
        factors = by_part.setdefault(part, {}).setdefault(key.layer, {})
        if key.factor in factors:
            raise ValueError(f"lora={path} says {key.layer}.{key.factor} twice; remove one of them")
        factors[key.factor] = _checked(path, name, tensors[name])
    if others:
        log.info("%s: what is for %s is left out", path, " and ".join(sorted(others)))
    if not by_part:
        raise ValueError(
            f"lora={path} holds {' and '.join(sorted(others))} alone, which this model config does not train"
        )
    return {part: meant(path, found, metadata, architecture, parts[part]) for part, found in sorted(by_part.items())}


def _parsed(path: Path, names: Iterable[str], architecture: Architecture) -> dict[str, _Key]:
    """The keys that are about the transformer."""
    names = list(names)
    text = [name for name in names if _TEXT.match(name)]
    rest = [name for name in names if name not in set(text)]
    found = {name: _key(name, set(architecture.folders.values())) for name in rest}
    odd = [name for name, key in found.items() if key is None]
    if not rest and text:
        raise ValueError(
            f"lora={path} holds text encoders alone, which mpp has no LoRA for; give one of the transformer"
        )
    if len(odd) == len(rest):
        raise ValueError(f"lora={path} is no LoRA{_looks_like(odd)}: it holds {' '.join(few(rest, 1)) or 'nothing'}")
    if odd:
        raise ValueError(
            f"lora={path} holds {len(odd)} tensors that are no part of a LoRA besides {len(rest) - len(odd)} that are "
            f"(first: {odd[0]}); give a file that holds a LoRA alone"
        )
    if text:
        log.warning("%s: %d tensors of text encoders are left out: mpp uses those as they are", path, len(text))
    return {name: key for name, key in found.items() if key is not None}


def _looks_like(names: Sequence[str]) -> str:
    """What a file without any key of a LoRA may be."""
    if any("lora" in name.lower() for name in names):
        return " in a form that mpp reads; save it as diffusers, PEFT, kohya's tools or ComfyUI have it"
    if any("decoder.up" in name or "decoder.mid" in name for name in names):
        return " but a VAE"
    return " but weights of a whole model" if len(names) > 1 and all("." in name for name in names) else ""


def _key(name: str, folders: set[str]) -> _Key | None:
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    factor = _FACTORS.get(match["factor"], match["factor"])
    if factor.startswith(("lora_A", "lora_B")):
        factor += match["end"] or ".weight"
    elif match["end"] and (match["end"], factor[:7]) not in ((".weight", "lora_ma"), (".weight", "lora_mi")):
        return None
    layer, folder = match["module"], ""
    for prefix in _UNDERSCORED:
        if layer.startswith(prefix):
            return _Key("", layer.removeprefix(prefix), factor)
    while True:
        shorter = next((layer.removeprefix(prefix) for prefix in _PREFIXES if layer.startswith(prefix)), layer)
        head, _, tail = shorter.partition(".")
        if tail and not folder and head in {"transformer", "transformer_2", *folders}:
            folder, shorter = head, tail
        if shorter == layer:
            return _Key(folder, layer, factor)
        layer = shorter


def _only_part(path: Path, metadata: Mapping[str, str], parts: Sequence[str]) -> str | None:
    """The transformer that a whole file is for."""
    if list(parts) == [""] or len(parts) == 1:
        return parts[0]
    expert = json_of(metadata.get("mpp")).get("expert")
    return expert if expert in parts else _expert_by(path, parts)


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """In float32, which holds every value of a lower precision."""
    if not tensor.is_floating_point() or tensor.ndim > 5:
        raise ValueError(f"lora={path}: {name} is no tensor of a LoRA ({tensor.dtype}, {tuple(tensor.shape)})")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"lora={path}: {name} holds values that are not finite; the training has diverged")
    return tensor
