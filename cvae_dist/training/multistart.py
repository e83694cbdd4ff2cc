"""Where a training of few features begins: several starts are trained for a while, and the best one goes on.

With one or two latent dimensions, random weights fold a curve, and no gradient unfolds it. Manifold coordinates of the
rows are unfolded already, but each method fails on some data. So several are tried, random weights among them, and rows
that none of them saw decide.
"""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae_dist.config import TrainConfig
from cvae_dist.model.tiling import tensor_of
from cvae_dist.model.vae import VAE, Terms
from cvae_dist.training import schedule
from cvae_dist.training.optimizer import assign, clone

MAX_LANDMARKS = 1000
_MOST_ROWS, _MOST_FEATURES, _MOST_DIMENSIONS = 20_000, 16, 2
_FEWEST_LANDMARKS = 30  # a neighbourhood of ten should not be all rows
_FEWEST_STEPS = 2000  # of the training: a shorter one would cost less than its starts
_RANDOM_STARTS = 2
_REGRESSION_STEPS, _ELBO_STEPS = 300, 1000
_BATCH_SIZE = 100
_REGRESSION_RATE, _ELBO_RATE = 1e-2, 5e-3
_LOGVAR, _WIDTH_SHARE = -6.0, 0.1  # a posterior narrow enough not to blur the coordinates it was taught
_SCALE_RATE = 10  # of the rate, for the likelihood's own parameters: sigma must follow the residual
_KL_WARMUP = 0.2
_DRAWS = 32
_STEPS_BETWEEN_TESTS = 100
_CHOOSING_SHARE = 5
_DENSE_LINK = 1e-6  # keeps the graph of a heat kernel in one piece

Coordinates = npt.NDArray[np.float32]
Weights = dict[str, Tensor]


def is_worthwhile(config: TrainConfig, n_rows: int, n_features: int) -> bool:
    """Whether several starts are tried: as asked for; by default for few rows of few features and small latents.

    Where a latent is as wide as a row there is nothing to unfold.
    """
    if config.multi_start != "auto":
        return config.multi_start
    few = config.dim_latent < n_features <= _MOST_FEATURES and config.dim_latent <= _MOST_DIMENSIONS
    small = few and n_rows <= _MOST_ROWS
    return small and n_rows >= _FEWEST_LANDMARKS and (config.num_steps or 0) >= _FEWEST_STEPS


def choose_start(
    vae: VAE, config: TrainConfig, rows: npt.NDArray[np.generic], held_out: npt.NDArray[np.generic]
) -> str:
    """Put the best of several starts into ``vae``, and return which it is and why.

    The weights of ``vae``, those of its seed, are one of the starts. They train on ``rows``, (n, n_features) in data
    units, of which there are a thousand at most. A thousand at most of ``held_out``, (m, n_features), choose; where
    there are none every fifth of ``rows`` does.
    """
    if not len(held_out):
        chooses = np.arange(len(rows)) % _CHOOSING_SHARE == 0
        rows, held_out = rows[~chooses] if len(rows) > 1 else rows, rows[chooses]
    held_out = held_out[np.linspace(0, len(held_out) - 1, min(len(held_out), MAX_LANDMARKS), dtype=int)]
    generator = torch.Generator().manual_seed(config.seed)
    x = tensor_of(rows)
    standardised = vae.scaling(x)
    candidates = dict(_coordinates(standardised.numpy(), config.dim_latent))
    names = [*candidates, *(f"random {number}" for number in range(_RANDOM_STARTS))]
    starts = _Together(vae, _initial_weights(vae, len(names), config.seed))
    if candidates:
        targets = torch.from_numpy(np.stack(list(candidates.values())))
        starts.regress(x, targets, generator)
    losses = starts.maximise_elbo(x, tensor_of(held_out), generator)
    best = int(losses.argmin())
    assign(dict(vae.named_parameters()), starts.weights(best))
    told = ", ".join(f"{name} {loss:.4g}" for name, loss in zip(names, losses.tolist(), strict=True))
    return f"begun from {names[best]}, the best of {len(names)} starts (-ELBO {told})"


def _initial_weights(vae: VAE, count: int, seed: int) -> list[Weights]:
    """Return ``count`` sets of initial weights, the last that of ``vae`` itself; ``vae`` ends with it."""
    own = clone(dict(vae.named_parameters()))
    others = []
    for number in range(1, count):
        vae.initialise(torch.Generator().manual_seed(seed + number))
        others.append(clone(dict(vae.named_parameters())))
    assign(dict(vae.named_parameters()), own)
    return [*others, own]


