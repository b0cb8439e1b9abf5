"""The long description that a package index shows: the README, without what only shows beside the files.

An index has no files of the repository, so images and links to them would be broken there.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_NOTE = "*Files that are named here, pages of docs/ and images among them, are in the source archive.*"


def long_description(readme: str) -> str:
    """The README with names in place of images and of links to files.

    Args:
        readme: Its Markdown.
    """
    local = r"\]\((?!https?:|#|mailto:)([^)\s]+)\)"
    text = re.sub(rf"!\[([^]]*){local}", r"*Image: \2 (\1)*", readme)
    text = re.sub(rf"\[([^]]*){local}", lambda at: at[1] if at[1] == at[2] else f"{at[1]} ({at[2]})", text)
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{_NOTE}\n{rest}"


class LongDescription(MetadataHookInterface):
    """Puts it into the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the readme, which `pyproject.toml` calls dynamic."""
        text = long_description((Path(self.root) / "README.md").read_text("utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
