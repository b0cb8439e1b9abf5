"""`python -m mpp.report`: a page that shows a cache under a loss."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mpp.config import build, check_config, command
from mpp.logs import record


def run(cfg: DictConfig) -> Path:
    """Report as configured.

    Returns:
        The page.

    Raises:
        ValueError: Bad settings, or a cache that cannot be read.
        OSError: The page cannot be written.
    """
    check_config(cfg)
    name = HydraConfig.get().runtime.choices.get("loss") if HydraConfig.initialized() else None
    path, findings = build(cfg.report).run(build(cfg.loss), name)
    for finding in findings:
        print(f"{finding.severity}: {finding.title}: {finding.count}")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    record(page=str(path), findings={finding.kind: finding.count for finding in findings})
    return path


main = command("report", run)

if __name__ == "__main__":
    main()
