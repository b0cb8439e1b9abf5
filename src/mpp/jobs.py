"""What Hydra knows of a job: its number in a sweep, what was typed, and the record and log in the run's folder.

Hydra itself makes no folder and opens no file: a start that is refused leaves everything as it was.
"""

import atexit
import logging
import sys
import tempfile
from logging.handlers import MemoryHandler
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mpp.cli import quoted
from mpp.files import write_atomically
from mpp.logs import FILE


def _scratch_folder(output_dir: str) -> str:
    """Where Hydra's sweeper puts the file that it always writes; it is gone with the process.

    Args:
        output_dir: Not used; naming it here makes a time in it the same for all jobs of a sweep.
    """
    del output_dir
    folder = tempfile.TemporaryDirectory(prefix="mpp-sweep-")
    atexit.register(folder.cleanup)
    return folder.name


OmegaConf.register_new_resolver("scratch_folder", _scratch_folder, use_cache=True, replace=True)


def job_number() -> int | None:
    """The number of this job in a sweep, from 0; None where there is no sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num)


def divide_output(cfg: DictConfig) -> None:
    """Give each job of a sweep a folder of its own, named by its number, within `output_dir`."""
    number = job_number()
    if number is not None and "output_dir" in cfg and not OmegaConf.is_missing(cfg, "output_dir"):
        cfg.output_dir = f"{cfg.output_dir}/{number}"


def repeat_output(folder: Path) -> None:
    """Tell processes that this one starts for DDP, which repeat its words, the folder that its clock may have named."""
    if HydraConfig.initialized() and not any(word.startswith("output_dir=") for word in sys.argv):
        sys.argv.append(f"output_dir={quoted(str(folder))}")


def begin_record(cfg: DictConfig, folder: Path) -> None:
    """Write into a run's folder what it was started with, and its log: what was said so far, and all that follows.

    A script that calls `run` has no such record; the checkpoint and the LoRA have theirs.

    Raises:
        OSError: The folder cannot be written.
    """
    if not HydraConfig.initialized():
        return
    for name, content in (("config", cfg), ("overrides", HydraConfig.get().overrides.task)):
        text = OmegaConf.to_yaml(content)
        write_atomically(folder / ".hydra" / f"{name}.yaml", lambda path, text=text: path.write_text(text, "utf-8"))
    log = logging.FileHandler(folder / f"{HydraConfig.get().job.name}.log", encoding="utf-8")
    log.setFormatter(FILE)
    root = logging.getLogger()
    for waiting in [handler for handler in root.handlers if isinstance(handler, MemoryHandler)]:
        waiting.setTarget(log)
        waiting.flush()
        root.removeHandler(waiting)
    root.addHandler(log)
