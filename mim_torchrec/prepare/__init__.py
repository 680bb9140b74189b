"""From a shop's event logs and catalogue to a data set: `mim prepare`."""

from mim_torchrec.extras import require

require("prepare")
