"""Write scikit-learn's 1,797 handwritten digits (8x8 scans, values 0..16) as one .npy file per image.

    python pipelines/write_digits.py demo/digits      ->  demo/digits/<class>/<nnnn>.npy

The tree is written beside its final name and renamed at the end: it is there as a whole or not at all,
and a tree that is there is left alone.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def write_digits(tree: Path) -> int:
    """Write the tree unless it is there; return the number of files written."""
    if tree.exists():
        return 0
    digits = load_digits()
    unfinished = tree.with_name(f".{tree.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = unfinished / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:04d}.npy", image.astype(np.uint8))
    unfinished.rename(tree)
    return len(digits.images)


if __name__ == "__main__":
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/digits")
    written = write_digits(tree)
    print(f"{tree}: {written:,} images written" if written else f"{tree}: already there")
