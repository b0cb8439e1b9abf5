"""`python -m mpp.report`: a page that shows a cache under a loss."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mpp.config import build, check_config, command
from mpp.logs import record

if TYPE_CHECKING:
    from mpp.core.loss import MaskedPriorLoss


def run(cfg: DictConfig) -> Path:
    """Report as configured.

    Returns:
        The page.

    Raises:
        ValueError: Bad settings, or a cache that cannot be read.
        OSError: The page cannot be written.
    """
    check_config(cfg)
    path, findings = build(cfg.report).run(build(cfg.loss), _preset())
    for finding in findings:
        print(f"{finding.severity}: {finding.title}: {finding.count}")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
    record(page=str(path), findings={finding.kind: finding.count for finding in findings})
    return path


def _preset() -> "tuple[str, MaskedPriorLoss] | None":
    """The chosen preset's name, and what it is without the settings that were typed besides."""
    name = HydraConfig.get().runtime.choices.get("loss") if HydraConfig.initialized() else None
    if name is None:
        return None
    loader = GlobalHydra.instance().config_loader()
    return name, build(loader.load_configuration("report", [f"loss={name}"], RunMode.RUN).loss)


main = command("report", run)

if __name__ == "__main__":
    main()
