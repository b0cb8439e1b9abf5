"""What a program's names, factors and scales mean: the same on diffusers' modules, by PEFT's names."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import peft_utils
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mpp.lora.files import DIFFERENCES, PREFIX, LoraFile, json_of
from mpp.lora.formats import native_name
from mpp.models.contract import Architecture

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
CHOOSE = "choose the model config that it was trained with"
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_ALPHA = {"LORA": "lora_alpha", "LOKR": "alpha", "LOHA": "alpha"}


@dataclass(frozen=True)
class Rows:
    """A module of diffusers', and which rows of a program's layer are its."""

    module: str
    start: int
    stop: int


Meaning = Mapping[str, tuple[Rows, ...]]


def meanings(architecture: Architecture, transformer: nn.Module) -> dict[str, Meaning]:
    """What the layers are called, by who calls them so: their modules in diffusers, with dots and with underscores."""
    layers = {
        name: module for name, module in transformer.named_modules() if getattr(module, "weight", None) is not None
    }
    rules = {"diffusers": (), "the original": architecture.native}
    rules |= {program: architecture.names_in(program).rules for program in ("comfyui", "kohya")}
    found: dict[str, Meaning] = {}
    for program, theirs in rules.items():
        names: dict[str, tuple[Rows, ...]] = {}
        for module in layers:
            name, parts = (module, ()) if not theirs else native_name(module, theirs) or ("", ())
            if name and name not in names:
                names[name] = tuple(_rows(parts or (module,), layers))
        found[program] = names | {name.replace(".", "_"): rows for name, rows in names.items()}
    return found


def _rows(parts: Sequence[str], layers: Mapping[str, nn.Module]) -> Iterable[Rows]:
    start = 0
    for part in parts:
        stop = start + layers[part].weight.shape[0]
        yield Rows(part, start, stop)
        start = stop


def _meaning(path: Path, names: set[str], known: Mapping[str, Meaning], made_for: str, owner: str) -> Meaning:
    """The one way to read the names.

    Raises:
        ValueError: There is none, or there are several that differ.
    """
    whole = {program: {name: table[name] for name in names} for program, table in known.items() if names <= set(table)}
    if not whole:
        best = max(known.values(), key=lambda table: len(names & set(table)))
        missing = sorted(names - set(best))
        raise ValueError(
            f"lora={path}{made_for} does not fit this {owner}: it lacks {len(missing)} of the {len(names)} modules "
            f"(first: {missing[0]}); {CHOOSE}"
        )
    first = next(iter(whole.values()))
    differing = {program: table for program, table in whole.items() if table != first}
    if differing:
        name = next(name for name in sorted(names) if any(table[name] != first[name] for table in differing.values()))
        candidates = ", ".join(f"{p}: {' + '.join(r.module for r in t[name])}" for p, t in whole.items())
        raise ValueError(f"lora={path}: {name} may mean several modules ({candidates}); export it anew for one program")
    return first


def meant(
    path: Path,
    layers: Mapping[str, dict[str, Tensor]],
    metadata: Mapping[str, str],
    architecture: Architecture,
    transformer: nn.Module,
) -> LoraFile:
    """A LoRA on diffusers' modules.

    Args:
        path: The file that it was read from.
        layers: Its factors by a program's name of the layer: `lora_A.weight`, `lokr_w1`, `alpha`, ...
        metadata: The file's.
        architecture: The family.
        transformer: Perhaps without weights, and without adapters.

    Raises:
        ValueError: As `read_lora`, of what is wrong with names, factors or scales.
    """
    said = json_of(metadata.get("mpp")).get("family")
    said = said or metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    made_for = f", made for {said}," if said else ""
    meaning = _meaning(path, set(layers), meanings(architecture, transformer), made_for, type(transformer).__name__)
    described = _described(path, metadata)
    modules: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    differences: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        where, rows = f"lora={path}: {layer}", meaning[layer]
        whole = [name for name in DIFFERENCES if name in factors]
        if whole and len(rows) > 1:
            raise ValueError(f"{where} holds a difference of what diffusers has in parts, which mpp does not read")
        differences |= {f"{rows[0].module}.{DIFFERENCES[name]}": factors.pop(name) for name in whole}
        if whole and not factors:
            continue
        scale = _scale(where, factors, _alpha(where, factors.pop("alpha", None)), described, layer)
        for part, own in _apart(where, factors, rows):
            if part.module in modules:
                raise ValueError(f"{where} is said twice, by different names; remove one of them")
            modules[part.module], scales[part.module] = own, scale
    if described is not None and any(name != rows[0].module for name, rows in meaning.items()):
        described = None  # its patterns are about other names, and the scales are known now
    tensors = {f"{module}.{name}": tensor for module, own in modules.items() for name, tensor in own.items()}
    if modules and described is None:
        described = _config(path, modules, scales, tensors)
    return LoraFile(path, tensors, described or {}, metadata, differences)


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The PEFT configuration that stands in the file, or in PEFT's own beside it."""
    beside = path.with_name(PEFT_FILES[1])
    if path.name == PEFT_FILES[0] and beside.is_file():
        found = json_of(beside.read_text("utf-8", errors="replace"))
    elif LORA_ADAPTER_METADATA_KEY in metadata:
        found = json_of(metadata[LORA_ADAPTER_METADATA_KEY])
        found = {k.removeprefix(PREFIX): v for k, v in found.items() if k.startswith(PREFIX)} if found else None
    else:
        return None
    if not found:
        raise ValueError(f"lora={path} does not say how it is scaled: its configuration of PEFT is damaged")
    kind = found.setdefault("peft_type", "LORA")
    if kind not in _ALPHA:
        raise ValueError(f"lora={path} is a {kind} of PEFT, which mpp does not read; it reads {', '.join(_ALPHA)}")
    return found


