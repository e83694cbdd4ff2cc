"""How tasks reach Dask, and the one protocol by which any store is written."""

from cvae_dist.cluster.client import resolve_client
from cvae_dist.cluster.nonfinite import without_nonfinite
from cvae_dist.cluster.plan import Job, Made, Plan, Span
from cvae_dist.cluster.process import reused_block
from cvae_dist.cluster.regions import map_regions
from cvae_dist.cluster.shuffle import ShuffledMap
from cvae_dist.cluster.source_map import SourceMap
from cvae_dist.cluster.source_plan import Asked, SourcePlan
from cvae_dist.cluster.write import Output, StoreResult

__all__ = [
    "Asked", "Job", "Made", "Output", "Plan", "ShuffledMap", "SourceMap", "SourcePlan", "Span", "StoreResult",
    "map_regions", "resolve_client", "reused_block", "without_nonfinite",
]  # fmt: skip
