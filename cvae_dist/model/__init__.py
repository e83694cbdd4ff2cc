"""The model: pure torch, knows no data file and no cluster."""

from cvae_dist.model.directory import load_model, model_digest, save_model
from cvae_dist.model.vae import VAE

__all__ = ["VAE", "load_model", "model_digest", "save_model"]