def _alpha(where: str, tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1 or float(tensor) <= 0:
        raise ValueError(f"{where}.alpha must be one number above 0, got {tensor.flatten()[:3].tolist()}")
    return float(tensor)


def _scale(
    where: str, factors: Mapping[str, Tensor], alpha: float | None, described: Mapping[str, Any] | None, layer: str
) -> float:
    """By what the factors' product is multiplied; without alpha by 1.

    Raises:
        ValueError: Half of the factors, ones that belong to different kinds, or two answers.
    """
    rank = _rank(where, factors)
    own = None if alpha is None else 1.0 if rank is None else alpha / rank
    if described is None:
        return 1.0 if own is None else own
    try:
        kind = described["peft_type"]
        r = described.get("rank_pattern") or {}
        r = r.get(get_pattern_key(list(r), layer), described.get("r", 8))
        a = described.get("alpha_pattern") or {}
        a = a.get(get_pattern_key(list(a), layer), described.get(_ALPHA[kind], 8))
        scale = float(a) / (math.sqrt(r) if described.get("use_rslora") else float(r))
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{where}: the configuration in the file cannot be read ({error})") from error
    if own is not None and not math.isclose(own, scale, rel_tol=1e-6):
        raise ValueError(f"{where} has the scale {own:g} by its alpha, {scale:g} by its metadata; remove one")
    return scale


def _rank(where: str, factors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None for a LoKr of whole factors, which has none.

    Raises:
        ValueError: Half of the factors, ones that do not go together, or what PEFT cannot say.
    """
    names = set(factors)
    if "dora_scale" in names:
        raise ValueError(
            f"{where} is a DoRA by the norms of its base (dora_scale); give it as diffusers or PEFT have it "
            "(lora_magnitude_vector)"
        )
    if any(name.startswith(("lora_mid", "lokr_t", "hada_t")) for name in names):
        raise ValueError(f"{where} is a convolution's ({', '.join(sorted(names))}), which mpp does not read")
    kinds = {name[:4] for name in names}
    if not kinds:
        raise ValueError(f"{where} has an alpha and nothing that it scales; the file is damaged")
    if len(kinds) > 1:
        raise ValueError(f"{where} mixes kinds of LoRA: {', '.join(sorted(names))}; the file is damaged")
    if kinds == {"lokr"}:
        pairs = [(n, n) if n in names else (f"{n}_a", f"{n}_b") for n in ("lokr_w1", "lokr_w2")]
        wanted = {name for pair in pairs for name in pair}
        inner = [(a, b) for a, b in pairs if a != b]
    else:
        inner = [("lora_B.weight", "lora_A.weight")] if kinds == {"lora"} else [_LOHA[:2], _LOHA[2:]]
        wanted = {name for pair in inner for name in pair}
    extra = names - wanted - {"lora_magnitude_vector", "lora_B.bias"}
    if wanted - names or extra:
        raise ValueError(
            f"{where} is half a LoRA: it has {', '.join(sorted(names))}, and "
            f"{'lacks ' + ', '.join(sorted(wanted - names)) if wanted - names else 'what goes with it is missing'}"
        )
    ranks = []
    for up, down in inner:
        a, b = factors[up], factors[down]
        if min(a.ndim, b.ndim) < 2 or a.shape[1] != b.shape[0] or not a.shape[1]:
            raise ValueError(f"{where}: {up} {tuple(a.shape)} and {down} {tuple(b.shape)} cannot be multiplied")
        ranks.append(a.shape[1])
    return ranks[-1] if ranks else None


def _apart(where: str, factors: dict[str, Tensor], rows: tuple[Rows, ...]) -> list[tuple[Rows, dict[str, Tensor]]]:
    """What each of diffusers' modules has of a program's layer: its rows, without ranks that do nothing there."""
    factors = {name: _flat(tensor) for name, tensor in factors.items()}
    if len(rows) == 1:
        return [(rows[0], factors)]
    up = next((name for name in ("lora_B.weight", "hada_w1_a") if name in factors), None)
    if up is None:
        raise ValueError(
            f"{where} is a LoKr of a layer that diffusers has as {', '.join(r.module for r in rows)}, which no LoKr of "
            "those says; merge it into the base by the program that trained it"
        )
    if factors[up].shape[0] != rows[-1].stop:
        raise ValueError(f"{where} has {factors[up].shape[0]} rows, the layer {rows[-1].stop}; {CHOOSE}")
    if "lora_magnitude_vector" in factors or "lora_B.bias" in factors:
        raise ValueError(f"{where}: a DoRA or a bias of a layer that diffusers has in parts, which mpp does not read")
    pairs = [("lora_B.weight", "lora_A.weight")] if up == "lora_B.weight" else [_LOHA[:2], _LOHA[2:]]
    found = []
    for part in rows:
        own = dict(factors)
        for name, _ in pairs:
            own[name] = own[name][part.start : part.stop]
        used = torch.stack([own[name].any(dim=0) for name, _ in pairs]).any(dim=0)
        if not used.any():
            continue  # no LoRA of this part
        for above, below in pairs:
            own[above], own[below] = own[above][:, used].contiguous(), own[below][used]
        found.append((part, own))
    return found


def _flat(tensor: Tensor) -> Tensor:
    """A convolution over single points is a linear layer."""
    return tensor.flatten(1) if tensor.ndim > 2 and tensor[0, 0].numel() == 1 else tensor


def _config(
    path: Path, modules: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """PEFT's configuration of what was read; a LoKr's scale goes into its first factor."""
    kinds = {next(iter(own))[:4] for own in modules.values()}
    if len(kinds) > 1:
        raise ValueError(f"lora={path} holds several kinds of LoRA ({', '.join(sorted(kinds))}), which PEFT cannot say")
    if kinds == {"lokr"}:
        for module, scale in scales.items():
            name = next(f"{module}.{n}" for n in ("lokr_w1", "lokr_w1_a") if n in modules[module])
            tensors[name] = tensors[name] * scale
        try:
            return peft_utils._create_lokr_config(tensors, None).to_dict()  # noqa: SLF001
        except ValueError as error:
            raise ValueError(f"lora={path}: its LoKr has factors that PEFT does not make ({error})") from error
    lora = kinds == {"lora"}
    rank_of = {m: own["lora_A.weight" if lora else "hada_w1_b"].shape[0] for m, own in modules.items()}
    alphas = {module: scales[module] * rank for module, rank in rank_of.items()}
    rank, alpha = Counter((rank_of[m], alphas[m]) for m in modules).most_common(1)[0][0]
    return {
        "peft_type": "LORA" if lora else "LOHA",
        "r": rank,
        "lora_alpha" if lora else "alpha": alpha,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{re.escape(m)}": n for m, n in rank_of.items() if n != rank},
        "alpha_pattern": {f"^{re.escape(m)}": a for m, a in alphas.items() if a != alpha},
        **({"use_dora": True} if any("lora_magnitude_vector" in own for own in modules.values()) else {}),
        **({"lora_bias": True} if any("lora_B.bias" in own for own in modules.values()) else {}),
    }
