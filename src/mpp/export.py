"""`python -m mpp.export`: a trained LoRA for other programs, or merged into its base model."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from mpp.config import build, check_config, command
from mpp.logs import record

log = logging.getLogger("mpp")


def run(cfg: DictConfig) -> list[Path]:
    """Export as configured.

    Raises:
        ValueError: Bad settings, or a LoRA that does not fit; nothing was written.
        OSError: The output cannot be written.
    """
    check_config(cfg)
    written = build(cfg.export).run(build(cfg.model))
    for path in written:
        print(f"wrote {path}")
    record(files=[str(path) for path in written])
    return written


main = command("export", run)

if __name__ == "__main__":
    main()
