"""The support matrix of the docs, made from the outcomes of the tests by pytest's option `--matrix FILE`."""

from pathlib import Path

from tests.families.base import Variant, architecture

DOCUMENT = Path(__file__).parents[1] / "docs" / "support_matrix.md"
COLUMNS = {  # title: the tests that must all pass, by the beginning of their names
    "velocity is the pipeline's": ("test_velocity_is_what", "test_one_step_of", "test_latents_have"),
    "teacher exact": ("test_teacher_is_the_base", "test_teacher_of_a_part", "test_fresh_student"),
    "gradients": ("test_gradients_reach", "test_base_weights_never"),
    "text": ("test_text_padding", "test_text_matters"),
    "two sizes": ("test_two_resolutions",),
    "prepare and train": ("test_one_training_step", "test_a_record_survives"),
    "original single file": ("test_an_original_single_file",),
    "samples": ("test_samples_of_base",),
    "LoRA for diffusers, PEFT": ("test_peft_and_diffusers_load_their",),
    "LoRA for ComfyUI": ("test_comfyui_puts", "test_comfyui_on"),
    "LoRA for kohya's tools": ("test_kohyas_tools_put", "test_kohyas_tools_on"),
    "these read by diffusers": ("test_diffusers_importer_gives",),
    "merge": ("test_every_variant_merges",),
}
HEAD = """# What works for which variant

Made from the outcomes of the tests, on tiny random models of the real classes, on the CPU:

```
python -m pytest -n 2 -m "not gpu" tests/models/test_contract.py tests/lora/test_formats.py \\
  tests/lora/test_export.py --matrix docs/support_matrix.md
```

**yes** means that all tests of the column pass. *Text*: `neutral` is padded and masked without effect, `fixed` is
brought to one length, and longer text is cut by the encoder as the pipeline does it. *Prepare and train*: `clips` needs
clips of more than one latent frame, since the model sees the first. *Original single file*: `no` where diffusers has no
loader for it; the run says so. *LoRA for ComfyUI* and *for kohya's tools*: by the rules of these programs, written down
in `tests/comfy_reference.py`. *These read by diffusers*: at least one of the two, by an importer of its pipelines, with
the same output.

"""


def cell(title: str, variant: Variant, outcomes: dict[str, list[str]]) -> str:
    """What a cell says: the outcomes of its tests, or what kind of yes it is."""
    found = {test: o for test, o in outcomes.items() if test.startswith(COLUMNS[title])}
    everything = [outcome for listed in found.values() for outcome in listed]
    if not everything:
        return "no" if title == "these read by diffusers" and outcomes else "not run"
    if "failed" in everything:
        return "**fails**"
    if title == "text":
        return "fixed" if variant.fixed_text else "neutral"
    if title == "original single file":
        return "yes" if variant.single_file else "no"
    if title == "prepare and train":
        arch = architecture(variant, Path("nowhere"))
        return "clips" if arch.least_frames > 1 and not arch.latents.layered else "yes"
    return "yes" if "passed" in everything else "not run"


def table(variants: list[Variant], outcomes: dict[str, dict[str, list[str]]]) -> str:
    """The document."""
    rows = [["variant", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for variant in variants:
        rows.append([variant.name, *(cell(title, variant, outcomes.get(variant.name, {})) for title in COLUMNS)])
    return HEAD + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
