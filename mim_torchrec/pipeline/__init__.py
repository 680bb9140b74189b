"""Pipelines: the stages of a run in one typed file, submitted through TorchX to any scheduler."""

from mim_torchrec.extras import require

require("launch")
