"""The verb ``sample``: rows that never were."""

import contextlib
import math
import os
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal

from cvae_dist.cluster import Job, Made, Output, Span, StoreResult
from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Layout, Location
from cvae_dist.store.lineage import without_credentials
from cvae_dist.store.urls import StorageOptions

if TYPE_CHECKING:
    from distributed import Client

    from cvae_dist.cluster.handles import ModelHandle, PriorHandle


def sample(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    n: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    noise: bool = True,
    prior: Literal["normal", "mixture", "flow"] = "normal",
    overwrite: bool = False,
    fsync: bool = False,
    storage_options: StorageOptions | None = None,
    client: "Client | None" = None,
    on_event: OnEvent = ignore,
) -> StoreResult:
    """Draw new rows: latents from a prior, decoded.

    Parameters
    ----------
    model : path or URL
        Directory of a trained model.
    out : path or URL
        Zarr store to write.
    n : int
        Number of rows, at least 1.
    seed : int
        Seed of the draws. A row depends on the seed and on its number alone.
    temperature : float
        Scales the spread of the latents: 1 as trained, less for more typical rows.
    noise : bool
        Draw from the likelihood, as the data does; without it, the mean row of each latent.
    prior : {"normal", "mixture", "flow"}
        Where latents are drawn: N(0, I), or what fit-prior fitted to the latents of this model.
    overwrite : bool
        Replace rows that were made otherwise.
    fsync : bool
        Wait until a local disk has what was written, so that a finished command survives a power loss.
    storage_options, client, on_event
        As for :func:`cvae_dist.embed`, and so are the result and the errors.

    Raises
    ------
    NotFitted, MissingExtra
        The prior was not fitted to the latents of this model, or its package is not installed.
    """
    from cvae_dist.cluster.handles import ModelHandle, PriorHandle
    from cvae_dist.model.threads import one_thread_each

    if not isinstance(n, Integral) or n < 1:
        raise InvalidInput(f"n={n!r} asks for no rows; use a whole number, 1 or more")
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise InvalidInput(f"temperature={temperature!r} is no factor of a spread: give a finite number >= 0")
    handle = ModelHandle.of(Location.of(model, storage_options))
    fitted = None if prior == "normal" else PriorHandle.of(handle.location, prior)
    settings: dict[str, str | int | float] = {"model": handle.digest, "seed": seed, "noise": noise}
    settings |= {"prior": fitted.name, "prior_digest": fitted.digest} if fitted else {}
    settings |= {"temperature": temperature} if temperature != 1 else {}
    layout = Layout.of((handle.row_layout(),))
    job = Job(
        kind="rows",
        layout=layout,
        rows=n,
        settings=settings,
        task=lambda span: _DrawShard(handle, fitted, seed, temperature, noise, span),
        lineage={"model": without_credentials(str(handle.location))},
        task_bytes=layout.shard_bytes,
    )
    place = Location.of(out, storage_options, fsync)
    place.require_apart(handle.location)
    with (
        contextlib.nullcontext(1) if client else one_thread_each() as threads,
        Output.held(place, "sample", overwrite=overwrite, client=client, on_event=on_event) as output,
    ):
        return output.write(replace(job, threads=threads))


@dataclass(frozen=True)
class _DrawShard:
    model: "ModelHandle"
    prior: "PriorHandle | None"
    seed: int
    temperature: float
    noise: bool
    span: Span

    def __call__(self) -> Made:
        from cvae_dist.model.draws import numbered_rows

        prior = None if self.prior is None else self.prior.load()
        rows = numbered_rows(
            self.model.load(), self.span.start, self.span.stop,
            seed=self.seed, temperature=self.temperature, noise=self.noise, prior=prior,
        )  # fmt: skip
        return Made({"x": rows})
