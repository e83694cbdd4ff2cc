"""The face for Python: one class with the reference's words and scikit-learn's words.

``compression_vae`` holds the constructor and the training, ``fitted`` what a trained estimator does, by means of
``generation`` and ``pictures``. ``inputs`` says what X may be: numbers in memory (``arrays``), Dask and
xarray (``lazy``), files and stores. ``saved`` is the model directory, ``reference`` the arguments of the reference.
"""

from cvae_dist.estimator.compression_vae import CompressionVAE
from cvae_dist.estimator.saved import ModelNotTrained

__all__ = ["CompressionVAE", "ModelNotTrained"]
