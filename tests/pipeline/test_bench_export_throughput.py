"""The benchmark of the export through its `main`, on a few small items; what is fast is not asked here."""

import json

import pytest
import torch

from mim_torchrec.benchmarks.speed.export_throughput import PARTS, main
from mim_torchrec.embeddings.table.format import Table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export_throughput")
    threads = torch.get_num_threads()
    main(["--out", str(out), "--vision", "test_resnet.r160_in1k:32", "--text", "bert-tiny", "--items", "20",
          "--image-px", "40", "--batch-size", "8", "--threads", "1", "2", "--rounds", "2"])  # fmt: skip
    assert torch.get_num_threads() == threads
    return out


def test_every_figure_is_there_and_follows_from_the_others(folder):
    report = json.loads((folder / "report.json").read_text())
    by_threads = report["encoders"]["test_resnet.r160_in1k:32"]
    assert list(by_threads) == ["1", "2"]
    for figures in by_threads.values():
        assert min(figures["ratio"], figures["in_turns_ratio"], figures["cpu_ratio"]) > 0
        assert figures["load_seconds"] > 0
    assert list(report["ms_per_item"]["test_resnet.r160_in1k:32"]) == list(PARTS)
    met = {entry["value"]: entry["met"] for entry in report["targets"]}
    assert met == {figures["ratio"]: figures["ratio"] >= 0.9 for figures in by_threads.values()}
    assert "in turns / bare" in (folder / "report.md").read_text()


def test_what_was_timed_is_a_whole_export(folder):
    table = Table.open(folder / "table")
    assert table.row_index().ids.tolist() == list(range(20))
