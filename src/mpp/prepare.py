"""`python -m mpp.prepare`: turn a folder of pictures, masks and captions into a cache."""

import hydra
from omegaconf import DictConfig

from mpp.config import CONFIG_DIR, build, check_config, device_of, entry
from mpp.data.preparation import Preparation, Summary


def run(cfg: DictConfig) -> Summary:
    """Prepare as configured.

    Raises:
        ValueError: Bad settings or pictures; nothing was encoded.
        OSError: The cache cannot be written.
    """
    check_config(cfg)
    model, device = build(cfg.model), device_of(cfg.device)
    summary = Preparation(build(cfg.data), model, device, build(cfg.sampling), build(cfg.prepare)).run()
    for line in summary.lines():
        print(line)
    return summary


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="prepare")
@entry
def main(cfg: DictConfig) -> None:
    """Command line entry."""
    run(cfg)


if __name__ == "__main__":
    main()
