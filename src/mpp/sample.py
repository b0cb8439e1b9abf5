"""`python -m mpp.sample`: generate from prompts by the base model and by a LoRA from the same noise, side by side."""

from pathlib import Path

from omegaconf import DictConfig

from mpp.config import build, check_config, command, device_of
from mpp.logs import adopt, record


def run(cfg: DictConfig) -> list[Path]:
    """Generate as configured; text is encoded first, and its encoders are freed before the transformer loads.

    Returns:
        The files written.

    Raises:
        ValueError: Bad settings, no prompts, a model or LoRA that is not there or does not fit.
    """
    import torch

    from mpp.cache.format import Cache
    from mpp.lora.stack import Stack, check_model, load_base
    from mpp.memory.bases import check_device
    from mpp.memory.link import check_link
    from mpp.models.experts import parts_of
    from mpp.models.streamed import stream
    from mpp.sampling.generation import generate, generation_name, save

    adopt()
    check_config(cfg)
    architecture, prompts, device = build(cfg.model), build(cfg.sampling), device_of(cfg.device)
    memory = build(cfg.memory)
    check_device(memory.base, device)
    check_link(memory.resident, torch.device(device))
    if not prompts.lines:
        raise ValueError("sampling.prompts is empty; give one, e.g. sampling.prompts='a photo of ohwx'")
    check_model(architecture, memory.base, memory.resident)
    prompts.check(architecture)
    skeleton = dict(parts_of(architecture.skeleton()))
    loras = Stack.read(cfg.lora_path, architecture, skeleton)
    loras.check_kinds(memory.base)
    loras.attach(skeleton)
    folder = Path(cfg.output_dir)
    encoders = architecture.load_encoders(device, memory)
    cache = Cache(folder / "embeddings")
    prompts.encode(architecture, encoders, cache, architecture.identity(fetch=True), text_weights=memory.text_weights)
    encoders.release()
    transformer = load_base(architecture, memory.base)
    loras.attach(dict(parts_of(transformer)))
    stream(architecture, transformer, memory.resident)
    transformer.to(device).eval()
    kind = torch.device(device).type
    low = next((p.dtype for p in transformer.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    written = []
    with torch.autocast(kind, low, enabled=kind == "cuda" and low is not None):
        for number, ready in enumerate(prompts.read(architecture, cache)):
            name = generation_name(number, ready.prompt)
            written += save(generate(architecture, transformer, encoders, ready, name=name, device=device), folder)
    for file in written:
        print(file)
    record(files=[str(file) for file in written])
    return written


main = command("sample", run)

if __name__ == "__main__":
    main()
