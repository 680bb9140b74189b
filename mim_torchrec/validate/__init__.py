"""Everything that the readers check, before any training: `mim validate`."""

from mim_torchrec.extras import require

require("train")
