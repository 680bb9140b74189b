"""Pages of any sections: JSON for programs, Markdown and HTML for people."""

import io
import json

import pytest
from PIL import Image

from mim_torchrec.benchmarks.harness.pages import Section, write_pages


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
    assert "<td>a&lt;b</td>" in html and "Sizes &amp; shapes" in html and "data:image/png;base64," in html
    assert (tmp_path / "seen.png").read_bytes() == picture()


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_pages({"auc": float("nan")}, "t", "s", [], {}, tmp_path)
    assert not (tmp_path / "report.json").exists()
