"""Programs that measure: `python -m mim_torchrec.benchmarks.<room>.<program>`, or `torchx run mim.bench`."""

from mim_torchrec.extras import require

require("report", "train")
