"""New items into the representation center while training and serving run (§3.5, RIM)."""

from mim_torchrec.extras import require

require("encoders", "train")
