"""Serving: dense weights on the computation machine, rows from a parameter store (§3.5, CMD)."""

from mim_torchrec.extras import require

require("serving", "train")
