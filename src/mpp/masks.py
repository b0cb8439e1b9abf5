"""`python -m mpp.masks`: make, change and look at masks, whole folders at once."""

import hydra
from omegaconf import DictConfig, OmegaConf

from mpp.config import CONFIG_DIR, build, check_config, device_of, entry
from mpp.masking.job import Summary


def run(cfg: DictConfig) -> Summary:
    """Run a tool as configured.

    Raises:
        ValueError: Bad settings, and then nothing was written; or some inputs failed, and the others are done.
        OSError: The output cannot be written.
    """
    OmegaConf.update(cfg, "device", device_of(cfg.device))
    check_config(cfg)
    job = build(cfg.job, _partial_=True)  # as an argument Hydra would take the tool, a dataclass, for configuration
    summary = job(tool=build(cfg.tool)).run()
    for line in summary.lines():
        print(line)
    summary.check()
    return summary


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="masks")
@entry
def main(cfg: DictConfig) -> None:
    """Command line entry."""
    run(cfg)


if __name__ == "__main__":
    main()
