"""`mim ctr --sparse-features --dense-features` through its `main`: trained on, resumed, evaluated, grown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.vocabulary import Vocabulary
from tests.pipeline.test_ctr_main import SMALL, write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.ranks import run_ranks

FLAGS = ["--sparse-features", "candidate_brand", "mood", "--dense-features", "candidate_price",
         "--bucket-features", "hour", "6,12,18"]  # fmt: skip
MORE = {
    "candidate_brand": pa.list_(pa.string()), "mood": pa.int64(),
    "candidate_price": pa.list_(pa.float64()), "hour": pa.float64(),
}  # fmt: skip


def write_features(root: Path, brands: int = 5, query: bool = True) -> None:
    """The tiny data set, with brands that decide half of the clicks and columns that decide none."""
    write_dataset(root)
    rng = np.random.default_rng(8)
    for split in ("train", "validation", "test"):
        (file,) = (root / "requests" / split).iterdir()
        table = pq.read_table(file)
        rows = table.to_pylist()
        for row in rows:
            brand = rng.integers(brands, size=len(row["labels"]))
            luck = rng.random(len(brand)) < 0.5
            row["labels"] = [int(b % 2 == 0) if lucky else label
                             for b, lucky, label in zip(brand, luck, row["labels"], strict=True)]  # fmt: skip
            row |= {
                "candidate_brand": [f"b{b}" for b in brand], "mood": int(rng.integers(3)),
                "candidate_price": rng.lognormal(3, 1, len(brand)).tolist(),
                "hour": float(rng.uniform(0, 24)),
            }  # fmt: skip
        schema = pa.schema([*table.schema, *MORE.items()])
        made = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(made if query else made.drop_columns("query_id"), file, row_group_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("features")
    write_features(root / "data")
    write_table(root / "table", "styles")
    train(root, "with", *FLAGS)
    return root


def train(root: Path, out: str, *words: str, data: str = "data") -> None:
    paths = ["--data", str(root / data), "--table", str(root / "table"), "--out", str(root / out)]
    main([*paths, *SMALL, *words])


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_columns_that_decide_clicks_raise_the_auc(folder):
    train(folder, "without")
    assert metrics(folder / "with")["auc"] > metrics(folder / "without")["auc"] + 0.05


def test_unknown_ids_of_features_are_counted(folder):
    assert metrics(folder / "with")["unknown_ids"]["candidate_brand"] == 0


def test_evaluate_gives_what_training_reported(folder, tmp_path):
    evaluate(["--model", str(folder / "with"), "--out", str(tmp_path / "out"), "--draws", "20"])
    assert metrics(tmp_path / "out")["auc"] == pytest.approx(metrics(folder / "with")["auc"])


def stage(root: Path, out: str, *words: str) -> dict:
    train(root, out, *words)
    return metrics(root / out)


def test_two_ranks_report_what_one_reports(folder, tmp_path):
    words = ("--epochs", "1", *FLAGS)
    one, two = (run_ranks(stage, n, folder, f"ranks-{n}", *words)[0] for n in (1, 2))
    assert two["world_size"] == 2
    assert two["n"] == one["n"]
    assert two["unknown_ids"].keys() == one["unknown_ids"].keys()


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_ends_as_the_unbroken_one(folder):
    words = (*FLAGS, "--checkpoint.every", "4", "--checkpoint.keep", "9")
    whole = stage(folder, "whole", *words)
    checkpoints = sorted((folder / "whole" / "checkpoints").iterdir())
    middle = next(path for path in checkpoints if not path.name.endswith("step-00000000"))
    for later in checkpoints[checkpoints.index(middle) + 1 :]:
        shutil.rmtree(later)
    again = stage(folder, "whole", *words)
    assert (again["auc"], again["ne"]) == (whole["auc"], whole["ne"])


def test_a_warm_start_carries_the_tables_of_features_over(folder):
    write_features(folder / "tuesday", brands=9)
    train(folder, "second", *FLAGS, "--warm-start", str(folder / "with"), data="tuesday")
    old, new = (Vocabulary.load(folder / run / "vocabulary" / "candidate_brand.npz").ids.tolist()
                for run in ("with", "second"))  # fmt: skip
    assert set(old) < set(new)
    assert metrics(folder / "second")["auc"] > 0.6


def test_display_advertising_has_no_query(folder):
    write_features(folder / "ads", query=False)
    train(folder, "ads-run", *FLAGS, data="ads")
    assert "query_id" not in metrics(folder / "ads-run")["unknown_ids"]


def test_a_column_that_is_not_there_stops_before_training(folder):
    with pytest.raises(DataError, match="candidate_prize: the column is missing; add it"):
        train(folder, "bad", "--dense-features", "candidate_prize")
    assert not (folder / "bad" / "vocabulary").exists()
