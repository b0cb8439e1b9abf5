"""How ComfyUI and kohya's tools apply a LoRA file to a model's original state, as plain code; neither is on PyPI.

ComfyUI in its order. First it renames the state of a model whose layers it calls otherwise: Comfy-Org/ComfyUI
`comfy/supported_models.py`, `process_unet_state_dict`. Then it lists the keys that a file may use, those of all models
and those of one: `comfy/lora.py`, `model_lora_keys_unet`, with `comfy/utils.py`, `flux_to_diffusers` and
`z_image_to_diffusers`. Arithmetic: `comfy/weight_adapter/lora.py`, `lokr.py` and `loha.py`, `calculate_weight`,
with `base.py`, `weight_decompose`; there is no other information in a file that it reads.

kohya's tools (sd-scripts, musubi-tuner: `networks/lora.py`) call a module by its name in their model, with underscores.
Their models are the originals; musubi-tuner's Z-Image has diffusers' layers (`zimage/zimage_model.py`).
"""

import torch

HUNYUAN = [  # of HunyuanVideo's blocks: Tencent's, ComfyUI's
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    (".modulation.linear.", ".modulation.lin."),
]
FLUX = {  # diffusers' layer of a block: ComfyUI's, and which part of it in units of the width
    "transformer_blocks.{}.attn.to_q": ("double_blocks.{}.img_attn.qkv", 0, 1),
    "transformer_blocks.{}.attn.to_k": ("double_blocks.{}.img_attn.qkv", 1, 1),
    "transformer_blocks.{}.attn.to_v": ("double_blocks.{}.img_attn.qkv", 2, 1),
    "transformer_blocks.{}.attn.add_q_proj": ("double_blocks.{}.txt_attn.qkv", 0, 1),
    "transformer_blocks.{}.attn.add_k_proj": ("double_blocks.{}.txt_attn.qkv", 1, 1),
    "transformer_blocks.{}.attn.add_v_proj": ("double_blocks.{}.txt_attn.qkv", 2, 1),
    "transformer_blocks.{}.attn.to_out.0": ("double_blocks.{}.img_attn.proj", 0, None),
    "transformer_blocks.{}.attn.to_add_out": ("double_blocks.{}.txt_attn.proj", 0, None),
    "transformer_blocks.{}.norm1.linear": ("double_blocks.{}.img_mod.lin", 0, None),
    "transformer_blocks.{}.norm1_context.linear": ("double_blocks.{}.txt_mod.lin", 0, None),
    "transformer_blocks.{}.ff.net.0.proj": ("double_blocks.{}.img_mlp.0", 0, None),
    "transformer_blocks.{}.ff.net.2": ("double_blocks.{}.img_mlp.2", 0, None),
    "transformer_blocks.{}.ff_context.net.0.proj": ("double_blocks.{}.txt_mlp.0", 0, None),
    "transformer_blocks.{}.ff_context.net.2": ("double_blocks.{}.txt_mlp.2", 0, None),
    "transformer_blocks.{}.ff.linear_in": ("double_blocks.{}.img_mlp.0", 0, None),
    "transformer_blocks.{}.ff.linear_out": ("double_blocks.{}.img_mlp.2", 0, None),
    "transformer_blocks.{}.ff_context.linear_in": ("double_blocks.{}.txt_mlp.0", 0, None),
    "transformer_blocks.{}.ff_context.linear_out": ("double_blocks.{}.txt_mlp.2", 0, None),
    "single_transformer_blocks.{}.norm.linear": ("single_blocks.{}.modulation.lin", 0, None),
    "single_transformer_blocks.{}.proj_out": ("single_blocks.{}.linear2", 0, None),
    "single_transformer_blocks.{}.attn.to_q": ("single_blocks.{}.linear1", 0, 1),
    "single_transformer_blocks.{}.attn.to_k": ("single_blocks.{}.linear1", 1, 1),
    "single_transformer_blocks.{}.attn.to_v": ("single_blocks.{}.linear1", 2, 1),
    "single_transformer_blocks.{}.proj_mlp": ("single_blocks.{}.linear1", 3, 4),
    "single_transformer_blocks.{}.attn.to_qkv_mlp_proj": ("single_blocks.{}.linear1", 0, None),
    "single_transformer_blocks.{}.attn.to_out": ("single_blocks.{}.linear2", 0, None),
}
Z_IMAGE = {
    "{}.attention.to_q": ("{}.attention.qkv", 0, 1),
    "{}.attention.to_k": ("{}.attention.qkv", 1, 1),
    "{}.attention.to_v": ("{}.attention.qkv", 2, 1),
    "{}.attention.to_out.0": ("{}.attention.out", 0, None),
}
# By the family's name in mpp: how ComfyUI renames the state, diffusers' layers, and the prefixes of those.
MODELS = {
    "hunyuan_video": (HUNYUAN, {}, ()),
    "flux": ([], FLUX, ("transformer.",)),
    "flux2": ([], FLUX, ("transformer.",)),
    "z_image": ([], Z_IMAGE, ("transformer.", "diffusion_model.")),
}


