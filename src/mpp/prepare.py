"""`python -m mpp.prepare`: turn images, videos, masks and captions into a cache."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from mpp import BEGAN
from mpp.config import build, check_config, command, device_of
from mpp.jobs import job_number
from mpp.logs import adopt, record

if TYPE_CHECKING:
    from mpp.musubi.export import MusubiSummary
    from mpp.preparing.summary import Summary


def run(cfg: DictConfig, began: float | None = None) -> "Summary | MusubiSummary":
    """Prepare as configured, or export what was prepared.

    Args:
        cfg: The configuration.
        began: When the user began to wait, by `time.monotonic`; None: now.

    Raises:
        ValueError: Bad settings or images; nothing was encoded.
        OSError: The cache cannot be written.
    """
    check_config(cfg)
    if cfg.export is not None:
        return export(cfg)
    if cfg.export_dir is not None:
        raise ValueError(f"export_dir={cfg.export_dir} is for an export; add export=musubi")
    from mpp.preparing.preparation import Preparation

    adopt()
    model, device = build(cfg.model), device_of(cfg.device)
    prompts, sharding, memory = build(cfg.sampling), build(cfg.prepare), build(cfg.memory)
    summary = Preparation(build(cfg.data), model, device, prompts, sharding, memory=memory).run(began)
    for line in summary.lines():
        print(line)
    counted = ("encoded", "current", "validation", "masks_written", "masks_current", "skipped", "seconds")
    record(cache_dir=str(cfg.data.cache_dir), **{name: getattr(summary, name) for name in counted})
    return summary


def export(cfg: DictConfig) -> "MusubiSummary":
    """Write a finished cache in another program's files.

    Raises:
        ValueError: Another program than musubi, no folder to write to, or a cache that is not the model's.
        OSError: The folder cannot be written.
    """
    if cfg.export != "musubi":
        raise ValueError(f"export must be musubi, got {cfg.export!r}")
    if cfg.export_dir is None:
        raise ValueError("export=musubi needs a folder to write to; set export_dir")
    from mpp.cache.format import Cache
    from mpp.musubi.export import export_musubi

    summary = export_musubi(Cache(cfg.data.cache_dir), build(cfg.model), cfg.export_dir)
    for line in summary.lines():
        print(line)
    record(folders={str(folder): count for folder, count in summary.folders.items()})
    return summary


def _run_in_a_process(cfg: DictConfig) -> object:
    return run(cfg, None if job_number() else BEGAN)  # later jobs of a sweep begin when they do


main = command("prepare", _run_in_a_process)

if __name__ == "__main__":
    main()
