"""TorchX components, one a stage."""

from mim_torchrec.extras import require

require("launch")
