"""Stage: pre-training of the towers on images and titles of the shop's own items (section 3.2)."""

from mim_torchrec.extras import require

require("encoders", "train")
