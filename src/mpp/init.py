"""`python -m mpp.init`: write a job file."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

from mpp import cli
from mpp.job_file import AUTO, KEYS
from mpp.run import call

HELP = """python -m mpp.init model=MODEL images=photos masks=masks

Writes a short job file, photos.yaml here, which the other commands take as their first word:

  python -m mpp.run photos.yaml        prepare, report and train, one after the other

model=   a model of docs/families.md        images=  a folder of images and videos
masks=   a folder of masks, or auto         output=  where the LoRA goes; its last word names the file
loss= lora= optimizer= schedule= captions= cache= resolution= steps= batch= lr= rank= samples=
         the other keys of the file

masks=auto makes masks of the main object of each image, in masks/NAME, and the file names that folder.
It never overwrites a file, nor a mask. docs/job.md says more.
"""
_FILE = """\
# python -m mpp.run {file}    prepare, report and train; mpp.prepare, mpp.report, mpp.train, mpp.sample and mpp.export
# take this file too, settings behind it win, and --show says what it stands for. A text with `: ` or ` #` needs quotes.
{model}  # docs/families.md
{loss}  # what is learned and preserved: docs/loss_settings.md
{lora}{optimizer}{schedule}
data:
  {images}  # NAME.txt beside an image is its caption
  {masks}  # white is learned, black preserved{made}
{captions}  {cache}  # what prepare makes of them
  {resolution}  # side of a square image in pixels

train:
  {steps}
  {batch}
  {lr}  # leave it out for the optimizer's own, as with optimizer: prodigy
  {rank}

{samples}  # a list of prompts, or a file: docs/prompts.md
#  - a photo of ohwx in a park, at dusk --w 768 --h 512

{output}  # LoRA, checkpoints, logs

set:  # anything else by its full name, as --help of the commands lists them
#  model.pretrained: /models/folder
"""
_PLAIN = re.compile(r"(?!(null|true|false)$)[a-z_/.~]*[a-z][\w/. -]*\b", re.ASCII | re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_THERE = "{file} is there and stays as it is; choose another name with output=outputs/NAME"
_OPTIONAL = ("lora", "optimizer", "schedule", "captions")  # whose lines are there where they are said


def job_text(file: str, said: dict[str, str], made: str = "") -> str:
    """A job file's text.

    Args:
        file: Its name.
        said: By a key's last word what is typed for it.
        made: The command that made the masks, if one did.
    """
    lines = {"made": f"\n  # missing ones make: {_UNPRINTABLE.sub('?', made)}" if made else ""}
    for key in KEYS:
        name = key.rpartition(".")[2]
        line = f"{name}: {_yaml(said[name], KEYS[key].kind)}" if said.get(name) else f"{name}:"
        indent = "  " if name == "captions" else ""
        lines[name] = line if name not in _OPTIONAL else f"{indent}{line}\n" if said.get(name) else ""
    return _FILE.format(file=file, **lines)


def _yaml(text: str, kind: str) -> str:
    """A text as YAML has it: plain where it is plain, else in quotes."""
    if "number" in kind or _PLAIN.fullmatch(text):
        return text
    return _UNPRINTABLE.sub(lambda at: f"\\u{ord(at[0]):04x}", json.dumps(text, ensure_ascii=False))


def write(words: list[str]) -> str:
    """Write the job file that words ask for.

    Returns:
        Its path.

    Raises:
        ValueError: As `_said`, the file is there, or masks that it asks for could not be made.
        OSError: It cannot be written.
    """
    said, made = _said(words), ""
    name = Path(said.get("output") or os.path.abspath(said["images"])).name
    said.setdefault("output", f"outputs/{name}")
    said.setdefault("cache", f"cache/{name}")
    file = f"{name}.yaml"
    if os.path.lexists(file):
        raise ValueError(_THERE.format(file=file))
    if said.get("masks") == AUTO:
        said["masks"] = f"masks/{name}"
        made = make_masks(said["images"], said["masks"])
        if not os.path.isdir(said["masks"]):  # all images have masks beside them
            said["masks"] = ""
    try:
        with open(file, "x", encoding="utf-8") as handle:
            handle.write(job_text(_UNPRINTABLE.sub("?", shlex.quote(file)), said, made))
    except FileExistsError:
        raise ValueError(_THERE.format(file=file)) from None
    return file


def _said(words: list[str]) -> dict[str, str]:
    """What words say, by a key's last word, and what goes without saying.

    Raises:
        ValueError: A word is none of a job file's keys, or the model or the images are missing.
    """
    known = [key.rpartition(".")[2] for key in KEYS]
    said = {"loss": "threshold", "resolution": "512", "steps": "1000", "batch": "1", "lr": "1e-4", "rank": "16"}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{word} is not understood; type KEY=VALUE with one of {', '.join(known)}")
        kind = next(held.kind for key, held in KEYS.items() if key.rpartition(".")[2] == name)
        if "number" in kind and not re.fullmatch(r"\d+" if kind == "whole number" else r"[\d.]+(e-?\d+)?", value):
            raise ValueError(f"{name} must be a {kind}, got {value!r}")
        said[name] = value
    for name, example in (("model", "MODEL"), ("images", "photos")):
        if not said.get(name):
            raise ValueError(f"{name}=... is missing, as in {name}={example}")
    from mpp.config import CONFIG_DIR
    from mpp.messages import no_option

    for group in ("model", "loss", "lora", "optimizer", "schedule"):
        options = sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))
        if said.get(group) and said[group] not in options:
            raise ValueError(no_option(group, said[group], options))
    if "://" not in said["images"] and not Path(said["images"]).expanduser().is_dir():
        raise ValueError(f"images={said['images']} is not a folder; give the folder where the images are")
    return said


def make_masks(images: str, folder: str) -> str:
    """Make masks of the main object of each image, in a process of its own; what is in the folder stays as it is.

    Args:
        images: Folder of images and videos.
        folder: For the masks.

    Returns:
        The command that does it.

    Raises:
        ValueError: It could not do all of it, and has said why.
    """
    if Path(folder).resolve().is_relative_to(Path(images).expanduser().resolve()):
        raise ValueError(
            f"masks={AUTO} writes {folder}, which would lie in images={images}; start it from the folder above, with "
            f"images={Path(images).expanduser().resolve().name}"
        )
    words = ["tool=salient", f"input={images}", f"output={folder}", "keep=true"]
    print(f"making the masks of {images} in {folder}, about a second for each image ...", flush=True)
    if call("masks", words):
        raise ValueError("not all masks could be made, so no job file was written; what is done is kept")
    return " ".join(["python -m mpp.masks", *map(shlex.quote, words)])


def main() -> None:
    """Command line entry."""
    words = cli.words_or_help(HELP)
    try:
        file = write(words)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if f"masks={AUTO}" in words:
        print("the report will show the masks: correct those that are wrong in any image editor")
    print(f"wrote {file}; look through it, then: python -m mpp.run {shlex.quote(file)}")


if __name__ == "__main__":
    main()
