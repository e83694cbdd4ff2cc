"""How tasks reach Dask, and the one protocol by which any output store is written."""

from cvae_dist.cluster.client import resolve_client
from cvae_dist.cluster.regions import map_regions
from cvae_dist.cluster.write import Job, Made, Span, StoreResult, reused_block, write_rows

__all__ = [
    "Job",
    "Made",
    "Span",
    "StoreResult",
    "map_regions",
    "resolve_client",
    "reused_block",
    "write_rows",
]
