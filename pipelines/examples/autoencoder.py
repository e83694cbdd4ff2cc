"""A plain autoencoder of handwritten digits, without a KL term: two numbers for every image, and back.

Run it with: python pipelines/examples/autoencoder.py --mnist mnist.npz
"""

import argparse
from pathlib import Path

from images import load_images

import cvae_dist as cvae

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mnist", help="Keras's mnist.npz; by default scikit-learn's small digits")
parser.add_argument("--epochs", type=int, default=30, help="passes over the images")
parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
arguments = parser.parse_args()
x_train, _, x_test, y_test = load_images(arguments.mnist)

embedder = cvae.CompressionVAE(
    x_train, dim_latent=2, kl_weight=0, loss="bce", cells_encoder=[128, 128], batch_size=128, learning_rate=3e-3,
    num_steps=arguments.epochs * len(x_train) // 128,
)  # fmt: skip
embedder.train()
print(f"test: cross-entropy {embedder.diagnose(x_test).distortion / x_test[0].size:.4f} nats per pixel")

arguments.out.mkdir(parents=True, exist_ok=True)
figure = embedder.visualize(embedder.embed(x_test), labels=y_test)
figure.savefig(arguments.out / "autoencoder-latents.png", dpi=90)
embedder.visualize_reconstructions(x_test, labels=y_test, filename=arguments.out / "autoencoder-reconstructions.png")
