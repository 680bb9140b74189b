"""Table 2 by category: what a subset holds, its counts, and the page in the paper's form."""

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mim_torchrec.benchmarks.harness.stages import Run, Stage
from mim_torchrec.benchmarks.paper import subsets, table2
from mim_torchrec.benchmarks.paper.data_sets import DataSet
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.errors import OptionError
from tests.pipeline.test_ctr_main import write_dataset

LINE = dict.fromkeys(table2.OF_SUBSETS, 0.0) | {"paper_delta": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("subsets") / "data"
    write_dataset(out)
    return out


def read(data: Path) -> dict[str, list[dict]]:
    return {split: pq.read_table(Dataset(data).requests(split)).to_pylist() for split in SPLITS}


def test_a_subset_holds_the_candidates_of_a_category_and_whole_histories(data, tmp_path):
    requests = subsets.read_requests(data)
    out = subsets.write_subset(data, requests, "c1", tmp_path / "c1")
    for split, whole in read(data).items():
        expected = []
        for row in whole:
            kept = [k for k, name in enumerate(row["candidate_categories"]) if name == "c1"]
            lists = ("candidate_item_ids", "candidate_categories", "labels")
            if kept:
                expected.append(row | {name: [row[name][k] for k in kept] for name in lists})
        assert read(out)[split] == expected
        assert 0 < len(expected) < len(whole)
    assert pq.read_schema(Dataset(out).requests("test")[0]).equals(
        pq.read_schema(Dataset(data).requests("test")[0])
    )
    assert list((out / "items").iterdir())


def test_counts_are_those_of_table_1(data):
    rows = [row for part in read(data).values() for row in part]
    shown = [item for row in rows for item in row["candidate_item_ids"]]
    assert subsets.counts(subsets.read_requests(data)) == {
        "#Data": len(shown), "#Query": len({row["query_id"] for row in rows}),
        "#Users": len({row["user_id"] for row in rows}), "#Items": len(set(shown)),
    }  # fmt: skip


def test_the_largest_categories_are_those_with_the_most_impressions_in_training(data):
    shown: dict[str, int] = {}
    for row in read(data)["train"]:
        for name in row["candidate_categories"]:
            shown[name] = shown.get(name, 0) + 1
    requests = subsets.read_requests(data)
    found = subsets.largest_categories(requests, 4)
    assert [shown[name] for name in found] == sorted(shown.values(), reverse=True)
    with pytest.raises(OptionError, match="5 categories are asked for, the training requests have 4"):
        subsets.largest_categories(requests, 5)


def test_models_of_a_column_are_trained_on_its_subset_and_the_page_has_the_paper_s_form(
    data, tmp_path, monkeypatch
):
    trained: dict[str, Path] = {}

    def compare(run: Run, data_set: DataSet, config: table2.Table2Config) -> DataSet:
        trained[data_set.name] = data_set.data.out
        return data_set

    monkeypatch.setattr(table2, "compare", compare)
    monkeypatch.setattr(table2, "line", lambda of, ubm: LINE | {"mim_auc": float(of.name[-1])})
    stage = Stage(name="data", command=("shop",), out=data)
    whole = DataSet(name="shop", title="", data=stage, table=dataclasses.replace(stage, name="t"), options={})
    config = table2.Table2Config(out=tmp_path, models=("din", "sim"), categories=2)
    lines = {ubm: LINE | {"mim_auc": 0.5} for ubm in config.models}
    report, sections = table2.by_category(config, Run(tmp_path), whole, lines)
    columns = report["columns"]
    assert columns[0] == "ALL" and len(columns) == 3
    for place, category in enumerate(columns[1:]):
        of_category = read(trained[f"shop-category-{place}"])
        names = {
            name for rows in of_category.values() for row in rows for name in row["candidate_categories"]
        }
        assert names == {category}
        assert report["counts"][category] == subsets.counts(
            subsets.read_requests(trained[f"shop-category-{place}"])
        )
        assert report["models"]["sim"][category]["mim_auc"] == float(place)
    ours, counts, paper, paper_counts = sections
    assert [row[:2] for row in ours.rows[:3]] == [["din", "Base"], ["din", "Base+MIM"], ["din", "Δ"]]
    assert ours.rows[1][2:] == ["0.5000", "0.0000", "1.0000"]
    assert counts.rows[0][1] == f"{report['counts']['ALL']['#Data']:,}"
    assert paper.rows[0] == ["din", "Base", "0.7004", "0.6969", "0.7187", "0.6986", "0.6928", "0.6753",
                             "0.7099", "0.6802"]  # fmt: skip
    assert len(paper.columns) == 2 + 8 == 2 + len(subsets.COLUMNS)
    assert paper_counts.rows[0][:3] == ["#Data", "1.83+ B", "51.6+ M"]


def test_the_paper_s_differences_are_those_of_its_columns_but_for_rounding():
    for base, mim, delta in subsets.PAPER.values():
        for one, other, printed in zip(base, mim, delta, strict=True):
            assert other - one == pytest.approx(printed, abs=2.1e-4)
