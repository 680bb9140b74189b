"""Pages of any sections: JSON for programs, Markdown and HTML for people."""

import io
import json

import pytest
from PIL import Image

from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, Strip, targets_section, write_pages


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


SECTIONS = [
    Section("Sizes & shapes", text=["A word."], columns=["name", "auc"], rows=[["a<b", "0.5"], ["c", "0.6"]]),
    Section("Seen", images=["seen.png"]),
]


def test_all_three_pages_are_written(tmp_path):
    report = write_pages({"rows": 2}, "A title", "What it is.", SECTIONS, {"seen.png": picture()}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == 2 == report["rows"]
    assert report["hardware"]["cores"] >= 1
    markdown = (tmp_path / "report.md").read_text()
    assert "| name | auc | \n|---|---|\n| a<b | 0.5 | \n| c | 0.6 | \n" in markdown
    assert "![Seen](seen.png)" in markdown
    html = (tmp_path / "report.html").read_text()
    assert (
        '<td data-column="name">a&lt;b</td>' in html
        and "Sizes &amp; shapes" in html
        and "data:image/png;base64," in html
    )
    assert (tmp_path / "seen.png").read_bytes() == picture()


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_pages({"auc": float("nan")}, "t", "s", [], {}, tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_thresholds_stand_beside_their_values_where_there_are_any():
    told = target("gains", 0.02, True, "> 0")
    section = targets_section([told, target("ratio is at most 2", 3.0, False)])
    assert section.columns == ["claim", "value", "threshold", ""]
    assert section.rows == [["gains", "0.02", "> 0", "met"], ["ratio is at most 2", "3", "", "NOT MET"]]
    assert targets_section([target("ratio is at most 2", 3.0, False)]).columns == ["claim", "value", ""]


def test_a_strip_shows_its_pictures_and_says_what_they_are(tmp_path):
    strips = [Strip([(b"one", "a hat"), (b"two", "a <shoe>")], "the shoe: rank 5 by Base, 1 by MIM")]
    write_pages({}, "t", "s", [Section("Moved", strips=strips)], {}, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert '<img alt="a hat" src="data:image/jpeg;base64,b25l">' in html and 'alt="a &lt;shoe&gt;"' in html
    assert "## Moved\n\n- the shoe: rank 5 by Base, 1 by MIM\n" in (tmp_path / "report.md").read_text()
