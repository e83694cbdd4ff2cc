"""What a trained model makes of rows: which latent dimensions it uses, at what rate, and what it reconstructs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvae_dist.model import sampling
from cvae_dist.model.tiling import Rows
from cvae_dist.model.vae import VAE

Vector = npt.NDArray[np.float64]

ACTIVE_VARIANCE = 0.01  # Burda et al. 2015, arXiv:1509.00519, section 5
_DRAWS = 4
_WORST = 5


@dataclass(frozen=True)
class Diagnosis:
    """Figures of a model. Printed, they explain themselves.

    Attributes
    ----------
    n_rows : int
        Rows they were taken from.
    kl_per_dimension : (dim_latent,) float64 array
        Mean divergence of the posterior from the prior, in nats. With a flow it is that of the Gaussian before it.
    latent_variance : (dim_latent,) float64 array
        Variance of the latents over the rows. A dimension is active above 0.01.
    rate, distortion : float
        Mean KL and mean -log p(x | z), in nats per row. Their sum is the negative ELBO. The density is one over the
        data's units, so the distortion may be negative.
    squared_error : (n_features,) float64 array
        Mean squared error of the reconstruction, in squared units of the data.
    explained : (n_features,) float64 array
        Share of a feature's variance that the reconstruction explains; NaN for a feature that does not vary.
    feature_names : sequence of str, optional
        Names of the features, where they have some.
    """

    n_rows: int
    kl_per_dimension: Vector
    latent_variance: Vector
    rate: float
    distortion: float
    squared_error: Vector
    explained: Vector
    feature_names: Sequence[str] | None = None

    @property
    def active_units(self) -> int:
        """How many latent dimensions tell rows apart."""
        return int(np.count_nonzero(self.latent_variance > ACTIVE_VARIANCE))

    def __str__(self) -> str:
        dims, varying = len(self.latent_variance), np.flatnonzero(np.isfinite(self.explained))
        lines = [
            f"{self.n_rows:,} rows",
            f"active units     {self.active_units} of {dims} latent dimensions",
            f"rate             {self.rate:.4g} nats per row (KL to the prior)",
            f"distortion       {self.distortion:.4g} nats per row (-log p(x | z))",
            f"negative ELBO    {self.rate + self.distortion:.4g} nats per row",
            "KL by dimension  " + " ".join(f"{value:.2f}" for value in self.kl_per_dimension),
        ]
        if varying.size:
            worst = varying[np.argsort(self.explained[varying])[:_WORST]]
            names = range(len(self.explained)) if self.feature_names is None else self.feature_names
            named = ", ".join(f"{names[index]} ({_share(self.explained[index])})" for index in worst)
            lines.append(f"explained        {np.median(self.explained[varying]):.0%} of a feature's variance (median)")
            lines.append(f"worst features   {named}")
        return "\n".join(lines)


def _share(explained: float) -> str:
    """Return a share as text. For a feature that hardly varies it can be minus thousands."""
    return f"{explained:.0%}" if explained >= -1 else "below -100%"


def diagnose(vae: VAE, rows: Rows, feature_names: Sequence[str] | None = None) -> Diagnosis:
    """Return the figures of a model on rows (n, n_features) in data units; n >= 1."""
    mean, logvar = (moment.astype(np.float64) for moment in sampling.posterior_moments(vae, rows))
    random = np.random.RandomState(0)
    # Every row has draws of its own: common ones, as scores have them, would err alike in all rows and in their mean.
    draws = (sampling.standard_normal(len(rows), vae.dim_latent, random) for _ in range(_DRAWS))
    terms = np.array([vae.score_rows(rows, noise) for noise in draws], dtype=np.float64)
    reconstruction, kl = terms.mean(axis=(0, 2)).tolist()
    latents = vae.embed_rows(rows)
    squared_error, explained = _reconstruction(rows, vae.decode_rows(latents))
    return Diagnosis(
        n_rows=len(rows),
        kl_per_dimension=(0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).mean(axis=0),
        latent_variance=latents.astype(np.float64).var(axis=0),
        rate=kl,
        distortion=reconstruction + vae.likelihood.log_volume,
        squared_error=squared_error,
        explained=explained,
        feature_names=feature_names,
    )


def _reconstruction(rows: Rows, decoded: Rows) -> tuple[Vector, Vector]:
    wide = rows.astype(np.float64)
    squared_error = np.square(wide - decoded.astype(np.float64)).mean(axis=0)
    varies = wide.max(axis=0) > wide.min(axis=0)
    explained = np.full(wide.shape[1], np.nan)
    explained[varies] = 1 - squared_error[varies] / wide.var(axis=0)[varies]
    return squared_error, explained
