"""Vision, text and fusion encoders of an item (section 3.3, Q2)."""

from mim_torchrec.extras import require

require("encoders")
