"""A curve in the plane found again from 300 of its points: one latent dimension, the place along the curve.

Run it with: python pipelines/examples/s_curve.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr
from sklearn.datasets import make_s_curve

import cvae_dist as cvae


def s_curve(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (n, 2) in the unit square and how far along the curve each one lies."""
    points, along = make_s_curve(n, random_state=seed)
    return (points[:, [0, 2]] - [-1, -2]) / [2, 4], along


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture")
arguments = parser.parse_args()

points, _ = s_curve(300, seed=0)
embedder = cvae.CompressionVAE(points, dim_latent=1).train()

fresh, along = s_curve(1000, seed=1)
z = embedder.embed(fresh)
error = np.mean((embedder.decode(z) - fresh) ** 2)
correlation = abs(spearmanr(z[:, 0], along).statistic)
print(f"1,000 fresh points: mean squared error {error:.2g} (variance {fresh.var(axis=0).mean():.3f})")
print(f"rank correlation of z with the place along the curve {correlation:.5f}")

z = embedder.embed(points)[:, 0]
curve = embedder.decode(np.linspace(z.min(), z.max(), 500)[:, None])
figure, axes = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
axes.plot(*curve.T, color="0.5", linewidth=1, label="decoded from z alone")
dots = axes.scatter(*points.T, c=z, s=18, label="the 300 points")
figure.colorbar(dots, label="z")
axes.set(xlabel="x1", ylabel="x2", title="A curve in the plane, one latent dimension", aspect="equal")
axes.legend(loc=(0.3, 0.68), frameon=False)
arguments.out.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out / "s_curve.png", dpi=120)
