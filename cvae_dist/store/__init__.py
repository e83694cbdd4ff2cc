"""What is on disk: locations, the Zarr layout, the ledger, statistics and the lease."""

from cvae_dist.store.drift import Drift
from cvae_dist.store.layout import STRING, ArrayLayout, Layout
from cvae_dist.store.lease import Lease, LeaseToken
from cvae_dist.store.ledger import Digest, Pack, Records
from cvae_dist.store.manifest import Entries, Manifest
from cvae_dist.store.moments import Moments
from cvae_dist.store.row_store import RowStore
from cvae_dist.store.sample import Sample
from cvae_dist.store.urls import Location

__all__ = [
    "STRING",
    "ArrayLayout",
    "Digest",
    "Drift",
    "Entries",
    "Layout",
    "Lease",
    "LeaseToken",
    "Location",
    "Manifest",
    "Moments",
    "Pack",
    "Records",
    "RowStore",
    "Sample",
]
