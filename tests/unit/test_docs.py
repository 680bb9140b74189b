"""What the documentation says of flags, names and sizes is what the code says."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.pretraining.config import PretrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {"mim pretrain": PretrainConfig, "mim csft": CSFTConfig, "mim ctr": CTRConfig}
ROW = re.compile(r"^\| `(mim \w+)` \| `--([\w.-]+)` \| `([^`]+)` \|", re.MULTILINE)
DEVIATIONS = ROW.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("command", "flag", "default"), DEVIATIONS, ids=lambda word: word)
def test_a_default_that_differs_from_the_paper_is_as_the_page_says(command, flag, default):
    value = asdict(CONFIGS[command](data=Path("data"), out=Path("out")))
    for name in flag.replace("-", "_").split("."):
        value = value[name]
    assert str(value) == default


def test_the_page_names_the_defaults_that_were_once_forgotten():
    flags = {flag for _, flag, _ in DEVIATIONS}
    assert {"temperature", "balance-queue", "mask-same-item", "queue-batches", "ubm"} <= flags


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
