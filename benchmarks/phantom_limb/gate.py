"""The gate before any comparison: `python -m benchmarks.phantom_limb.gate`.

The detectors must pass every real scene, the base must generate whole objects on clean backgrounds, and the positive
control (no mask, the subject alone on clean backgrounds) must learn its subject.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.phantom_limb.detectors import GROUND_SHARE, background_off, find, object_faults
from benchmarks.phantom_limb.fine_tune_sets import generator, make_data
from benchmarks.phantom_limb.sampling import draw_noise, grid, sample, toy
from benchmarks.phantom_limb.study import BASE, HERE, jobs, parameters, protocol, run
from benchmarks.phantom_limb.world import SUBJECTS, named_scenes, render, subject_scenes
from mpp.files import write_json

IMAGES = 512
LIMITS = {"malformed": 0.02, "bad_background": 0.05, "control_success": 0.80}


def real_scenes(count: int) -> dict[str, float]:
    """How the detectors judge rendered scenes: all shares must be 1."""
    scenes, captions = named_scenes(count, generator("gate real"))
    images = render(scenes)
    shares = {
        "whole": sum(not fault for fault in object_faults(images, captions)) / count,
        "background": (background_off(images, captions) <= GROUND_SHARE).float().mean().item(),
    }
    for name, subject in SUBJECTS.items():
        ugly, _ = subject_scenes(subject, count, generator("gate", name), alone=False)
        found = find(render(ugly), subject)
        for kind in ("success", "bystander", "ground"):
            shares[f"{name}_{kind}"] = getattr(found, kind).float().mean().item()
    return shares


def base_figures(base: Path, count: int, image: Path) -> dict[str, object]:
    """How the detectors judge images that the base generates of full captions."""
    architecture = toy(pretrained=str(base))
    transformer = architecture.load_transformer().eval()
    _, captions = named_scenes(count, generator("gate prompts"))
    images = sample(architecture, transformer, captions, draw_noise(architecture, count, 3000))
    faults = object_faults(images, captions)
    off = background_off(images, captions) > GROUND_SHARE
    grid(images[:64], 16).save(image)
    return {
        "parameters": parameters(transformer),
        "pictures": count,
        "malformed": sum(map(bool, faults)) / count,
        "reasons": dict(Counter(fault for fault in faults if fault)),
        "bad_background": off.float().mean().item(),
    }


def control_figures(base: Path, root: Path, seeds: Iterable[int]) -> list[dict[str, object]]:
    """The positive control of each subject and seed."""
    rules = protocol()
    for name in rules.subjects:
        make_data(root / name, name, base, rules, rules.control.halo)
    found = jobs(rules, root, rules.control.variants, list(seeds))
    return [json.loads(run(job, base, root, root / "results").read_text()) for job in found]


def main() -> None:
    """Judge a base; exit code 1 where it does not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for gate.json and gate.png")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the control")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "limits": LIMITS,
        "real_scenes": real_scenes(args.images),
        "base": base_figures(args.base, args.images, args.out / "gate.png"),
    }
    print(json.dumps(figures, indent=2), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures["control"] = control_figures(args.base, Path(folder), range(args.seeds))
    success = sum(row["success"] for row in figures["control"]) / len(figures["control"])
    figures["passed"] = (
        min(figures["real_scenes"].values()) == 1
        and figures["base"]["malformed"] < LIMITS["malformed"]
        and figures["base"]["bad_background"] < LIMITS["bad_background"]
        and success > LIMITS["control_success"]
    )
    write_json(args.out / "gate.json", figures)
    print(f"control success {success:.3f}; {'passed' if figures['passed'] else 'FAILED'}")
    sys.exit(not figures["passed"])


if __name__ == "__main__":
    main()
