"""A real run of `mpp.train` from a cache to a LoRA file, with random weights and samples."""

import csv
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.gpu.case import Case, Found
from benchmarks.trace import command
from mpp.cache.format import Cache, CacheIdentity, text_name, write_tensors
from mpp.cache.index import Entry
from mpp.models.families.wan import Wan

STEPS = 20
SAMPLES = 4


def write_cache(folder: Path, architecture: Wan, shape: tuple[int, int, int], tokens: int, width: int) -> None:
    """Random samples, each with half of its cells to be preserved."""
    cache, random = Cache(folder), torch.Generator().manual_seed(0)
    cache.write_identity(CacheIdentity.of(architecture, architecture.identity()))
    name, entries = text_name("a"), []
    write_tensors(cache.text_path(name), {"text": torch.randn(tokens, width, generator=random)}, {})
    mask = torch.ones(1, *shape)
    mask[..., shape[-1] // 2 :] = 0
    for number in range(SAMPLES):
        key = f"s{number}"
        write_tensors(cache.latents_path(key), {"latents": torch.randn(16, *shape, generator=random)}, {})
        write_tensors(cache.mask_path(key), {"mask": mask}, {})
        entries.append(Entry(key, "train", (16, *shape), name, "a", "folder"))
    cache.write_index(entries)


def train(case: Case) -> Found:
    """Seconds of the whole command, and what its log says of a step."""
    with tempfile.TemporaryDirectory() as root:
        folder, out = Path(root), Path(root) / "run"
        case.architecture().load_transformer().save_pretrained(folder / "model" / "transformer")
        size = case.size
        architecture = Wan(pretrained=str(folder / "model"), text_length=size.text_tokens)
        write_cache(folder / "cache", architecture, case.shape, size.text_tokens, size.text_width)
        words = [
            "model=wan",
            f"model.pretrained={folder / 'model'}",
            f"model.text_length={size.text_tokens}",
            f"data.cache_dir={folder / 'cache'}",
            f"output_dir={out}",
            f"trainer.max_steps={STEPS}",
            f"trainer.accelerator={'cpu' if case.device == 'cpu' else 'gpu'}",
            "trainer.log_every_n_steps=5",
            "trainer.enable_progress_bar=false",
            "callbacks.report.pictures=0",
            "callbacks.page=null",
            "validate_first=false",
            "logger=csv",
        ]
        start = time.monotonic()
        command("mpp.train", words)
        found: Found = {"command_s": time.monotonic() - start, "steps": STEPS}
        (log,) = out.glob("csv/*/metrics.csv")
        with log.open(newline="") as handle:
            last = [row for row in csv.DictReader(handle) if row.get("train/loss")][-1]
        found["step_s"] = float(last["perf/seconds_per_step"])
        if last.get("perf/peak_memory_gib"):
            found["peak_gib"] = float(last["perf/peak_memory_gib"])
        (file,) = out.glob("lora.safetensors")
        with safe_open(file, "pt") as handle:
            tensors = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
        learned = all(bool(tensor.isfinite().all() and tensor.any()) for tensor in tensors)
        return {**found, "tensors": len(tensors), "lora_mb": file.stat().st_size / 1e6, "good": learned}
