"""Stage: content-interest-aware supervised fine-tuning (section 3.3)."""

from mim_torchrec.extras import require

require("encoders", "train")
