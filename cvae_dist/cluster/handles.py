"""Stores, models and priors by name: small enough to travel with every task, opened once a process."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from cvae_dist.cluster.process import kept
from cvae_dist.errors import Corrupt, InvalidInput
from cvae_dist.model.directory import load_model, load_prior
from cvae_dist.model.files import read_description
from cvae_dist.model.prior import Prior, PriorName
from cvae_dist.model.vae import VAE
from cvae_dist.store import ArrayLayout, Location, RowStore
from cvae_dist.store.reader import RowReader


@dataclass(frozen=True)
class StoreHandle:
    """A store that is read."""

    location: Location
    fingerprint: str

    @classmethod
    def of(cls, store: Location, kind: str, width: int, model: Location) -> Self:
        """Name a store that holds ``kind``, as wide as ``model`` takes it.

        Raises
        ------
        SourceNotFound, InvalidInput
            There is no such store, or it does not fit the model.
        """
        opened = RowStore.open(store)
        opened.require_kind(kind)
        if opened.n_features != width:
            raise InvalidInput(
                f"{opened.url} has rows of {opened.n_features:,} values, but model {model} takes {width:,}. "
                "Nothing was written; give a store and a model that belong together"
            )
        return cls(opened.location, opened.fingerprint)

    def open(self) -> tuple[RowStore, RowReader]:
        """Return the store and its reader."""
        return _open(self)


@dataclass(frozen=True)
class ModelHandle:
    """A model that computes."""

    location: Location
    digest: str
    n_features: int
    dim_latent: int
    item_shape: tuple[int, ...]

    @classmethod
    def of(cls, model: Location) -> Self:
        """Name the model that is at ``model`` now; one that is trained anew meanwhile is refused."""
        description = read_description(model)
        vae = _load((model, description["digest"]))
        item_shape = tuple(description["lineage"].get("item_shape") or (vae.n_features,))
        return cls(model, description["digest"], vae.n_features, vae.dim_latent, item_shape)

    def load(self) -> VAE:
        """Return the model."""
        return _load((self.location, self.digest))

    def row_layout(self) -> ArrayLayout:
        """Return the array of rows that the model decodes."""
        dtype = np.dtype(self.load().scaling.restored_dtype).newbyteorder("<").str
        return ArrayLayout("x", dtype, ("sample", "feature"), (self.n_features,), {"item_shape": list(self.item_shape)})


@dataclass(frozen=True)
class PriorHandle:
    """A fitted prior that is drawn from."""

    model: Location
    name: PriorName
    digest: str

    @classmethod
    def of(cls, model: Location, name: PriorName) -> Self:
        """Name the prior that is beside ``model`` now."""
        return cls(model, name, load_prior(model, name)[1])

    def load(self) -> Prior:
        """Return the prior."""
        return _load_prior(self)


@kept(2)
def _open(handle: StoreHandle) -> tuple[RowStore, RowReader]:
    store = RowStore.open(handle.location)
    return store, RowReader(store)


@kept(1)
def _load(asked: tuple[Location, str]) -> VAE:
    location, digest = asked
    found = read_description(location)["digest"]
    if found != digest:
        raise Corrupt(
            f"the model at {location} has digest {found}, this run began with {digest}: it was trained anew meanwhile. "
            "Nothing was published; run the same command again, with --overwrite if rows were written before"
        )
    return load_model(location)


@kept(1)
def _load_prior(asked: PriorHandle) -> Prior:
    prior, digest = load_prior(asked.model, asked.name)
    if digest != asked.digest:
        raise Corrupt(
            f"the prior {asked.name!r} of {asked.model} was fitted anew meanwhile. "
            "Nothing was published; run the same command again, with --overwrite if rows were written before"
        )
    return prior
