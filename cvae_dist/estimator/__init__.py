"""The face for Python: one class with the reference's words and scikit-learn's words.

``compression_vae`` holds the constructor and the training, ``fitted`` what a trained model does, with ``generation``,
``scoring`` and ``pictures`` behind it. ``inputs`` says what X may be (``arrays``: numbers in memory, ``lazy``: Dask
and xarray), ``saved`` what lies in the model directory, ``reference`` what becomes of the reference's arguments.
"""

from cvae_dist.estimator.compression_vae import CompressionVAE
from cvae_dist.estimator.saved import ModelNotTrained

__all__ = ["CompressionVAE", "ModelNotTrained"]
