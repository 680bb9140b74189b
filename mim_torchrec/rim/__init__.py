"""RIM: new items are added to the representation center during training and serving (§3.5)."""

from mim_torchrec.extras import require

require("encoders", "train")
