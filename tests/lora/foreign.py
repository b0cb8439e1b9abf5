"""One LoRA as other programs write it, from what those programs do: nothing here is mpp's.

A layer's update is `scale * up @ down`; `names` are layers as the program's model has them.
"""

import json

import torch
from safetensors.torch import save_file


def kohya(names, *, alpha=True):
    """sd-scripts and musubi-tuner, networks/lora.py; without alpha readers take the rank for it."""
    found = {}
    for name, (down, up, scale) in names.items():
        key = "lora_unet_" + name.replace(".", "_")
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up if alpha else up * scale}
        if alpha:
            found[f"{key}.alpha"] = torch.tensor(scale * len(down))
    return found


def onetrainer(names):
    """OneTrainer: kohya's, below a prefix of its own."""
    return {key.replace("lora_unet_", "lora_transformer_"): tensor for key, tensor in kohya(names).items()}


def dotted(names, *, prefix="", down="lora_A.weight", up="lora_B.weight", alpha=False):
    """ComfyUI, ai-toolkit, diffusers, DiffSynth-Studio: prefixes and endings; without alpha the scale is in `up`."""
    found = {}
    for name, (first, second, scale) in names.items():
        found |= {f"{prefix}{name}.{down}": first, f"{prefix}{name}.{up}": second if alpha else second * scale}
        if alpha:
            found[f"{prefix}{name}.alpha"] = torch.tensor(scale * len(first))
    return found


FORMS = {  # of a LoRA by the names of one model
    "kohya": kohya,
    "kohya without alpha": lambda names: kohya(names, alpha=False),
    "OneTrainer": onetrainer,
    "ComfyUI": lambda names: dotted(names, prefix="diffusion_model."),
    "ComfyUI with alpha": lambda names: dotted(names, prefix="diffusion_model.", alpha=True),
    "ComfyUI, down and up": lambda names: dotted(
        names, prefix="diffusion_model.", down="lora_down.weight", up="lora_up.weight", alpha=True
    ),
    "a whole ComfyUI model's": lambda names: dotted(names, prefix="model.diffusion_model.", alpha=True),
    "diffusers": lambda names: dotted(names, prefix="transformer."),
    "diffusers with alpha": lambda names: dotted(names, prefix="transformer.", alpha=True),
    "old diffusers": lambda names: dotted(names, prefix="unet.", down="lora.down.weight", up="lora.up.weight"),
    "DiffSynth": lambda names: dotted(names, down="lora_A.default.weight", up="lora_B.default.weight"),
    "DiffSynth's pipeline": lambda names: dotted(
        names, prefix="pipe.dit.", down="lora_A.default.weight", up="lora_B.default.weight", alpha=True
    ),
    "bare": lambda names: dotted(names, alpha=True),
    "PEFT's names": lambda names: dotted(names, prefix="base_model.model."),
}


def peft_folder(folder, names):
    """A folder as PEFT's `save_pretrained` writes it; ranks and alphas by pattern."""
    folder.mkdir()
    tensors = {}
    for name, (down, up, _) in names.items():
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": down.contiguous(),
            f"base_model.model.{name}.lora_B.weight": up.contiguous(),
        }
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": sorted(names),
        "rank_pattern": {name: len(down) for name, (down, _, _) in names.items()},
        "alpha_pattern": {name: scale * len(down) for name, (down, _, scale) in names.items()},
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def drawn(shapes, seed=0, most=6):
    """Random factors for layers of the given shapes, each with its own rank and scale."""
    random = torch.Generator().manual_seed(seed)
    names = {}
    for name, (rows, columns) in shapes.items():
        rank = int(torch.randint(1, most, (), generator=random))
        scale = float(torch.randint(1, 9, (), generator=random)) / rank
        down = torch.randn(rank, columns, generator=random) * 0.2
        names[name] = down, torch.randn(rows, rank, generator=random) * 0.2, scale
    return names
