"""The verb ``fit_prior``: where the latents of a store's rows lie, for ``sample`` to draw from."""

import os
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model import prior as priors
from cvae_dist.model.directory import load_model, prior_lineage, save_prior
from cvae_dist.model.prior import PriorName
from cvae_dist.model.sampling import posterior_draws
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location, RowStore
from cvae_dist.store.reader import RowReader
from cvae_dist.store.urls import StorageOptions
from cvae_dist.training.loader import read_rows
from cvae_dist.training.permutation import pick_rows

Url = str | os.PathLike[str]


@dataclass(frozen=True)
class PriorResult:
    """What was fitted, and what it gains.

    Attributes
    ----------
    prior : str
        Its name.
    rows : int
        Rows to whose latents it was fitted.
    log_density, log_density_of_normal : float
        Mean log p(z) of these latents under it and under N(0, I), in nats.
    model : str
        URL of the model directory that keeps it.
    nothing_to_do : bool
        The same prior of the same rows and model was there already.
    """

    prior: str
    rows: int
    log_density: float
    log_density_of_normal: float
    model: str
    nothing_to_do: bool = False


def fit_prior(
    store: Url,
    model: Url,
    *,
    prior: PriorName = "mixture",
    n_components: int = 10,
    seed: int = 0,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> PriorResult:
    """Fit a prior to the latents of a store's rows and keep it in the model directory, replacing an earlier one.

    Where the same prior of the same rows and model is there already, nothing is done.

    Parameters
    ----------
    store : path or URL
        Rows the model fits; 20,000 of them at most are looked at.
    model : path or URL
        Directory of a trained model.
    prior : {"mixture", "flow"}
        A mixture of Gaussians, or a neural spline flow, which takes seconds to fit and suits many rows.
    n_components : int
        Gaussians of the mixture.
    seed : int
        The same seed gives the same prior.
    storage_options : Mapping, optional
        Passed to fsspec for both locations.
    on_event : callable
        Listener for progress.

    Raises
    ------
    SourceNotFound, InvalidInput, Corrupt
        There is no such store, model or prior, they do not fit each other, or their bytes have changed.
    MissingExtra
        The flow's package is not installed.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise InvalidInput(f"seed={seed!r} is no seed: nothing was fitted; give a whole number from 0 to 4,294,967,295")
    place = Location.of(model, storage_options)
    vae = load_model(place)
    rows = _rows(Location.of(store, storage_options), place, vae)
    made_with = {"rows": rows.fingerprint, "seed": seed} | (
        {"n_components": n_components} if prior == "mixture" else {}
    )
    known = prior_lineage(place, prior)
    if known.get("made_with") == made_with:
        result = PriorResult(prior, **known["figures"], model=str(place), nothing_to_do=True)
        on_event(Event("fit-prior", "done", result.rows, result.rows, "rows", "nothing to do, it was fitted already"))
        return result
    random = np.random.RandomState(seed)
    chosen = pick_rows(rows.rows, priors.MAX_FITTED_ROWS, 0)
    on_event(Event("fit-prior", "start", 0, len(chosen), "rows", f"fitting the prior {prior!r} to their latents"))
    latents = posterior_draws(vae, read_rows(RowReader(rows), chosen), 1, random)[:, 0]
    fitted = priors.fit_prior(prior, latents, random, n_components)
    figures: dict[str, Any] = {
        "rows": len(latents),
        "log_density": float(fitted.log_density(latents).mean()),
        "log_density_of_normal": priors.normal_log_density(latents),
    }
    save_prior(place, prior, fitted, vae, {"made_with": made_with, "figures": figures})
    on_event(Event("fit-prior", "done", len(latents), len(latents), "rows", f"fitted the prior {prior!r}"))
    return PriorResult(prior, **figures, model=str(place))


def _rows(store: Location, model: Location, vae: VAE) -> RowStore:
    rows = RowStore.open(store)
    rows.require_kind("rows")
    if rows.n_features != vae.n_features:
        raise InvalidInput(
            f"{rows.url} has rows of {rows.n_features:,} values, but model {model} takes {vae.n_features:,}. "
            "Nothing was fitted; give a store and a model that belong together"
        )
    return rows
