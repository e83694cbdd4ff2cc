"""Priors fitted to the latents of rows: draws come from where latents lie, not from all of N(0, I)."""

import copy
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cvae_dist.errors import InvalidInput, MissingExtra
from cvae_dist.model.tiling import Floats

PriorName = Literal["mixture", "flow"]
Array = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]
Architecture = dict[str, Any]  # every number that decides the shape of a weight, as zuko calls it

MAX_FITTED_ROWS = 20_000  # more tell a prior little

_ARCHITECTURE: Architecture = {"transforms": 4, "passes": 2, "hidden_features": [64, 64], "bins": 8}
_BATCH = 256
_RATE = 1e-3
_MAX_STEPS, _TEST_EVERY, _PATIENCE = 3000, 50, 300
_HELD_OUT = 10  # one latent in so many is held out, to tell when the fit should stop
_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians.

    Attributes
    ----------
    weights : (k,) float64 array
        They sum to 1.
    means : (k, dim_latent) float64 array
    factors : (k, dim_latent, dim_latent) float64 array
        Lower Cholesky factors of the covariances.
    """

    architecture: ClassVar[Architecture] = {}

    weights: Array
    means: Array
    factors: Array

    @classmethod
    def fit(cls, latents: Floats, n_components: int, random: np.random.RandomState) -> Self:
        """Fit by expectation maximisation, with no more components than latents."""
        from sklearn.mixture import GaussianMixture  # slow to import, and nothing else needs it

        if not isinstance(n_components, Integral) or n_components < 1:
            raise InvalidInput(f"a mixture of {n_components!r} components: ask for a whole number, at least 1")
        mixture = GaussianMixture(min(n_components, len(latents)), random_state=random)
        mixture.fit(latents.astype(np.float64))
        return cls(mixture.weights_, mixture.means_, np.linalg.cholesky(mixture.covariances_))

    def draw(self, n: int, temperature: float, random: np.random.RandomState) -> Floats:
        """Return draws, (n, dim_latent); ``temperature`` scales the spread around each component's mean."""
        component = random.choice(len(self.weights), size=n, p=self.weights)
        noise = random.standard_normal((n, self.means.shape[1]))
        spread = np.einsum("nij,nj->ni", self.factors[component], noise)
        draws: Floats = (self.means[component] + temperature * spread).astype(np.float32)
        return draws

    def log_density(self, latents: Floats) -> Array:
        """Return log p(z) of latents (n, dim_latent): (n,), in nats."""
        offsets = (latents[:, None] - self.means)[..., None]
        squares = np.square(np.linalg.solve(self.factors, offsets)).sum(axis=(2, 3))
        volumes = np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(axis=1)
        each = np.log(self.weights) - volumes - 0.5 * (squares + self.means.shape[1] * math.log(2 * math.pi))
        density: Array = np.logaddexp.reduce(each, axis=1)
        return density

    def arrays(self) -> Arrays:
        """Return the attributes by name."""
        return {"weights": self.weights, "means": self.means, "factors": self.factors}


