"""What the figures are measured on: images, as uint8 rows of 784 pixels, and vectors of text."""

import functools
import gzip
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from sklearn.random_projection import GaussianRandomProjection

_MNIST = Path(__file__).parents[4] / "shared" / "data" / "mnist.npz"
_FASHION = Path("/usr/share/datasets/fashion-mnist")  # the Debian package dataset-fashion-mnist
_IDX_IMAGES_HEADER = 16  # bytes: magic number, count, height, width

_PACKAGES = ("torch", "sympy", "scipy", "sklearn", "networkx", "matplotlib")  # of which the texts are the docstrings
_QUOTED = re.compile(r'"""(.+?)"""', re.DOTALL)
_SHORTEST = 60  # characters
_CLASSES, _TEXTS, _FEATURES = 20, 20_000, 384

Images = NDArray[np.uint8]
Vectors = NDArray[np.float32]


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


class Text(NamedTuple):
    """At most 20,000 unit vectors of 384 features from text, and their classes, of which there are 20."""

    vectors: Vectors
    classes: NDArray[np.int64]


@functools.cache
def text(longest: int = 1000, *, projected: bool = False) -> Text:
    """Return latent semantic analysis (Deerwester et al. 1990) of docstrings of installed packages.

    No more than the ``longest`` first characters are read. Short texts have fewer words, so that a nonlinear embedding
    finds more in them that PCA does not. The class is the subpackage of a docstring, which is noisy.

    With ``projected``, random projections take the place of the analysis. All directions then weigh alike, so that
    latents of fewer dimensions lose much of what the vectors know about the classes.
    """
    texts, classes = _docstrings()
    weighted = TfidfVectorizer(sublinear_tf=True, min_df=3, max_features=30_000).fit_transform(
        words[:longest] for words in texts
    )
    known = np.diff(weighted.indptr) > 0  # texts of rare words alone have no direction
    reduction = (GaussianRandomProjection if projected else TruncatedSVD)(_FEATURES, random_state=0)
    vectors = reduction.fit_transform(weighted[known].astype(np.float32))
    return Text(normalize(vectors), classes[known])


def _docstrings() -> tuple[list[str], NDArray[np.int64]]:
    """Return docstrings, in a random order, and the classes of the subpackages that have most of them."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        root = Path(find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            subpackage = "/".join(path.relative_to(root.parent).parts[:2])
            for quoted in _QUOTED.findall(path.read_text(errors="ignore")):
                if len(quoted) > _SHORTEST:
                    found.setdefault(quoted.strip(), subpackage)
    largest = {name: index for index, (name, _) in enumerate(Counter(found.values()).most_common(_CLASSES))}
    kept = [(words, largest[name]) for words, name in found.items() if name in largest]
    order = np.random.default_rng(0).permutation(len(kept))[:_TEXTS]
    return [kept[index][0] for index in order], np.array([kept[index][1] for index in order])
