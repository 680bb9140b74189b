"""Programs that measure: `python -m mim_torchrec.benchmarks.<room>.<program>`, or `torchx run mim.bench`."""

import logging

from mim_torchrec.extras import require

require("report", "train")

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written: it caches elsewhere
