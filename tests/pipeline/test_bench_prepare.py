"""What `make bench-prepare` makes of its measurements."""

import json

import pytest

from mim_torchrec.benchmarks.records.registry import BENCHMARKS
from mim_torchrec.benchmarks.speed.prepare import growth, main, sections
from mim_torchrec.errors import OptionError


def measured(events: int, cpu: float, peak: float) -> dict[str, float]:
    return {"events": events, "cpu": cpu, "peak_mib": peak, "start_mib": 300.0}


def test_the_rate_is_that_of_the_slowest_larger_log_over_the_smallest():
    found = growth({40: measured(40, 5.0, 900), 10: measured(10, 1.0, 500), 20: measured(20, 1.6, 800)})
    assert list(found["sizes"]) == ["10", "20", "40"]
    assert [one["added_mib"] for one in found["sizes"].values()] == [200, 500, 600]
    assert found["rate"] == pytest.approx(0.8)
    assert growth({10: measured(10, 1.0, 500)})["rate"] == 1.0


def test_the_record_says_what_the_pages_need():
    (one,) = (own for own in BENCHMARKS if own.name == "prepare")
    report = json.loads(one.record.read_text())
    beside, by_size, _ = sections(report)
    assert len(beside.rows) == 2 and len(by_size.rows) == 1 + len(report["config"]["fractions"])
    assert growth({1: measured(1, 1.0, 400)}).keys() == report["scale"].keys()


def test_a_fraction_of_more_than_all_is_refused(tmp_path):
    with pytest.raises(OptionError, match="--fractions are between 0 and 1"):
        main(["--out", str(tmp_path), "--fractions", "1.5"])
