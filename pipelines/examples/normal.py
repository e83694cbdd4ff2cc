"""A distribution learned from 100 numbers, N(100, 10), and 15,000 new ones drawn from it.

Run it with: python pipelines/examples/normal.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

import cvae_dist as cvae

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture")
arguments = parser.parse_args()

numbers = np.random.default_rng(0).normal(100, 10, size=(100, 1))
embedder = cvae.CompressionVAE(numbers, dim_latent=1).train()
draws = embedder.sample(15_000, random_state=0)
print(f"   100 numbers: mean {numbers.mean():.2f}, std {numbers.std():.2f}")
print(f"15,000 draws:   mean {draws.mean():.2f}, std {draws.std():.2f}")

figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
axes.hist(draws[:, 0], bins=60, density=True, color="#a9c0e4", label="15,000 draws")
x = np.linspace(55, 145, 300)
axes.plot(x, norm.pdf(x, 100, 10), color="0.2", linestyle="--", label="N(100, 10), their source")
axes.plot(numbers[:, 0], np.full(100, -0.001), "|", color="#a50000", markersize=10, label="the 100 numbers")
axes.set(xlabel="value", ylabel="density", title="A distribution learned from 100 numbers", ylim=(-0.002, 0.056))
axes.legend(loc="upper center", ncols=3, frameon=False)
arguments.out.mkdir(parents=True, exist_ok=True)
figure.savefig(arguments.out / "normal.png", dpi=120)
