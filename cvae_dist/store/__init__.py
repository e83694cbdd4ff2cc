"""What is on disk: locations, the Zarr layout, the ledger, statistics and the lease."""

from cvae_dist.store.layout import STRING, ArrayLayout, Layout
from cvae_dist.store.lease import Lease
from cvae_dist.store.ledger import Digest, Ledger, Record
from cvae_dist.store.moments import Moments
from cvae_dist.store.row_store import RowStore
from cvae_dist.store.urls import Location

__all__ = ["STRING", "ArrayLayout", "Digest", "Layout", "Ledger", "Lease", "Location", "Moments", "Record", "RowStore"]
