"""The images of the examples: MNIST from a file, or scikit-learn's 8 x 8 digits, which need none."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load_images(mnist: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images and labels to train on, then those to test; ``mnist`` is Keras's mnist.npz."""
    if mnist is None:
        digits = load_digits()
        x_train, x_test, y_train, y_test = train_test_split(digits.images, digits.target, test_size=300, random_state=0)
        return x_train, y_train, x_test, y_test
    with np.load(mnist) as file:
        return file["x_train"], file["y_train"], file["x_test"], file["y_test"]
