"""`python -m mpp.train`: train a LoRA with masked prior preservation."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from mpp import recorded  # noqa: F401 (what composes a run that goes on)
from mpp.config import command

if TYPE_CHECKING:
    import lightning

    from mpp.training.module import MaskedPriorModule


def run(cfg: DictConfig) -> "tuple[lightning.Trainer, MaskedPriorModule]":
    """Train as configured; everything cheap is checked before the transformer is loaded.

    Returns:
        The finished trainer and module.

    Raises:
        ValueError: Bad settings, a cache or checkpoint that does not fit, a model that is not there.
    """
    from mpp.fitting import train

    return train(cfg)


main = command("train", run)

if __name__ == "__main__":
    main()
