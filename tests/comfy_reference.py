"""How ComfyUI applies a LoRA file to a model's original state, as plain code; ComfyUI is not on PyPI.

Key names: Comfy-Org/ComfyUI `comfy/lora.py`, `model_lora_keys_unet` (the names that all models have). Arithmetic:
`comfy/weight_adapter/lora.py` and `lokr.py`, `calculate_weight`; there is no other information in a file that it reads.
"""

import torch


def key_map(names):
    """From the key that a file may use to the module that it means."""
    found = {}
    for name in names:
        found[f"diffusion_model.{name}"] = name
        found["lora_unet_" + name.replace(".", "_")] = name
    return found


def deltas(names, file):
    """What is added to the weight of each module; every tensor of the file must be read.

    Raises:
        AssertionError: Tensors that ComfyUI would not read.
    """
    found, read = {}, set()
    for key, name in key_map(names).items():
        for adapter in (lora, lokr):
            delta = adapter(key, file, read)
            if delta is not None:
                assert name not in found, f"{name} twice"
                found[name] = delta
    assert read == set(file), f"not loaded: {sorted(set(file) - read)[:3]}"
    return found


def take(file, read, key):
    """One tensor in float32, noted as read; None if it is not there."""
    if key not in file:
        return None
    read.add(key)
    return file[key].float()


def lora(key, file, read):
    """W + alpha / rank * up @ down; alpha / rank is 1 without alpha."""
    pairs = [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")]
    for up_name, down_name in pairs:
        up = take(file, read, f"{key}.{up_name}")
        if up is None:
            continue
        down = take(file, read, f"{key}.{down_name}")
        alpha = take(file, read, f"{key}.alpha")
        return (1.0 if alpha is None else alpha.item() / down.shape[0]) * (up @ down)
    return None


def lokr(key, file, read):
    """W + scale * kron(w1, w2); scale is alpha / rank if a factor is decomposed and there is an alpha, else 1."""
    rank = None
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = (take(file, read, f"{key}.{name}{end}") for end in ("", "_a", "_b"))
        if whole is None and a is None:
            return None
        if whole is None:
            rank = b.shape[0]
        factors.append(a @ b if whole is None else whole)
    alpha = take(file, read, f"{key}.alpha")
    scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
    return scale * torch.kron(*factors)


def apply(state, file):
    """The state with a LoRA file applied to it."""
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    added = deltas(names, file)
    merged = dict(state)
    for name, delta in added.items():
        assert delta.shape == state[f"{name}.weight"].shape, name
        merged[f"{name}.weight"] = state[f"{name}.weight"] + delta
    return merged
