"""Rows from anywhere, read only: a source lists its pieces without reading their rows."""

from cvae_dist.sources.npy import NpyTree, Pieces

__all__ = ["NpyTree", "Pieces"]
