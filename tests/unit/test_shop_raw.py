"""Raw logs of the synthetic shop: damaged as real ones are, and with nothing lost."""

import json

import pyarrow.parquet as pq
import pytest

from mim_torchrec.benchmarks.paper.prepare_demo import compare_rows
from mim_torchrec.data.shop import ShopConfig, make_shop
from mim_torchrec.errors import OptionError, OutputExists
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare

SIZES = {"items": 300, "users": 60, "requests": 400, "searches": 50, "browsing": 600, "categories": 4,
         "image_size": 16, "max_behaviors": 8}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    make_shop(ShopConfig(out=root / "shop", raw=root / "raw", **SIZES))
    prepare(PrepareConfig(
        mapping=root / "raw" / "prepare.toml", out=root / "prepared", log_lag=0, label_window=60,
        behaviors=("click",), max_behaviors=8, validation_from="2024-02-18", test_from="2024-02-24",
        threads=1, memory="1GB",
    ))  # fmt: skip
    return root


def test_prepared_requests_are_those_of_the_shop(root):
    rows = compare_rows(root / "prepared", root / "shop")
    assert [part["shop"] for part in rows.values()] == [320, 40, 40]
    assert all(part["prepared"] == part["equal"] for part in rows.values())
    left_out = json.loads((root / "prepared" / "prepare.json").read_text())["requests"]
    missing = sum(part["shop"] - part["prepared"] for part in rows.values())
    assert missing == left_out["too_young_for_their_label"] <= 2


def test_prepared_pairs_are_those_of_the_shop(root):
    found, own = (pq.read_table(root / name / "pairs").to_pylist() for name in ("prepared", "shop"))
    keys = ("item_id", "signal", "ts", "query_image")
    assert [tuple(row[key] for key in keys) for row in found] == [
        tuple(row[key] for key in keys) for row in own
    ]  # fmt: skip


def test_the_logs_are_damaged(root):
    counts = json.loads((root / "prepared" / "prepare.json").read_text())
    shown = counts["input"]["impression"]
    assert min(shown["incomplete"], shown["repeated"], shown["of_unknown_items"]) > 0
    assert 0 < counts["items"]["without_image"] < 20
    late = pq.read_table(root / "raw" / "impressions" / "dt=2024-01-02", partitioning=None)
    days = {ts // 86_400_000_000 for ts in late["shown_at"].to_pylist()}
    assert len(days) <= 2 and 19724 in days


def test_raw_logs_alone(tmp_path):
    make_shop(ShopConfig(raw=tmp_path / "raw", **SIZES))
    assert not (tmp_path / "shop").exists() and (tmp_path / "raw" / "catalog.parquet").exists()
    with pytest.raises(OutputExists, match="raw exists"):
        make_shop(ShopConfig(raw=tmp_path / "raw", **SIZES))
    with pytest.raises(OptionError, match="--out .* --raw"):
        make_shop(ShopConfig(**SIZES))
