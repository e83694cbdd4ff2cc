"""The face for schedulers: the stages of a YAML file, run in order."""

from cvae_dist.pipeline.file import read_pipeline
from cvae_dist.pipeline.stages import PipelineResult, StageResult, run

__all__ = ["PipelineResult", "StageResult", "read_pipeline", "run"]
