"""The face for Python: one class with the reference's words and scikit-learn's words.

``compression_vae`` holds the constructor and the training, ``fitted`` the trained model and where it lies,
``inference`` rows to latents and back (``lazy``: Dask and xarray), ``generation`` and ``scoring`` what only a
generative model can do, ``pictures`` and ``exporting`` what is written; ``rows`` and ``reference`` say what is
accepted.
"""

from cvae_dist.estimator.compression_vae import CompressionVAE
from cvae_dist.estimator.fitted import ModelNotTrained

__all__ = ["CompressionVAE", "ModelNotTrained"]
