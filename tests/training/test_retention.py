"""Which files of earlier steps go, on drawn folders."""

import random

import pytest

from mpp.training.retention import outdated

OTHERS = ["step-12.safetensors", "my-step-000001.safetensors", "step-000002.txt", "lora.safetensors", "last.ckpt"]


@pytest.mark.parametrize("seed", range(20))
def test_all_but_the_last_steps_go_and_nothing_else(tmp_path, seed):
    draw = random.Random(seed)
    steps = sorted({draw.choice([draw.randint(1, 999), draw.randint(1, 2_000_000)]) for _ in range(draw.randint(1, 9))})
    endings = [".safetensors", "_comfyui.safetensors", "_ema.safetensors", "_high_kohya.safetensors", ".ckpt"]
    held = {step: [f"step-{step:06d}{end}" for end in draw.sample(endings, draw.randint(1, 5))] for step in steps}
    for name in [*OTHERS, *(name for names in held.values() for name in names)]:
        (tmp_path / name).touch()
    newest, most = draw.choice(steps), draw.randint(1, 5)
    gone = {file.name for file in outdated(tmp_path, newest, most)}
    past = [step for step in steps if step <= newest]
    assert gone == {name for step in past[: max(len(past) - most, 0)] for name in held[step]}
