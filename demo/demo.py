"""The main job on the demo photos: prepare, train with and without the prior, and say what came out.

Usage: ``python demo/demo.py OUT_DIR``

Everything runs through the same two commands that users run; an earlier demo in OUT_DIR is replaced.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from photos import write_photos
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MASKS = Path(__file__).resolve().parent / "masks"
STEPS = 50
SHOWN = ("loss", "target_loss", "prior_loss", "drift")


def call(module: str, *arguments: str) -> None:
    """Run `python -m module` and stop with its exit code if it fails."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def train(out: Path, cache: Path, preset: str) -> dict[str, tuple[float, float]]:
    """One run; returns the validation figures before and after."""
    folder = out / preset
    call(
        "mpp.train",
        "model=tiny_wan",
        f"model.pretrained.folder={out / 'tiny_wan'}",
        f"loss={preset}",
        f"data.cache_dir={cache}",
        f"output_dir={folder}",
        "data.batch_size=4",
        "data.num_workers=0",
        "data.val_fraction=0.25",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "optimizer.lr=2e-3",
        "memory.activations=keep",
    )
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    known = events.Tags()["scalars"]
    values = {
        name: [event.value for event in events.Scalars(f"val/{name}")] for name in SHOWN if f"val/{name}" in known
    }
    return {name: (series[0], series[-1]) for name, series in values.items()}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Prepare the demo photos and train a tiny LoRA on them.")
    parser.add_argument("out_dir", type=Path, help="folder for photos, cache and runs")
    out = parser.parse_args().out_dir
    shutil.rmtree(out, ignore_errors=True)
    write_photos(out / "photos")
    cache = out / "cache"
    call(
        "mpp.prepare",
        "model=tiny_wan",
        f"model.pretrained.folder={out / 'tiny_wan'}",
        f"data.image_dir={out / 'photos'}",
        f"data.mask_dir={MASKS}",
        f"data.cache_dir={cache}",
        "data.resolution=256",
        "data.flip=true",
        "device=cpu",
    )
    call("mpp.report", f"data.cache_dir={cache}", "loss=threshold", f"output={out / 'report.html'}")
    results = {preset: train(out, cache, preset) for preset in ("threshold", "masked")}
    print(f"\nValidation on the held-out photo, before -> after {STEPS} steps:")
    for preset, values in results.items():
        figures = ", ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in values.items())
        print(f"  loss={preset:<10} {figures}")
    print(
        "The prior keeps the outside near the base model (drift); the tiny model is random, so no image would look "
        "like anything yet."
    )
    run = out / "threshold"
    print(f"LoRA (diffusers format):  {run / 'lora.safetensors'}")
    print(f"TensorBoard logs:         tensorboard --logdir {out}")
    print(f"Report of the data:       {out / 'report.html'}  (open it in a browser)")
    print(f"Image to look at:       {run / 'regions.png'}  (photo, regions, mask, what is learned, what is preserved)")


if __name__ == "__main__":
    main()
