"""The images that the figures are measured on, as uint8 rows of 784 pixels."""

import functools
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MNIST = Path(__file__).parents[4] / "shared" / "data" / "mnist.npz"
_FASHION = Path("/usr/share/datasets/fashion-mnist")  # the Debian package dataset-fashion-mnist
_IDX_IMAGES_HEADER = 16  # bytes: magic number, count, height, width

Images = NDArray[np.uint8]


class Mnist(NamedTuple):
    """60,000 images to train on and 10,000 to score, with their digits."""

    train: Images
    test: Images
    train_labels: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


@functools.cache
def mnist() -> Mnist:
    with np.load(_MNIST) as file:
        images = (file[name].reshape(-1, 784) for name in ("x_train", "x_test"))
        return Mnist(*images, file["y_train"], file["y_test"])


def fashion() -> tuple[Images, Images]:
    """Return Fashion-MNIST's training and test images; a FileNotFoundError names the package that holds them."""
    if not _FASHION.exists():
        raise FileNotFoundError(f"{_FASHION} is missing: install the Debian package dataset-fashion-mnist")
    return _idx("train-images-idx3-ubyte.gz"), _idx("t10k-images-idx3-ubyte.gz")


def _idx(name: str) -> Images:
    with gzip.open(_FASHION / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=_IDX_IMAGES_HEADER).reshape(-1, 784)
