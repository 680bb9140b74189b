"""`mim validate`: each kind of problem is found with its count and its first place, and good data is good."""

import json

import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import PAIRS, REQUESTS
from mim_torchrec.validate.main import main
from mim_torchrec.validate.report import sampled
from tests.datasets import SECOND, item_rows, pair_rows, request_rows, write_items, write_rows

LATER = {"train": 0, "validation": 10_000, "test": 20_000}
"""Seconds after the first requests."""


def requests_of(split: str, count: int = 12) -> list[dict]:
    rows = request_rows(count)
    for row in rows:
        row["request_id"] += LATER[split]
        row["ts"] += LATER[split] * SECOND
        row["behavior_ts"] = [ts + LATER[split] * SECOND for ts in row["behavior_ts"]]
    return rows


@pytest.fixture
def parts() -> dict[str, list[dict]]:
    """Rows of every folder, which a test changes."""
    return {"items": item_rows(), "pairs": pair_rows(), **{split: requests_of(split) for split in LATER}}


@pytest.fixture
def check(tmp_path, capsys, parts):
    """Write the rows, check them; returns the report and what a person reads."""

    def run(*flags: str) -> tuple[dict, str]:
        root = tmp_path / "data"
        write_items(root / "items" / "part-0.parquet", parts["items"])
        if parts["pairs"]:
            write_rows(root / "pairs" / "part-0.parquet", parts["pairs"], PAIRS)
        for split in LATER:
            write_rows(root / "requests" / split / "part-0.parquet", parts[split], REQUESTS)
        out = tmp_path / "report.json"
        try:
            main([str(root), "--out", str(out), *flags])
            failed = False
        except DataError as error:
            assert "see above" in str(error)
            failed = True
        report = json.loads(out.read_text())
        assert failed == bool(report["errors"])
        return report, capsys.readouterr().out

    return run


def test_good_data_has_facts_and_no_errors(check, parts):
    report, shown = check()
    assert report["errors"] == []
    train = report["facts"]["requests/train"]
    labels = [label for row in parts["train"] for label in row["labels"]]
    histories = [len(row["behavior_item_ids"]) for row in parts["train"]]
    assert (train["rows"], train["candidates"]) == (12, len(labels))
    assert train["positive"] == pytest.approx(sum(labels) / len(labels))
    assert train["behaviors a request"] == pytest.approx(sum(histories) / 12)
    assert train["without history"] == pytest.approx(histories.count(0) / 12)
    assert report["facts"]["requests/test"]["of new users"] == 0
    assert report["facts"]["items"]["images decoded"] == 10
    assert report["facts"]["pairs"]["images decoded"] == 8
    assert "requests/train" in shown and all("rows on average" in one for one in report["warnings"])


def test_every_kind_of_bad_row_is_counted_with_its_first_place(check, parts):
    rows = parts["train"]
    rows[1]["labels"] = [2] * len(rows[1]["labels"])
    rows[6]["labels"] = [3] * len(rows[6]["labels"])
    rows[5]["user_id"] = None
    rows[4]["behavior_ts"] = [rows[4]["ts"]] * len(rows[4]["behavior_item_ids"])
    report, shown = check()
    errors = report["errors"]
    assert len(errors) == 3
    (labels,) = (one for one in errors if "a label is neither 0 nor 1" in one)
    assert labels.startswith("requests/train: 2 rows:") and "row group 0, row 1, column labels" in labels
    assert any("1 row: is null" in one and "row group 1, row 1, column user_id" in one for one in errors)
    (late,) = (one for one in errors if "a behavior is not before its request" in one)
    assert "row group 1, row 0, column behavior_ts" in late
    assert report["facts"]["requests/train"]["rows"] == 12
    assert all(one in shown for one in errors) and "--on-bad-row skip" in shown


def test_problems_of_all_parts_are_found_in_one_run(check, parts):
    parts["items"][2]["image"] = b"no image"
    parts["pairs"][3]["query_image"] = b"no image"
    parts["pairs"][5]["item_id"] = 999
    for row in parts["validation"]:
        row["labels"] = [0] * len(row["labels"])
    report, _ = check()
    assert len(report["errors"]) == 4
    assert any("items: 1 row: the image cannot be decoded" in one for one in report["errors"])
    assert any("pairs: 1 row: the image cannot be decoded" in one for one in report["errors"])
    assert any("pairs: 1 row: item of the pair is not in the item table" in one for one in report["errors"])
    assert any("requests/validation: every candidate is not clicked" in one for one in report["errors"])


def test_what_looks_wrong_is_a_warning(check, parts):
    parts["test"] = requests_of("train")
    parts["train"][0]["candidate_item_ids"] = [12345]
    parts["validation"][1]["request_id"] = parts["validation"][0]["request_id"]
    parts["pairs"] = []
    report, _ = check("--images", "0")
    warnings = "\n".join(report["warnings"])
    assert report["errors"] == []
    assert "requests/test: 12 request ids are in requests/train as well" in warnings
    assert "before requests/train ends" in warnings and "before requests/validation ends" in warnings
    assert "requests/train: 1 candidates are not in the item table" in warnings
    assert "requests/validation: 1 rows repeat a request id" in warnings
    assert "mim csft needs them" in warnings
    assert report["facts"]["items"]["images decoded"] == 0


def test_an_id_that_is_there_twice_leaves_the_rest_checked(check, parts):
    parts["items"][1]["item_id"] = parts["items"][0]["item_id"]
    parts["train"][2]["labels"] = [5] * len(parts["train"][2]["labels"])
    report, _ = check()
    assert len(report["errors"]) == 2
    assert any("is there twice" in one for one in report["errors"])
    assert any("pairs: not checked" in one for one in report["warnings"])


def test_a_sample_reads_some_row_groups(check, parts):
    parts["train"][5]["user_id"] = None  # in the second of three row groups
    report, _ = check("--sample", "0.34")
    assert report["errors"] == [] and report["facts"]["requests/train"]["rows"] == 4
    assert [sampled(range(count), 0.5) for count in (0, 1, 5)] == [[], [0], [0, 2]]


def test_further_columns_are_checked(check):
    report, _ = check("--sparse-features", "city")
    assert len(report["errors"]) == 3 and "column city: the column is missing" in report["errors"][0]
