"""Write the demo photos and their captions to a folder.

Usage: ``python demo/photos.py OUT_DIR``

The photos are public-domain images that ship inside the scikit-image wheel,
so nothing is downloaded. Running the script again rewrites the same files.
"""

import argparse
import shutil
import sys
from pathlib import Path

CAPTIONS = Path(__file__).resolve().parent / "captions"
NAMES = ("astronaut", "cat", "coffee", "rocket")


def write_photos(out_dir: Path) -> list[Path]:
    """Write every demo photo, with its caption beside it.

    Args:
        out_dir: Folder to write to; created if it does not exist.

    Returns:
        The paths of the photos written.

    Raises:
        SystemExit: If scikit-image is not installed.
    """
    try:
        from PIL import Image
        from skimage import data
    except ImportError:
        sys.exit("The demo photos need scikit-image: pip install -e '.[demo]'")

    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name in NAMES:
        photo = out_dir / f"{name}.png"
        Image.fromarray(getattr(data, name)()).save(photo)
        shutil.copyfile(CAPTIONS / f"{name}.txt", out_dir / f"{name}.txt")
        written.append(photo)
    return written


def main() -> None:
    """Parse the command line and write the photos."""
    parser = argparse.ArgumentParser(description="Write the demo photos and their captions.")
    parser.add_argument("out_dir", type=Path, help="folder to write NAME.png and NAME.txt to")
    for photo in write_photos(parser.parse_args().out_dir):
        print(photo)


if __name__ == "__main__":
    main()
