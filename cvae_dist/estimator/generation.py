"""New rows: from the prior, around given rows, and between them."""

from __future__ import annotations

from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_array, check_random_state

from cvae_dist.errors import InvalidInput, NotFitted
from cvae_dist.estimator import lazy
from cvae_dist.estimator.fitted import ModelNotTrained
from cvae_dist.estimator.inference import Inference
from cvae_dist.estimator.inputs import as_invalid_input, native
from cvae_dist.model import sampling
from cvae_dist.model.directory import load_prior, save_prior
from cvae_dist.model.files import is_finished
from cvae_dist.model.prior import MAX_FITTED_ROWS, Prior, PriorName, check_name, fit_prior
from cvae_dist.model.sampling import Interpolation

RandomState = int | np.random.RandomState | None
Floats = NDArray[np.floating[Any]]


class Generation(Inference):
    """What a generative model can do that an embedding cannot."""

    X: Any
    priors_: dict[PriorName, Prior]

    def sample(
        self,
        n: int = 1,
        temperature: float = 1.0,
        noise: bool = True,
        prior: Literal["normal"] | PriorName = "normal",
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
        prior : {"normal", "mixture", "flow"}
            N(0, I), or what :meth:`fit_prior` fitted, which covers only where latents of rows lie. Without a call
            of it, it is fitted on the constructor's ``X``.
        random_state : int, RandomState or None
            None: other rows at every call.

        Returns
        -------
        (n, n_features) float array
            In the data's units.

        Raises
        ------
        NotFitted
            There is no model, or the prior was not fitted and there is no ``X`` to fit it on.
        InvalidInput
            An argument is out of its range.
        MissingExtra
            The flow's package is not installed.
        """
        model = self._model()
        _check_draws(n, temperature)
        random = check_random_state(random_state)
        if prior == "normal":
            latents = np.float32(temperature) * sampling.standard_normal(n, model.dim_latent, random)
        else:
            latents = self._prior(prior).draw(n, temperature, random)
        if not noise:
            return cast("Floats", model.decode_rows(latents))
        return sampling.decode_draws(model, latents, int(random.randint(2**31)))

    def fit_prior(
        self, X: Any = None, prior: PriorName = "mixture", n_components: int = 10, random_state: RandomState = 0
    ) -> Self:
        """Fit a prior to the latents of rows, for ``sample(prior=...)``; kept in ``logdir`` where there is one.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore, optional
            Rows as in the constructor, by default those; 20,000 of them at most are looked at.
        prior : {"mixture", "flow"}
            A mixture of Gaussians, or a neural spline flow, which takes seconds to fit and suits many rows.
        n_components : int
            Gaussians of the mixture; no more than rows.
        random_state : int, RandomState or None

        Returns
        -------
        CompressionVAE
            Itself, with the prior in ``priors_``.

        Raises
        ------
        NotFitted
            There is no model, or there are no rows.
        InvalidInput
            There is no such prior, or there are fewer than two rows.
        MissingExtra
            The flow's package is not installed.
        """
        model = self._model()
        check_name(prior)
        rows = self.X if X is None else X
        if rows is None:
            raise ModelNotTrained(f"there are no rows to fit the prior {prior!r} on: call fit_prior(X) with some")
        random = check_random_state(random_state)
        latents = sampling.posterior_draws(model, self._some_rows(rows, MAX_FITTED_ROWS), 1, random)[:, 0]
        fitted = fit_prior(prior, latents, random, n_components)
        self.priors_ = {**getattr(self, "priors_", {}), prior: fitted}
        if self._directory is not None and is_finished(self._place()):
            save_prior(self._place(), prior, fitted, model)
        return self

    def posterior_sample(self, X: Any, k: int = 1, random_state: RandomState = None) -> NDArray[np.float32]:
        """Return draws of the latents that rows may have come from.

        Parameters
        ----------
        X : array, DataFrame, path, URL or RowStore
            Rows as for :meth:`embed`; lazy ones give lazy draws, with the dimension ``draw``.
        k : int
            Draws for each row.
        random_state : int, RandomState or None
            The same int gives the same draws for the same rows in the same blocks.

        Returns
        -------
        (n, k, dim_latent) float32 array
        """
        model = self._model()
        _check_draws(k, 1.0)
        seed = int(check_random_state(random_state).randint(2**31))
        draws = partial(sampling.posterior_draws_of_block, model, k=k, seed=seed)
        return cast("NDArray[np.float32]", self._mapped(X, draws, lazy.DRAWS, (k, model.dim_latent), np.float32))

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

        Raises
        ------
        NotFitted
            There is no model.
        InvalidInput
            The rows do not fit the model, the kind is unknown, or n is no number of rows from 2 on.
        """
        model = self._model()
        rows = [np.ravel(end) for end in (a, b)]
        if any(row.size != model.n_features for row in rows):
            raise InvalidInput(
                f"a of shape {np.shape(a)} and b of shape {np.shape(b)} are not both a row of {model.n_features} "
                "features: give two rows, or items, of the kind the model was trained on"
            )
        with as_invalid_input():
            ends = model.embed_rows(native(check_array(rows, dtype="numeric", input_name="a, b")))
        return cast("Floats", model.decode_rows(sampling.between(ends[0], ends[1], n, kind)))

    def _prior(self, name: PriorName) -> Prior:
        """Return a fitted prior: this object's, that beside the model, or one fitted now."""
        check_name(name)
        if name not in getattr(self, "priors_", {}):
            stored = self._stored_prior(name)
            if stored is None:
                self.fit_prior(prior=name)
            else:
                self.priors_ = {**getattr(self, "priors_", {}), name: stored}
        return self.priors_[name]

    def _stored_prior(self, name: PriorName) -> Prior | None:
        if self._directory is None:
            return None
        try:
            return load_prior(self._place(), name)[0]
        except NotFitted:
            return None


def _check_draws(n: int, temperature: float) -> None:
    if not isinstance(n, Integral) or n < 1:
        raise InvalidInput(f"{n!r} draws were asked for: ask for a whole number, at least 1")
    if not isinstance(temperature, Real) or not 0 <= temperature < np.inf:
        raise InvalidInput(f"temperature={temperature!r} is no factor of a spread: give a finite number >= 0")
