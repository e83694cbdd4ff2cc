"""The model: networks, what they compute, and the directory that keeps them. It knows no cluster.

Only torch is needed to compute, and only :mod:`~cvae_dist.model.files` does without it.
"""