class Flow:
    """A neural spline flow (Durkan et al. 2019, arXiv:1906.04032) of standardised latents, from zuko.

    Its layers couple the halves of a latent, so that a draw costs no more than a density.

    Parameters
    ----------
    center, scale : (dim_latent,) float32 array
        Of the latents.
    architecture : dict
        Arguments of zuko's ``NSF``.
    """

    def __init__(self, center: Floats, scale: Floats, architecture: Architecture) -> None:
        self.architecture = architecture
        self._center = center
        self._scale = scale
        self._network = _spline_flow(len(center), architecture)

    @classmethod
    def fit(cls, latents: Floats, random: np.random.RandomState) -> Self:
        """Fit by maximum likelihood until held-out latents become less probable."""
        scale = np.maximum(latents.std(axis=0), np.finfo(np.float32).tiny)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.randint(2**31)))
            flow = cls(latents.mean(axis=0), scale, _ARCHITECTURE)
        standardised = flow._standardised(latents[random.permutation(len(latents))])
        held_out = max(1, len(latents) // _HELD_OUT)
        _maximise_likelihood(flow._network, standardised[held_out:], standardised[:held_out], random)
        return flow

    @classmethod
    def restored(cls, arrays: Arrays, architecture: Architecture) -> Self:
        """Return the flow of this architecture whose :meth:`arrays` these are."""
        flow = cls(arrays["center"], arrays["scale"], architecture)
        weights = {name: torch.from_numpy(value) for name, value in arrays.items() if name not in ("center", "scale")}
        flow._network.load_state_dict(weights)
        return flow

    def draw(self, n: int, temperature: float, random: np.random.RandomState) -> Floats:
        """Return draws, (n, dim_latent); ``temperature`` scales the normal noise that the flow turns into latents."""
        noise = temperature * random.standard_normal((n, len(self._center)))
        with torch.inference_mode():
            drawn = self._network().transform.inv(torch.from_numpy(noise.astype(np.float32))).numpy()
        draws: Floats = drawn * self._scale + self._center
        return draws

    def log_density(self, latents: Floats) -> Array:
        """Return log p(z) of latents (n, dim_latent): (n,), in nats."""
        with torch.inference_mode():
            standardised = self._network().log_prob(self._standardised(latents)).numpy().astype(np.float64)
        density: Array = standardised - np.log(self._scale.astype(np.float64)).sum()
        return density

    def arrays(self) -> Arrays:
        """Return centre, scale and weights by name."""
        weights = {name: value.numpy(force=True) for name, value in self._network.state_dict().items()}
        return {"center": self._center, "scale": self._scale, **weights}

    def _standardised(self, latents: Floats) -> Tensor:
        return torch.from_numpy(((latents - self._center) / self._scale).astype(np.float32))


Prior = Mixture | Flow


def fit_prior(name: PriorName, latents: Floats, random: np.random.RandomState, n_components: int = 10) -> Prior:
    """Fit a prior to latents (n, dim_latent). ``n_components`` is for a mixture.

    Raises
    ------
    InvalidInput
        There is no such prior, there are fewer than two latents, or no components are asked for.
    MissingExtra
        The flow's package is not installed.
    """
    check_name(name)
    if len(latents) < 2:
        raise InvalidInput(f"a prior cannot be fitted to {len(latents)} latents: give at least 2 rows")
    return Flow.fit(latents, random) if name == "flow" else Mixture.fit(latents, n_components, random)


def restored(name: PriorName, arrays: Arrays, architecture: Architecture) -> Prior:
    """Return the prior of this name and architecture whose ``arrays()`` these are."""
    return Flow.restored(arrays, architecture) if name == "flow" else Mixture(**arrays)


def check_name(name: str) -> None:
    """Refuse a name that is not a fitted prior's."""
    if name not in ("mixture", "flow"):
        raise InvalidInput(f"prior={name!r} is unknown: choose 'normal', or a fitted one, 'mixture' or 'flow'")


def normal_log_density(latents: Floats) -> float:
    """Return the mean log density of latents (n, dim_latent) under N(0, I), in nats."""
    squares = np.square(latents, dtype=np.float64).sum(axis=1).mean()
    return float(-0.5 * (squares + latents.shape[1] * math.log(2 * math.pi)))


def _spline_flow(dim_latent: int, architecture: Architecture) -> nn.Module:
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise MissingExtra(
            "prior='flow' needs zuko, which is not installed here; prior='mixture' does without. "
            "Install with: pip install 'cvae-dist[flow]'"
        ) from error
    flow: nn.Module = NSF(dim_latent, **architecture)
    return flow


def _maximise_likelihood(network: nn.Module, latents: Tensor, held_out: Tensor, random: np.random.RandomState) -> None:
    """Train on random batches, and keep the weights that make ``held_out`` most probable."""
    optimizer = torch.optim.AdamW(network.parameters(), _RATE)
    best, best_step, kept = math.inf, 0, copy.deepcopy(network.state_dict())
    for step in range(1, _MAX_STEPS + 1):
        chosen = torch.from_numpy(random.randint(len(latents), size=_BATCH))
        optimizer.zero_grad()
        (-network().log_prob(latents[chosen]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_NORM)
        optimizer.step()
        if step % _TEST_EVERY:
            continue
        with torch.inference_mode():
            loss = -float(network().log_prob(held_out).mean())
        if loss < best:
            best, best_step, kept = loss, step, copy.deepcopy(network.state_dict())
        elif step - best_step >= _PATIENCE:
            break
    network.load_state_dict(kept)
    network.requires_grad_(False)