class _Together:
    """Several sets of weights of one model, trained together."""

    def __init__(self, vae: VAE, starts: list[Weights]) -> None:
        self._vae = vae
        self._stacked = {name: torch.stack([start[name] for start in starts]).requires_grad_() for name in starts[0]}

    def regress(self, x: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        """Teach the first starts, one per target (n, dim_latent), to encode rows to their target and decode them."""
        regression = _Regression(self._vae)

        def loss(weights: Weights, rows: Tensor, target: Tensor) -> Tensor:
            named = {f"vae.{name}": value for name, value in weights.items()}
            result: Tensor = torch.func.functional_call(regression, named, (rows, target))
            return result

        taught = len(targets)

        def total(chosen: Tensor, step: int) -> Tensor:
            weights = {name: value[:taught] for name, value in self._stacked.items()}
            losses: Tensor = torch.vmap(loss, (0, None, 0))(weights, x[chosen], targets[:, chosen])
            return losses.sum()

        for _ in self._descend(total, len(x), _REGRESSION_STEPS, _REGRESSION_RATE, generator):
            pass

    def maximise_elbo(self, x: Tensor, held_out: Tensor, generator: torch.Generator) -> Tensor:
        """Train all starts on the ELBO, keep the best weights of each, and return their losses, (count,).

        The best weights have the least mean -ELBO of ``held_out``, with the same draws: few rows are soon overfitted.
        """
        draws = torch.randn((_DRAWS, len(held_out), self._vae.dim_latent), generator=generator)
        losses, best = self._losses(held_out, draws), clone(self._stacked)

        def total(chosen: Tensor, step: int) -> Tensor:
            noise = torch.randn((len(chosen), self._vae.dim_latent), generator=generator)
            terms = self._terms(x[chosen], noise)
            weight = schedule.kl_weight(step, _ELBO_STEPS, _KL_WARMUP)
            return (terms.reconstruction + weight * terms.kl).mean(dim=1).sum()

        for step in self._descend(total, len(x), _ELBO_STEPS, _ELBO_RATE, generator):
            if step % _STEPS_BETWEEN_TESTS == 0:
                tested = self._losses(held_out, draws)
                better = tested < losses
                losses = torch.where(better, tested, losses)
                for name, value in self._stacked.items():
                    best[name][better] = value.detach()[better]
        assign(self._stacked, best)
        return losses

    def _losses(self, x: Tensor, draws: Tensor) -> Tensor:
        with torch.no_grad():
            losses = [self._terms(x, noise).negative_elbo.mean(dim=1) for noise in draws]
            return torch.nan_to_num(torch.stack(losses).mean(dim=0), nan=torch.inf)

    def weights(self, number: int) -> Weights:
        """Return the weights of one start."""
        return {name: value.detach()[number] for name, value in self._stacked.items()}

    def _terms(self, rows: Tensor, noise: Tensor) -> Terms:
        """Return the terms of every start, stacked."""

        def terms(weights: Weights) -> Terms:
            found: Terms = torch.func.functional_call(self._vae, weights, (rows, noise))
            return found

        stacked: Terms = torch.vmap(terms)(self._stacked)
        return stacked

    def _descend(
        self, loss: Callable[[Tensor, int], Tensor], n_rows: int, steps: int, rate: float, generator: torch.Generator
    ) -> Iterator[int]:
        """Yield the number of steps done after every step."""
        scales = {f"likelihood.{name}" for name, _ in self._vae.likelihood.named_parameters()}
        groups = [
            {"params": [value for name, value in self._stacked.items() if (name in scales) == fast], "fast": fast}
            for fast in (False, True)
        ]
        adam = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = schedule.learning_rate(step, steps, rate) * (_SCALE_RATE if group["fast"] else 1)
            chosen = torch.randint(n_rows, (min(_BATCH_SIZE, n_rows),), generator=generator)
            adam.zero_grad()
            loss(chosen, step).backward()  # type: ignore[no-untyped-call]
            adam.step()
            yield step + 1


class _Regression(torch.nn.Module):
    """The loss of a model whose latents are given."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, rows: Tensor, latent: Tensor) -> Tensor:
        """Return the loss, (), of rows (n, n_features) whose latents should be (n, dim_latent)."""
        mean, logvar = self.vae.encode(rows)
        output = self.vae.decoder(latent)
        standardised = self.vae.scaling(rows)
        surprise = self.vae.likelihood.negative_log_likelihood(output, standardised)
        wrong = (mean - latent).square() + _WIDTH_SHARE * (logvar - _LOGVAR).square()
        return wrong.sum(dim=-1).mean() + surprise.mean() / rows.shape[1]


def _coordinates(rows: Coordinates, dim: int) -> Iterator[tuple[str, Coordinates]]:
    """Yield manifold coordinates, (n, dim) and normally distributed, by the name of what found them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of graphs in several pieces: another candidate wins
        for name, find in _methods(rows, dim).items():
            try:
                found = find()
            except (TypeError, ValueError, RuntimeError, np.linalg.LinAlgError):
                continue  # too few or too many equal rows for this method (TypeError: fewer than eigenvectors)
            if found.shape == (len(rows), dim) and np.isfinite(found).all():
                yield name, _gaussianise(found)


def _gaussianise(values: npt.NDArray[np.floating]) -> Coordinates:
    """Return normal quantiles of the ranks within every column."""
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    shares = torch.from_numpy((ranks + 0.5) / len(values))
    normal: Coordinates = torch.special.ndtri(shares).to(torch.float32).numpy()
    return normal


def _methods(rows: Coordinates, dim: int) -> dict[str, Callable[[], npt.NDArray[np.floating]]]:
    """Return what may find manifold coordinates of ``rows``, by name."""
    from sklearn.manifold import Isomap, SpectralEmbedding  # slow to import, and few trainings need them

    heat = SpectralEmbedding(dim, affinity="precomputed", random_state=0)
    return {
        "Isomap (10 neighbours)": lambda: Isomap(n_neighbors=10, n_components=dim).fit_transform(rows),
        "Isomap (6 neighbours)": lambda: Isomap(n_neighbors=6, n_components=dim).fit_transform(rows),
        "a heat kernel's eigenmap": lambda: heat.fit_transform(_heat_links(rows)),
        "a spectral embedding": lambda: SpectralEmbedding(dim, n_neighbors=10, random_state=0).fit_transform(rows),
    }


def _heat_links(rows: Coordinates) -> npt.NDArray[np.floating]:
    """Return how strongly each two of the rows are linked, (n, n): by a Gaussian of their distance, if neighbours."""
    from sklearn.neighbors import kneighbors_graph

    distances = kneighbors_graph(rows, 10, mode="distance")
    width = np.median(distances.data) or 1.0
    distances.data = np.exp(-np.square(distances.data / width))
    links: npt.NDArray[np.floating] = distances.toarray()
    links = np.maximum(links, links.T) + _DENSE_LINK
    return links
