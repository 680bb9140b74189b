"""Stage: from an encoder to the table of every item's vector (section 3.5)."""

from mim_torchrec.extras import require

require("encoders", "train")
