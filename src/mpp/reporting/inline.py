"""Pages in one file: a template with styles, scripts, data and images in it, that loads nothing."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from mpp.media.region_colours import HATCHING, LEARNED, PRESERVED

_PARTS = Path(__file__).parent / "page"
_COLOURS = f":root {{ --learn: rgb{LEARNED}; --keep: rgb{PRESERVED}; --hatching: rgb{HATCHING}; }}"
_QUALITY = 75


class Lines(list[str]):
    """Lines of a text block, referred to by their numbers; `size` is that of all of them in bytes."""

    size = 0

    def put(self, content: bytes) -> int:
        """Add a line; returns its number."""
        self.append(base64.b64encode(content).decode())
        self.size += len(self[-1])
        return len(self) - 1

    def put_image(self, image: Image.Image, side: int) -> int:
        """Add an image as JPEG, its longer side at most so many pixels; returns its number."""
        content = io.BytesIO()
        image = image.convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(content, "JPEG", quality=_QUALITY)
        return self.put(content.getvalue())


def filled(
    template: str, styles: Sequence[str], scripts: Sequence[str], data: dict[str, Any], **blocks: Sequence[str]
) -> str:
    """A template of `page/` with everything in it; nothing in the data can end its script element.

    Args:
        template: Its name.
        styles: Names of style sheets, after the colours of regions.
        scripts: Names of scripts.
        data: What the scripts read as `data`.
        blocks: Further text blocks by their names, line by line.
    """
    style = "\n".join([_COLOURS, *((_PARTS / name).read_text("utf-8") for name in styles)])
    script = '"use strict";\n' + "\n".join((_PARTS / name).read_text("utf-8") for name in scripts)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Template((_PARTS / template).read_text("utf-8")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=text,
        **{name: "\n".join(lines) for name, lines in blocks.items()},
    )


def _hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
