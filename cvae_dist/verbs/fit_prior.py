"""The verb ``fit_prior``: a prior of the latents of a store's rows, for ``sample`` to draw from."""

import os
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.store import Location
from cvae_dist.store.urls import StorageOptions


@dataclass(frozen=True)
class PriorResult:
    """Which prior was fitted, and what it gains.

    Attributes
    ----------
    prior : str
        Name of the prior.
    rows : int
        Number of rows whose latents it was fitted to.
    log_density, log_density_of_normal : float
        Mean log p(z) of these latents under it and under N(0, I), in nats.
    model : str
        URL of the model directory that keeps it.
    nothing_to_do : bool
        Whether the same prior of the same rows and model was there already.
    """

    prior: str
    rows: int
    log_density: float
    log_density_of_normal: float
    model: str
    nothing_to_do: bool = False


def fit_prior(
    store: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    prior: Literal["mixture", "flow"] = "mixture",
    n_components: int = 10,
    seed: int = 0,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
) -> PriorResult:
    """Fit a prior to the latents of a store's rows, for sample to draw from. The model's directory keeps it.

    A prior of that name that is there already is replaced, unless it was fitted to the same rows with the same
    settings: then nothing is done.

    Parameters
    ----------
    store : path or URL
        Zarr store of rows, made by ingest. 20,000 rows at most are looked at.
    model : path or URL
        Directory of a trained model.
    prior : {"mixture", "flow"}
        A mixture of Gaussians, or a neural spline flow, which takes seconds to fit and suits many rows (needs the
        extra flow).
    n_components : int
        Number of Gaussians of the mixture.
    seed : int
        Seed of the fit: the same seed gives the same prior.
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    on_event : callable
        Listener for progress.

    Raises
    ------
    SourceNotFound, InvalidInput, Corrupt
        There is no such store, model or kind of prior, they do not fit each other, or their bytes have changed.
    MissingExtra
        The flow's package is not installed.
    """
    from cvae_dist.cluster.handles import StoreHandle
    from cvae_dist.model import prior as priors
    from cvae_dist.model.directory import load_model, prior_lineage, save_prior
    from cvae_dist.model.sampling import posterior_draws
    from cvae_dist.store.permutation import pick_rows
    from cvae_dist.training.loader import read_rows

    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise InvalidInput(f"seed={seed!r} is no seed: nothing was fitted; give a whole number from 0 to 4,294,967,295")
    place = Location.of(model, storage_options)
    vae = load_model(place)
    rows, reader = StoreHandle.of(Location.of(store, storage_options), "rows", vae.n_features, place).open()
    made_with = {"rows": rows.fingerprint, "seed": seed}
    made_with |= {"n_components": n_components} if prior == "mixture" else {}
    known = prior_lineage(place, prior)
    if known.get("made_with") == made_with:
        result = PriorResult(prior, **known["figures"], model=str(place), nothing_to_do=True)
        on_event(Event("fit-prior", "done", result.rows, result.rows, "rows", "nothing to do, it was fitted already"))
        return result
    random = np.random.RandomState(seed)
    chosen = pick_rows(rows.rows, priors.MAX_FITTED_ROWS, 0)
    on_event(Event("fit-prior", "start", 0, len(chosen), "rows", f"fitting the prior {prior!r} to their latents"))
    latents = posterior_draws(vae, read_rows(reader, chosen), 1, random)[:, 0]
    rows.require_unchanged()
    fitted = priors.fit_prior(prior, latents, random, n_components)
    figures: dict[str, Any] = {
        "rows": len(latents),
        "log_density": float(fitted.log_density(latents).mean()),
        "log_density_of_normal": priors.normal_log_density(latents),
    }
    save_prior(place, prior, fitted, vae, {"made_with": made_with, "figures": figures})
    on_event(Event("fit-prior", "done", len(latents), len(latents), "rows", f"fitted the prior {prior!r}"))
    return PriorResult(prior, **figures, model=str(place))
