"""Tiny models with more blocks than their builders give them, so that some have to wait."""

import json
import random
import shutil

import torch

from tests.families import base

DEPTHS = ("num_layers", "num_single_layers", "n_layers", "num_visual_blocks", "num_text_blocks")


def deepen(arch, folder, seed, blocks=(3, 5)):
    """Save random transformers with so many blocks in each of their lists in place of those in a pipeline's folder."""
    draw = random.Random(seed)
    for part in {"transformer", *arch.folders.values()}:
        config = json.loads((folder / part / "config.json").read_text())
        config |= {name: draw.randint(*blocks) for name in DEPTHS if name in config}
        torch.manual_seed(seed)
        model = arch.transformer_class.from_config(config)
        for tensor in model.parameters():
            if not tensor.any() or (tensor == tensor.flatten()[0]).all():  # zeros and ones say little
                tensor.data.normal_(std=0.3)
        model.save_pretrained(folder / part)


def deeper(variant, folder, target, seed, blocks=(3, 5)):
    """The variant's architecture over a copy of its pipeline with so many blocks."""
    shutil.copytree(folder, target)
    arch = base.architecture(variant, target)
    deepen(arch, target, seed, blocks)
    return arch
