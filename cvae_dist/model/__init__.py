"""The model: networks, what they compute, and the directory that keeps them. It knows no cluster.

Importing this package imports nothing, as :mod:`~cvae_dist.model.files` does without torch. All else here needs it.
"""
