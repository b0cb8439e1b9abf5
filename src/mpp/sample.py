"""`python -m mpp.sample`: paint prompts by the base model and by a LoRA from the same noise, side by side."""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from mpp.config import CONFIG_DIR, build, check_config, device_of, entry
from mpp.data.cache import Cache
from mpp.models.adapters import load_lora, lora_file
from mpp.models.experts import parts_of
from mpp.painting import paint, save


def run(cfg: DictConfig) -> list[Path]:
    """Paint as configured; text is encoded first, and its encoders are freed before the transformer loads.

    Returns:
        The files written.

    Raises:
        ValueError: Bad settings, no prompts, a model or LoRA that is not there or does not fit.
    """
    check_config(cfg)
    architecture, prompts, device = build(cfg.model), build(cfg.sampling), device_of(cfg.device)
    if not prompts.prompts:
        raise ValueError("sampling.prompts is empty; give prompts, e.g. sampling.prompts='[a photo of ohwx]'")
    architecture.check()
    prompts.check(architecture)
    if cfg.lora_path is not None:
        for part, _ in parts_of(architecture.skeleton()):
            lora_file(cfg.lora_path, part)
    folder = Path(cfg.output_dir)
    encoders = architecture.load_encoders(device)
    cache = Cache(folder / "embeddings")
    prompts.encode(architecture, encoders, cache, architecture.identity(fetch=True))
    encoders.release()
    transformer = architecture.load_transformer()
    if cfg.lora_path is not None:
        load_lora(transformer, cfg.lora_path)
    transformer.to(device).eval()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=torch.device(device).type == "cuda"):
        pairs = paint(architecture, transformer, encoders, prompts.read(architecture, cache))
    written = [file for pair in pairs for file in save(pair, folder)]
    for file in written:
        print(file)
    return written


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="sample")
@entry
def main(cfg: DictConfig) -> None:
    """Command line entry."""
    run(cfg)


if __name__ == "__main__":
    main()
