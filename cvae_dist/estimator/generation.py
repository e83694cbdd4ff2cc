"""New rows: from the prior, around given rows, and between them."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state

from cvae_dist.errors import InvalidInput
from cvae_dist.estimator.fitted import ModelNotTrained
from cvae_dist.estimator.inference import Inference
from cvae_dist.model import sampling
from cvae_dist.model.sampling import Interpolation

RandomState = int | np.random.RandomState | None
Floats = NDArray[np.floating[Any]]


class Generation(Inference):
    """What a generative model can do that an embedding cannot."""

    X: Any
    prior_: sampling.Mixture

    def sample(
        self,
        n: int = 1,
        temperature: float = 1.0,
        noise: bool = True,
        prior: Literal["normal", "mixture"] = "normal",
        random_state: RandomState = None,
    ) -> Floats:
        """Return rows that never were.

        Parameters
        ----------
        n : int
            Number of rows.
        temperature : float
            Scales the spread of the latents: 1 as trained, less for more typical rows, 0 for the most typical one.
        noise : bool
            Draw rows from the likelihood, as the data scatter; otherwise return its means, which are smoother and
            vary less than the data.
        prior : {"normal", "mixture"}
            N(0, I), or the mixture of :meth:`fit_prior`, which covers only where latents of rows lie. Without a call
            of it, the mixture is fitted on the constructor's ``X``.
        random_state : int, RandomState or None
            None: other rows at every call.

        Returns
        -------
        (n, n_features) float array
            In the data's units.

        Raises
        ------
        NotFitted
            There is no model, or no mixture and no ``X`` to fit it on.
        InvalidInput
            An argument is out of its range.
        """
        model = self._model()
        _check_draws(n, temperature)
        if prior not in ("normal", "mixture"):
            raise InvalidInput(f"prior={prior!r} is unknown: choose 'normal' or 'mixture'")
        random = check_random_state(random_state)
        if prior == "mixture":
            latents = self._mixture().draw(n, temperature, random)
        else:
            latents = np.float32(temperature) * sampling.standard_normal(n, model.dim_latent, random)
        if not noise:
            return cast("Floats", model.decode_rows(latents))
        return sampling.decode_draws(model, latents, int(random.randint(2**31)))

    def fit_prior(self, X: Any = None, n_components: int = 10, random_state: RandomState = 0) -> Self:
        """Fit a mixture of Gaussians to the latents of rows, for ``sample(prior="mixture")``.

        Parameters
        ----------
        X : (n, n_features) array or DataFrame, optional
            Default: the constructor's.
        n_components : int
            Gaussians of the mixture; no more than rows.
        random_state : int, RandomState or None

        Returns
        -------
        CompressionVAE
            Itself, with ``prior_``.
        """
        self._model()
        rows = self.X if X is None else X
        if rows is None:
            raise ModelNotTrained("there are no rows to fit the mixture on: call fit_prior(X) with some")
        random = check_random_state(random_state)
        latents = self.posterior_sample(rows, 1, random)[:, 0]
        self.prior_ = sampling.Mixture.fit(latents, n_components, random)
        return self

    def posterior_sample(self, X: Any, k: int = 1, random_state: RandomState = None) -> NDArray[np.float32]:
        """Return draws of the latents that rows may have come from.

        Parameters
        ----------
        X : (n, n_features) array or DataFrame
        k : int
            Draws for each row.
        random_state : int, RandomState or None

        Returns
        -------
        (n, k, dim_latent) float32 array
        """
        model = self._model()
        _check_draws(k, 1.0)
        return sampling.posterior_draws(model, self._rows(X), k, check_random_state(random_state))

    def interpolate(self, a: ArrayLike, b: ArrayLike, n: int = 10, kind: Interpolation = "linear") -> Floats:
        """Return rows on the way from one row to another, through the latent space.

        Parameters
        ----------
        a, b : (n_features,) array, or an item of the shape trained on
            The two rows.
        n : int
            Rows to return, the reconstructions of ``a`` and ``b`` included.
        kind : {"linear", "slerp"}
            The straight line between the latents, or the arc around the origin, which suits many latent dimensions.

        Returns
        -------
        (n, n_features) float array
            In the data's units.
        """
        model = self._model()
        ends = model.embed_rows(self._rows(np.stack([np.ravel(a), np.ravel(b)])))
        return cast("Floats", model.decode_rows(sampling.between(ends[0], ends[1], n, kind)))

    def _mixture(self) -> sampling.Mixture:
        if not hasattr(self, "prior_"):
            self.fit_prior()
        return self.prior_


def _check_draws(n: int, temperature: float) -> None:
    if n < 1:
        raise InvalidInput(f"{n} draws were asked for: ask for at least 1")
    if not 0 <= temperature < np.inf:
        raise InvalidInput(f"temperature={temperature!r} is no factor of a spread: give a finite number >= 0")
