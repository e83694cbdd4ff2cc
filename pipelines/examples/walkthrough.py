"""Everything once, on handwritten digits: train, embed, look, reconstruct, interpolate, restore.

Run it with: python pipelines/examples/walkthrough.py --mnist mnist.npz
"""

import argparse
from pathlib import Path

import numpy as np
from images import load_images

import cvae_dist as cvae

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mnist", help="Keras's mnist.npz; by default scikit-learn's small digits")
parser.add_argument("--num-steps", type=int, help="gradient steps; by default chosen from the data")
parser.add_argument("--out", type=Path, default=Path("walkthrough"), help="folder of the model and the pictures")
arguments = parser.parse_args()
out = arguments.out
x_train, y_train, x_test, y_test = load_images(arguments.mnist)

# Images go in as they are. With a logdir the model is kept: run this again, and nothing is trained twice.
embedder = cvae.CompressionVAE(x_train, dim_latent=2, logdir=out / "model", num_steps=arguments.num_steps)
embedder.train()
print(embedder.diagnose(x_test))

# Two numbers for every image, also for those it has never seen.
z = embedder.embed(x_test)
figure = embedder.visualize(z, labels=y_test)
figure.savefig(out / "walkthrough-latents.png", dpi=90)

# And back again.
embedder.visualize_reconstructions(x_test, labels=y_test, filename=out / "walkthrough-reconstructions.png")
embedder.visualize_latent_grid(grid_size=10, figsize=(5.5, 4.8), filename=out / "walkthrough-grid.png")

# What lies between two latents is an image as well. First and last in each line: the images themselves.
lines = []
for first, last in [(0, 6), (4, 9), (1, 7)]:
    a, b = (x_test[y_test == digit][0] for digit in (first, last))
    lines += [a[None], embedder.interpolate(a, b, n=8), b[None]]
embedder.visualize_rows(np.concatenate(lines), n_columns=10, filename=out / "walkthrough-interpolation.png")

# Later, elsewhere, without the data: the folder of the model is all it takes.
restored = cvae.CompressionVAE(logdir=out / "model")
assert np.array_equal(restored.embed(x_test), z)
print(f"restored from {out / 'model'}: the same latents, bit for bit")