def renamed(name, family=None):
    """What ComfyUI calls a module of the original."""
    for theirs, comfy in MODELS.get(family, ([],))[0]:
        name = f"{name}.".replace(theirs, comfy).removesuffix(".")
    return name


def key_map(shapes, family=None):
    """From the key that a file may use to the module that it means, and the rows of it.

    Args:
        shapes: Of the weights, by the original's module names.
        family: The model's; None: one that has the keys of all models alone.
    """
    renames, layers, prefixes = MODELS.get(family, ([], {}, ()))
    found = {}
    for name, shape in shapes.items():
        comfy, rows = renamed(name, family), slice(0, shape[0])
        found[f"diffusion_model.{comfy}"] = name, rows
        found["lora_unet_" + comfy.replace(".", "_")] = name, rows
        if renames:  # files with the original's names
            found[f"diffusion_model.{name}"] = found[f"transformer.{name}"] = name, rows
    for ours, place in diffusers_layers(shapes, layers).items():
        found |= {prefix + ours: place for prefix in prefixes}
    return found


def diffusers_layers(shapes, layers):
    """Diffusers' layers by name: the original's module, and the rows of it."""
    found = {}
    for ours, (theirs, start, count) in layers.items():
        begin, end = theirs.split("{}")
        for name, shape in shapes.items():
            if name.startswith(begin) and name.endswith(end):
                block, width = name[len(begin) : len(name) - len(end)], shape[1]
                stop = shape[0] if count is None else min((start + count) * width, shape[0])
                found[ours.format(block)] = name, slice(start * width, stop)
    return found


def kohya_map(shapes, family=None):
    """From the key that a file may use to the module that kohya's tools mean, and the rows of it."""
    found = {name: (name, slice(0, shape[0])) for name, shape in shapes.items()}
    if family == "z_image":
        apart = diffusers_layers(shapes, Z_IMAGE)
        found = {name: place for name, place in found.items() if name not in {theirs for theirs, _ in apart.values()}}
        found |= apart
    return {"lora_unet_" + name.replace(".", "_"): place for name, place in found.items()}


def deltas(shapes, file, family=None, read_by=key_map, state=None):
    """What is added to the weight of each module; every tensor of the file must be read.

    Raises:
        AssertionError: Tensors that the program would not read.
    """
    found, read, written = {}, set(), set()
    for key, (name, rows) in read_by(shapes, family).items():
        for adapter in (lora, lokr, loha):
            delta = adapter(key, file, read)
            if delta is not None:
                assert (name, rows.start) not in written, f"{name} twice"
                written.add((name, rows.start))
                assert delta.shape == (rows.stop - rows.start, shapes[name][1]), key
                scale = take(file, read, f"{key}.dora_scale")
                if scale is not None:
                    weight = state[f"{name}.weight"][rows].float()
                    norm = weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps
                    delta = (weight + delta) * (scale / norm) - weight
                found.setdefault(name, torch.zeros(shapes[name]))[rows] += delta
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


def loha(key, file, read):
    """W + alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), by elements; alpha / rank is 1 without alpha."""
    w1_a, w1_b, w2_a, w2_b = (take(file, read, f"{key}.hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if w1_a is None:
        return None
    alpha = take(file, read, f"{key}.alpha")
    return (1.0 if alpha is None else alpha.item() / w1_b.shape[0]) * (w1_a @ w1_b) * (w2_a @ w2_b)


def apply(state, file, family=None, read_by=key_map):
    """The state with a LoRA file applied to it."""
    shapes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    merged = dict(state)
    for name, delta in deltas(shapes, file, family, read_by, state).items():
        merged[f"{name}.weight"] = state[f"{name}.weight"] + delta
    return merged
