"""The phantom limb in a few minutes: `python -m benchmarks.phantom_limb.demo OUT_DIR`, or `make demo`.

Makes a fine-tune set, trains one adapter on its masks alone and one with the prior by the commands that users run,
loads both files into the base model with diffusers' own loader, and writes one image with base and both side by side.
An earlier demo in OUT_DIR is replaced.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.phantom_limb.fine_tune_sets import generate, make_data, prompts_of
from benchmarks.phantom_limb.proof import side_by_side, table
from benchmarks.phantom_limb.sampling import toy
from benchmarks.phantom_limb.study import (
    BASE,
    KEPT,
    Job,
    damage,
    generated,
    jobs,
    protocol,
)
from benchmarks.phantom_limb.world import SUBJECTS

SUBJECT = "zarp"
SHOWN = {
    "success": ("whole subject", 2),
    "phantom": ("phantom px", 4),
    "background": ("background distance", 4),
    "other_distance": ("other prompts' distance", 3),
}


def train(job: Job, folder: Path) -> None:
    """`python -m mpp.train` as the protocol has it."""
    arguments = [
        "experiment=phantom_limb",
        f"model.pretrained={BASE}",
        f"data.cache_dir={job.cache}",
        f"output_dir={folder}",
        "export.formats=[]",  # no other program has the toy model
        f"trainer.max_steps={job.steps}",
        *job.settings,
    ]
    print(f"\n$ python -m mpp.train {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "mpp.train", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def adapted(file: Path | None) -> dict[str, Tensor]:
    """Images of the protocol's prompts by the base, with a LoRA file or without."""
    architecture = toy(pretrained=str(BASE))
    transformer = architecture.load_transformer()
    if file is not None:
        transformer.load_lora_adapter(str(file), prefix="transformer")
    return generate(architecture, transformer, SUBJECT, protocol())


def judge(variant: str, images: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, float | str]:
    """The protocol's measures of a variant's images."""
    rules, subject = protocol(), SUBJECTS[SUBJECT]
    values = generated(images["subject"], base["subject"], subject, SUBJECT, rules)
    values |= damage(images["others"], base["others"], prompts_of(SUBJECT, rules)["others"], subject)
    return {"variant": variant, **values}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="folder for images, cache and runs")
    rules = protocol()
    parser.add_argument("--variants", nargs="+", default=["masked", "threshold_w1"], choices=list(rules.main.variants))
    args = parser.parse_args()
    out = args.out_dir.resolve()
    chosen = {name: rules.main.variants[name] for name in args.variants}
    for folder in ("data", *chosen):
        shutil.rmtree(out / folder, ignore_errors=True)
    print(f"Fine-tune set: {rules.images} images of the subject, always beside one bystander on one background.")
    make_data(out / "data" / SUBJECT, SUBJECT, BASE, rules, rules.main.halo, pasted=False)
    generated_by = {"base": adapted(None)}
    for job in jobs(rules, out / "data", chosen, [0]):
        if job.subject == SUBJECT:
            train(job, out / job.variant)
            generated_by[job.variant] = adapted(out / job.variant / "lora.safetensors")
    rows = [judge(variant, images, generated_by["base"]) for variant, images in generated_by.items()]
    columns = {name: torch.cat([p["subject"][:KEPT], p["others"][:KEPT]]) for name, p in generated_by.items()}
    side_by_side(columns, prompts_of(SUBJECT, rules)).save(out / "phantom_limb.png")
    print(f"\n{rules.prompts} images each, prompted with the trigger word on named backgrounds:\n")
    print(table(rows, SHOWN))
    print(f"Image to look at:       {out / 'phantom_limb.png'}  (the last two rows are prompts without the subject)")
    print(f"LoRA (diffusers format):  {out / args.variants[-1] / 'lora.safetensors'}")
    print(f"Regions of the masks:     {out / args.variants[-1] / 'regions.png'}")


if __name__ == "__main__":
    main()
