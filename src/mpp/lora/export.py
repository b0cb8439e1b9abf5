"""A trained LoRA for other programs, or merged into its base model."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import PeftConfig
from torch import Tensor, nn

from mpp import __version__
from mpp.files import content_hash, write_atomically, write_folder, write_json
from mpp.lora.files import PREFIX, LoraFile, attach, merge, read_own, updates
from mpp.lora.formats import cast, comfyui, kohya, to_native
from mpp.lora.meaning import PEFT_FILES
from mpp.lora.metadata import Facts, Metadata, describe, kept, network_module, save_file
from mpp.lora.original import merged_original
from mpp.lora.reading import find_loras
from mpp.lora.record import base_name
from mpp.lora.stack import base_fingerprint, load_base
from mpp.lora.writing import described
from mpp.memory.bases import dequantise
from mpp.models.contract import Architecture
from mpp.models.experts import parts_of
from mpp.models.weights import other_components

log = logging.getLogger("mpp")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"comfyui": comfyui, "kohya": kohya}  # with names of a program's own
PROGRAMS = {"diffusers": "diffusers", "comfyui": "ComfyUI", "kohya": "kohya's tools"}


@dataclass(frozen=True)
class Export:
    """What is exported, and how.

    Args:
        lora: A LoRA file of any program, or the output folder of a run.
        format: `diffusers`, `comfyui`, `kohya` or `peft`; with `merge` None, or `original`.
        merge: Write the base model with the LoRA merged into it, as a diffusers folder; with `original` as one file
            like `model.pretrained`, which must be one.
        output: File (`.safetensors`), or folder for `peft` and `merge`; None: beside the LoRA. With several experts,
            the expert's name is added.
        dtype: Of the exported LoRA's tensors: `float32`, `bfloat16` or `float16`; None: as they are.
        overwrite: Replace LoRA files that are there. A merged model is never replaced.
        metadata: What the file says of the LoRA, in place of what the LoRA's own says; a thumbnail is an image file.

    Raises:
        ValueError: Settings that do not go together.
    """

    lora: str | None = None
    format: Literal["diffusers", "comfyui", "kohya", "peft", "original"] | None = None
    merge: bool = False
    output: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    metadata: Metadata = field(default_factory=Metadata)

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if self.lora is None:
            raise ValueError("lora=... is missing: give a LoRA file, or the output folder of a run")
        if self.merge != (self.format in (None, "original")):
            raise ValueError(
                "choose one: export.format=diffusers, comfyui, kohya or peft for a LoRA file, or merge=true for a "
                "whole model, as one file of the original's names with export.format=original"
            )
        if self.merge and self.dtype is not None:
            raise ValueError("export.dtype is for LoRA files; a merged model has the precision of model.dtype")
        if self.output is not None and not self._is_folder and Path(self.output).suffix != ".safetensors":
            raise ValueError(f"export.output={self.output} must end in .safetensors")
        if self.merge and self.metadata != Metadata():
            raise ValueError("export.metadata is for LoRA files; a merged model says what it was made of by itself")
        if self.metadata.thumbnail is True:
            raise ValueError("export.metadata.thumbnail=true is for training; name an image file here")

    @property
    def _is_folder(self) -> bool:
        return (self.merge and self.format is None) or self.format == "peft"

    def run(self, architecture: Architecture) -> list[Path]:
        """Write the files.

        Returns:
            Files or folders written.

        Raises:
            ValueError: No LoRA for this model, or one that the format cannot say; nothing was written.
            OSError: The disk is full or not writable; nothing is left half written.
        """
        architecture.check()
        skeleton = dict(parts_of(architecture.skeleton()))
        loras = find_loras(Path(self.lora), architecture, skeleton)
        if self.format == "original" and len(skeleton) > 1:
            raise ValueError("export.format=original is for one expert at a time; choose its model config")
        targets = self._targets(loras)
        self._check_stored(architecture)
        if self.format == "original":
            _check_base(lora := loras[""], base_fingerprint(architecture))
            tensors, metadata = merged_original(lora, architecture, skeleton[""])
            metadata |= {"mpp_export": json.dumps(_record(lora, self.format, None), sort_keys=True)}
            write_atomically(targets[""], partial(save_file, tensors, metadata=metadata))
            return [targets[""]]
        if self.merge:
            for part, lora in loras.items():
                attach(skeleton[part], lora)
            write_folder(targets[""], partial(self._write_merged, architecture, loras))
            return [targets[""]]
        if self.format in FORMATS and any(lora.is_dora for lora in loras.values()):
            skeleton = dict(parts_of(load_base(architecture)))  # its norms are a part of the file
            for lora in loras.values():
                _check_base(lora, base_fingerprint(architecture))
        writers = {part: self._writer(lora, skeleton[part], architecture) for part, lora in loras.items()}
        for part, target in targets.items():
            (write_folder if self._is_folder else write_atomically)(target, writers[part])
        return list(targets.values())

    def _check_stored(self, architecture: Architecture) -> None:
        """Refuse quantised files where whole weights are written, or needed, that they cannot give."""
        stored = set(architecture.stored().values())
        if (self.format == "original" and stored) or (self.merge and "gguf" in stored):
            raise ValueError(
                f"model.pretrained={architecture.pretrained} has quantised weights ({', '.join(stored)}), into which "
                "nothing is merged; give the bf16 weights"
                + ("" if "gguf" in stored else ", or leave out export.format=original for a folder in model.dtype")
            )

    def _targets(self, loras: Mapping[str, LoraFile]) -> dict[str, Path]:
        """Where each LoRA goes; a merged model, which is one whatever it consists of, is called `""`."""
        end = "" if self._is_folder else ".safetensors"
        if self.merge:
            beside = Path(self.lora, "lora") if Path(self.lora).is_dir() else Path(self.lora).with_suffix("")
            targets = {"": Path(self.output or f"{beside}_merged{end}")}
        elif self.output is None:
            targets = {p: lora.path.with_name(f"{lora.path.stem}_{self.format}{end}") for p, lora in loras.items()}
        else:
            stem = self.output.removesuffix(".safetensors")
            targets = {p: Path(f"{stem}_{p}{end}") if len(loras) > 1 else Path(self.output) for p in loras}
        for target in targets.values():
            self._check_free(target)
        return targets

    def _check_free(self, target: Path) -> None:
        if not target.exists():
            return
        if self.merge:
            raise ValueError(f"{target} is there already; choose another export.output, or remove it")
        if not self.overwrite:
            raise ValueError(f"{target} is there already; choose another export.output, or set overwrite=true")
        if target.resolve() == Path(self.lora).resolve():
            raise ValueError(f"{target} is the LoRA itself; choose another export.output")
        if target.is_dir() != self._is_folder or (self._is_folder and set(os.listdir(target)) - set(PEFT_FILES)):
            raise ValueError(f"{target} holds other things than an exported LoRA; choose another export.output")

    def _writer(self, lora: LoraFile, transformer: nn.Module, architecture: Architecture) -> Callable[[Path], object]:
        """Convert everything, and leave only the writing."""
        config = attach(transformer, lora)
        metadata = _metadata(lora, self.format, self.dtype, architecture, self.metadata)
        if self.format == "peft":
            tensors = {f"base_model.model.{name}": tensor for name, tensor in lora.tensors.items()}
        elif self.format == "diffusers":
            tensors = {PREFIX + name: tensor for name, tensor in lora.tensors.items()}
            said = lora.metadata.get(LORA_ADAPTER_METADATA_KEY)
            metadata[LORA_ADAPTER_METADATA_KEY] = said or described(lora.described)
        try:
            if self.format in FORMATS:
                tensors = by_program(self.format, transformer, lora.tensors, architecture)
            tensors = cast(tensors, None if self.dtype is None else _DTYPES[self.dtype])
        except ValueError as error:
            raise ValueError(f"export.format={self.format}, lora={lora.path}: {error}") from error
        if self.format == "peft":
            return partial(_write_peft, tensors, metadata, config)
        return partial(save_file, tensors, metadata=metadata)

    def _write_merged(self, architecture: Architecture, loras: Mapping[str, LoraFile], folder: Path) -> None:
        source, names = architecture.pretrained, architecture.folders
        components = other_components(source, set(names.values()))
        base = base_fingerprint(architecture)
        merged = {}
        for part, transformer in parts_of(load_base(architecture)):
            if part in loras:
                lora = loras[part]
                _check_base(lora, base)
                attach(transformer, lora)
                merge(transformer)
                merged[names[part]] = {**_record(lora, "merged", self.dtype), "trained": lora.record}
            transformer.save_pretrained(folder / names[part])
        for path in components:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        write_json(folder / "mpp_export.json", {"base": {"pretrained": source, "weights": base}, "merged": merged})


def _check_base(lora: LoraFile, base: str | None) -> None:
    if None not in (lora.record.get("base"), base) and lora.record["base"] != base:
        log.warning("%s was trained on other weights (%s) than these", lora.path, lora.record["base"])


def by_program(
    format: str, transformer: nn.Module, tensors: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    """A LoRA in the names of another program.

    Args:
        format: One of `FORMATS`.
        transformer: With the adapter, which has the scales.
        tensors: The adapter's, by PEFT's names.
        architecture: The family, which knows the names.

    Raises:
        ValueError: The format cannot say it exactly.
    """
    named = ((name.replace(".base_layer", ""), module) for name, module in transformer.named_modules())
    layers = {name: module for name, module in named if isinstance(module, nn.Linear)}
    sizes = {name: layer.out_features for name, layer in layers.items()}
    names = architecture.names_in(format)

    def norms(name: str) -> Tensor:
        return dequantise(layers[name]).float().norm(dim=1).to(device)

    device = next(iter(tensors.values())).device
    native = to_native(updates(transformer, tensors), names.rules, sizes, norms)
    return FORMATS[format](native, names.prefix)


def write_beside(
    path: Path,
    format: str,
    transformer: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    said: Metadata,
) -> Path:
    """Write a LoRA file for another program beside it, as `mpp.export` does.

    Args:
        path: The LoRA file that training wrote.
        format: One of `FORMATS`.
        transformer: The one that it was trained on, with the adapter.
        tensors: The adapter's, by PEFT's names.
        architecture: The family.
        said: What the user says of it.

    Returns:
        The file written.
    """
    lora = read_own(path)
    tensors = cast(by_program(format, transformer, tensors, architecture), None)
    target = export_path(path, format)
    write_atomically(target, partial(save_file, tensors, metadata=_metadata(lora, format, None, architecture, said)))
    return target


def export_path(path: Path, format: str) -> Path:
    """Where the export of a LoRA file lies unless told otherwise."""
    return path.with_stem(f"{path.stem}_{format}")


def program_of(file: Path) -> str:
    """The program that a LoRA file which training wrote is for, by its name."""
    return PROGRAMS[next((format for format in FORMATS if file.stem.endswith(f"_{format}")), "diffusers")]


def _metadata(
    lora: LoraFile, format: str | None, dtype: str | None, architecture: Architecture, said: Metadata
) -> dict[str, str]:
    """What the LoRA's own file says or, where that is an older one or another program's, what is known of it."""
    record, part = lora.record, lora.record.get("expert", "")
    described = kept(lora.metadata) or describe(architecture, *_known(lora), part=part)
    metadata = {"format": "pt", "mpp_export": json.dumps(_record(lora, format, dtype or _dtype(lora)), sort_keys=True)}
    if record:
        metadata["mpp"] = json.dumps(said.record(record), sort_keys=True)
    return metadata | said.over(described | network_module(format, described), part=part)


def _dtype(lora: LoraFile) -> str:
    return str(next(iter(lora.tensors.values())).dtype).removeprefix("torch.")


def _known(lora: LoraFile) -> tuple[dict[str, Any], Facts]:
    """What a file says of its adapter and its run."""
    adapter = {name: (lora.described or {}).get(key) for name, key in (("rank", "r"), ("alpha", "lora_alpha"))}
    folder = base_name(str(lora.record.get("config", {}).get("output_dir") or ""))
    return {"adapter": adapter, **lora.record}, Facts(folder or lora.path.stem)


def _record(lora: LoraFile, format: str | None, dtype: str | None) -> dict[str, object]:
    """How the export was made; how the LoRA was made stands beside it under `mpp`."""
    return {
        "mpp": __version__,
        "format": format,
        "dtype": dtype,
        "lora": {"file": lora.path.name, "sha256": content_hash(lora.path)},
    }


def _write_peft(tensors: dict[str, Tensor], metadata: dict[str, str], config: PeftConfig, folder: Path) -> None:
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    config.save_pretrained(str(folder))
