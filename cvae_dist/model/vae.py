"""The variational autoencoder: rows in data units to latents and back."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cvae_dist.config import ComputePrecision, Config, ModelConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.model import posterior, tiling
from cvae_dist.model.flow import choose_flow_length, make_flow, with_flow_widths
from cvae_dist.model.kernels import compute_dtype, inference
from cvae_dist.model.likelihood import choose_likelihood, make_likelihood
from cvae_dist.model.metric import Metric, Stretch, check_metric, mean_pullback, stretch_of
from cvae_dist.model.networks import Decoder, Encoder
from cvae_dist.model.scaling import Scaling, choose_normalization
from cvae_dist.model.tiling import BATCH_SIZE, Floats, Rows
from cvae_dist.store.moments import Moments

_OFTEN = 16  # tiles: for fewer, laying the weights out takes longer than it saves
_MAX_INPUT = 8.0  # in standardised units: what lies further out tells the encoder nothing new


def decide(
    config: Config, moments: Moments, dtype: str | np.dtype[np.generic], item_shape: tuple[int, ...]
) -> tuple[Config, tuple[str, ...]]:
    """Return the settings with all that follows from the statistics filled in, and the reasons."""
    normalization = choose_normalization(config.feature_normalization, moments, dtype, item_shape)
    likelihood = choose_likelihood(config.likelihood, moments)
    flow = choose_flow_length(config.iaf_flow_length, config.dim_latent, config.kl_weight, str(likelihood.value))
    choices = {"feature_normalization": normalization, "likelihood": likelihood, "iaf_flow_length": flow}
    decided = config.model_copy(update={name: choice.value for name, choice in choices.items()})
    return with_flow_widths(decided), tuple(choice.reason for choice in choices.values() if choice.reason)


class Terms(NamedTuple):
    """What a row adds to the objective.

    Attributes
    ----------
    reconstruction, kl : Tensor, shape (n,), float32
        -log p(x | z) in standardised units, and KL(q(z | x) || p(z)), in nats.
    latents : Tensor, shape (n, dim_latent), float32
        The draw z of which these are the terms.
    """

    reconstruction: Tensor
    kl: Tensor
    latents: Tensor

    @property
    def negative_elbo(self) -> Tensor:
        """Their sum per row, (n,), in nats."""
        return self.reconstruction + self.kl


class VAE(nn.Module):
    """A variational autoencoder (Kingma and Welling 2014) of rows of ``n_features`` values in data units.

    Parameters
    ----------
    config : ModelConfig
        Every automatic value must be decided: see :func:`decide` and ``TrainConfig.resolve``.
    scaling : Scaling
        Between data units and the networks' units.

    Attributes
    ----------
    stretch : Stretch or None
        What ``metric="data"`` makes of latents; see :meth:`measure_stretch`.
    """

    stretch: Stretch | None

    def __init__(self, config: ModelConfig, scaling: Scaling) -> None:
        super().__init__()
        cells, blocks = config.cells_encoder or (), config.residual_blocks or 0
        self.config = config
        self.scaling = scaling
        self.encoder = Encoder(scaling.n_features, cells, config.dim_latent, blocks)
        self.decoder = Decoder(config.dim_latent, cells[::-1], scaling.n_features, blocks)
        self.flow = make_flow(config, [scaling.n_features, *cells][-1])
        self.likelihood = make_likelihood(config.likelihood, scaling)
        self.register_module("stretch", None)  # until the model is trained

    @classmethod
    def of(cls, config: ModelConfig, moments: Moments, dtype: str | np.dtype[np.generic], seed: int = 0) -> Self:
        """Build an untrained model for data with these statistics; ``config`` comes from :func:`decide`."""
        own = ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})
        scaling = Scaling.of(moments, dtype, per_feature=bool(config.feature_normalization))
        vae = cls(with_flow_widths(own), scaling)
        vae.initialise(torch.Generator().manual_seed(seed))
        return vae

    def initialise(self, generator: torch.Generator) -> None:
        """Draw initial weights; nothing but ``generator`` decides them."""
        self.encoder.initialise(generator)
        self.decoder.initialise(generator, self.likelihood.initial_output())
        if self.flow is not None:
            self.flow.initialise(generator)

    @property
    def n_features(self) -> int:
        """Width of a row."""
        return self.scaling.n_features

    @property
    def dim_latent(self) -> int:
        """Width of a latent."""
        return self.config.dim_latent

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior before the flow.

        Each is (n, dim_latent), for rows (n, n_features) in data units.
        """
        return self.encoder.moments(self._hidden_of(x))

    def embed(self, x: Tensor) -> Tensor:
        """Return the latents, (n, dim_latent) float32, of rows (n, n_features) in data units.

        A latent is the mean of the posterior. With a flow, it is what the flow makes of the mean of its Gaussian.
        """
        return self._latents_of(self._hidden_of(x))

    def draws(self, x: Tensor, noises: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield one draw of the posterior of every row, (n, dim_latent), for each of ``noises``.

        Each of ``noises`` is standard normal, (n, dim_latent).
        """
        hidden = self._hidden_of(x)
        mean, logvar = self.encoder.moments(hidden)
        drawn = (posterior.draw(mean, logvar, noise) if self._is_variational else mean for noise in noises)
        return drawn if self.flow is None else self.flow.push_each(drawn, hidden)

    def decode(self, latent: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return rows in data units, (n, n_features): the mean row, or a draw where a generator is given."""
        output = self.decoder(latent)
        chosen = self.likelihood.mean(output) if generator is None else self.likelihood.draw(output, generator)
        return self.scaling.restore(chosen)

    def forward(self, x: Tensor, noise: Tensor) -> Terms:
        """Return the terms of the negative ELBO.

        Parameters
        ----------
        x : Tensor, shape (n, n_features)
            Rows in data units, any real dtype.
        noise : Tensor, shape (n, dim_latent), float32
            Standard normal; zeros give the terms at the posterior mean.
        """
        standardised = self.scaling(x)
        hidden = self._hidden(standardised)
        mean, logvar = self.encoder.moments(hidden)
        drawn = posterior.draw(mean, logvar, noise) if self._is_variational else mean
        latents, log_determinant = self._flow(drawn, hidden)
        reconstruction = self.likelihood.negative_log_likelihood(self.decoder(latents), standardised)
        if not self._is_variational:
            kl = torch.zeros_like(reconstruction)
        elif self.flow is None:
            kl = posterior.kl_divergence(mean, logvar)
        else:
            kl = posterior.flow_divergence(mean, logvar, drawn, latents, log_determinant)
        return Terms(reconstruction, kl, latents)

    def log_weights(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z | x) per row, (n,), in nats, at the draw z that ``noise`` gives.

        The mean of its exponential over many draws is p(x) (Burda et al. 2015). Arguments are those of :meth:`forward`.
        """
        standardised = self.scaling(x)
        hidden = self._hidden(standardised)
        mean, logvar = self.encoder.moments(hidden)
        latent, log_determinant = self._flow(posterior.draw(mean, logvar, noise), hidden)
        log_ratio = posterior.log_density(noise, logvar, log_determinant) - posterior.log_prior(latent)
        return -self.likelihood.negative_log_likelihood(self.decoder(latent), standardised) - log_ratio

    @property
    def _is_variational(self) -> bool:
        """Whether latents are drawn; a model without a KL term is a plain autoencoder."""
        return self.config.kl_weight > 0

    def _hidden(self, standardised: Tensor, *, in_place: bool = False) -> Tensor:
        """Return the encoder's last layer; ``in_place`` overwrites the rows, which saves an array of their size."""
        clamp = standardised.clamp_ if in_place else standardised.clamp
        return self.encoder.hidden(clamp(-_MAX_INPUT, _MAX_INPUT))

    def _hidden_of(self, x: Tensor) -> Tensor:
        return self._hidden(self.scaling(x), in_place=True)

    def _latents_of(self, hidden: Tensor) -> Tensor:
        mean = self.encoder.mean(hidden)
        return mean if self.flow is None else next(self.flow.push_each([mean], hidden))

    def _flow(self, latent: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.flow is None:
            return latent, torch.zeros_like(latent[..., 0])
        pushed, log_determinant = self.flow(latent, hidden)
        return pushed, log_determinant

    def measure_stretch(self, rows: Rows) -> None:
        """Find the :attr:`stretch` of the trained model at ``rows``, (n, n_features), but for those not finite."""
        rows = rows[np.isfinite(rows).all(axis=1)]
        latents = torch.from_numpy(self.embed_rows(rows))
        with inference(often=True):
            pullback = mean_pullback(lambda z: self.likelihood.mean(self.decoder(z)) * self.scaling.active, latents)
            lengths = [found for _, found in tiling.by_tiles(lambda x: self.scaling(x).norm(dim=1), BATCH_SIZE, rows)]
            self.stretch = stretch_of(pullback, latents, torch.from_numpy(np.concatenate(lengths)))

    def check_metric(self, metric: str) -> None:
        """Refuse a metric that this model does not know, with InvalidInput."""
        check_metric(metric, self.stretch)

    def embed_rows(
        self,
        rows: Rows,
        batch_size: int = 16_384,
        precision: ComputePrecision = "float32",
        metric: Metric = "latent",
    ) -> Floats:
        """Return the latents, (n, dim_latent) float32, of ``rows``, (n, n_features), any real dtype.

        On one machine, a row's latent is bit for bit the same whatever the other rows, their order, ``batch_size`` and
        the number of threads. With ``precision="bf16"`` it is computed faster, and its root-mean-square error is within
        1 % of the spread of the latents. With ``metric="data"`` they are stretched, so that distances are like those
        of the rows.

        Raises
        ------
        InvalidInput
            The rows have another number of features or hold NaN or infinity, or there is no such precision or metric.
        """
        self._check_rows(rows)
        stretch = self._stretch(metric)
        latents = np.empty((len(rows), self.dim_latent), np.float32)
        tile_rows = tiling.cached_rows(self.n_features, batch_size)
        multiple = tiling.padded_to((*self._widths, self.dim_latent))

        def work(part: slice) -> None:
            hidden = []
            for _, tile in tiling.tiles(rows[part], tile_rows, multiple):
                standardised = self.scaling(tile)
                tiling.check_finite(tile, standardised)
                hidden.append(self._hidden(standardised, in_place=True))
            found = self._latents_of(torch.cat(hidden))
            found = stretch(found) if stretch else found
            latents[part] = found[: part.stop - part.start].numpy(force=True)

        with inference(compute_dtype(precision), often=len(rows) > _OFTEN * tile_rows):
            tiling.on_all_threads(work, len(rows), batch_size)
        return latents

    def decode_rows(
        self,
        latents: npt.NDArray[np.floating],
        batch_size: int = BATCH_SIZE,
        dtype: npt.DTypeLike | None = None,
        metric: Metric = "latent",
    ) -> npt.NDArray[np.generic]:
        """Return the mean rows, (n, n_features), of ``latents``, (n, dim_latent), in data units.

        ``metric`` is that of the latents.

        They have the given ``dtype``; integers are rounded and kept within their range. By default it is float32, or
        float64 where float32 cannot hold both offset and digits of a feature.

        Raises
        ------
        InvalidInput
            The latents have another width, or there is no such metric.
        """
        stretch = self._stretch(metric)
        if latents.ndim != 2 or latents.shape[1] != self.dim_latent:
            raise InvalidInput(
                f"latents of shape {latents.shape} do not fit this model: it takes (n, {self.dim_latent})"
            )
        rows = np.empty((len(latents), self.n_features), dtype or self.scaling.restored_dtype)
        latents = latents.astype(np.float32, copy=False)
        tile_rows = tiling.cached_rows(self.n_features, batch_size)
        multiple = tiling.padded_to(self._widths)

        def work(part: slice) -> None:
            tile = tiling.padded(latents[part], multiple)
            tile = stretch.undo(tile) if stretch else tile
            rows[part] = tiling.cast(self.decode(tile)[: part.stop - part.start].numpy(force=True), rows.dtype)

        with inference(often=len(latents) > _OFTEN * tile_rows):
            tiling.on_all_threads(work, len(latents), tile_rows)
        return rows

    def score_rows(self, rows: Rows, noise: Floats, batch_size: int = BATCH_SIZE) -> tuple[Floats, Floats]:
        """Return reconstruction and KL per row, each (n,), in nats; see :class:`Terms`.

        ``noise``, (n, dim_latent), is standard normal; zeros give the terms at the posterior mean.

        Raises
        ------
        InvalidInput
            The rows have another number of features.
        """
        self._check_rows(rows)
        scores = np.empty((2, len(rows)), np.float32)

        def both(tile: Tensor, noise: Tensor) -> Tensor:
            terms: Terms = self(tile, noise)
            return torch.stack((terms.reconstruction, terms.kl), dim=1)

        with inference():
            for part, found in tiling.by_tiles(both, batch_size, rows, noise):
                scores[:, part] = found.T
        return scores[0], scores[1]

    @property
    def _widths(self) -> tuple[int, ...]:
        """Of rows, hidden layers and flow."""
        flow = (self.config.iaf_context, self.config.iaf_cells)
        return (self.n_features, *(self.config.cells_encoder or ()), *(width for width in flow if width))

    def _stretch(self, metric: Metric) -> Stretch | None:
        """Return what lies between latents of this metric and those of the networks, if anything does."""
        self.check_metric(metric)
        return None if metric == "latent" else self.stretch

    def _check_rows(self, rows: Rows) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.n_features:
            raise InvalidInput(
                f"rows of shape {rows.shape} do not fit this model: it was trained on rows of "
                f"{self.n_features} features"
            )
