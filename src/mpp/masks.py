"""`python -m mpp.masks`: make, change and look at masks, whole folders at once."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from mpp.config import build, check_config, command, device_of
from mpp.logs import record

if TYPE_CHECKING:
    from mpp.masking.job import JobSummary


def run(cfg: DictConfig) -> "JobSummary":
    """Run a tool as configured.

    Raises:
        ValueError: Bad settings, and then nothing was written; or some inputs failed, and the others are done.
        OSError: The output cannot be written.
    """
    OmegaConf.update(cfg, "device", device_of(cfg.device))
    check_config(cfg)
    summary = build(cfg.job, tool=build(cfg.tool)).run()
    for line in summary.lines():
        print(line)
    record(output=str(summary.output), written=len(summary.written), kept=len(summary.kept), failures=summary.failures)
    summary.check()
    return summary


main = command("masks", run)

if __name__ == "__main__":
    main()
