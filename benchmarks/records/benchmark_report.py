"""Write the benchmark report, `benchmarks/README.md`, from the recorded results: `make benchmark-report`.

Every figure of it comes from `benchmarks/results/*.json`, and images are drawn from them; a test
holds the page to what this program makes of the records.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.pages import hardware, jinja, number, versions
from mim_torchrec.benchmarks.records.bench import SMALL
from mim_torchrec.benchmarks.records.figures import draw
from mim_torchrec.benchmarks.records.registry import BENCHMARKS, EXPERIMENTS, RESULTS, Benchmark

PAGE = RESULTS.parent / "README.md"
TEMPLATE = Path(__file__).with_name("benchmark_report.md.jinja")


def sizes(config: Mapping[str, Any]) -> str:
    """One line about a configuration."""
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in config.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items() if name != "out")


def about(benchmark: Benchmark) -> str:
    """What a benchmark says of itself, without its first line."""
    text = inspect.getdoc(importlib.import_module(f"mim_torchrec.benchmarks.{benchmark.module}")) or ""
    paragraphs = [part for part in text.split("\n\n")[1:] if not part.startswith("    ")]
    return "\n\n".join(paragraphs)


def render(records: Path = RESULTS) -> tuple[str, dict[str, bytes]]:
    """The page, and its images by file name."""
    shown, images = [], {}
    for benchmark in BENCHMARKS:
        path = records / benchmark.record.name
        record = json.loads(path.read_text()) if path.exists() else None
        figures = benchmark.read(record) if record is not None else {}
        if record is not None:
            images[f"{benchmark.name}.png"] = draw(benchmark.name, record)
        met = "–" if record is None else (
            f"{sum(t['met'] for t in record['targets'])} of {len(record['targets'])}"
        )  # fmt: skip
        anchor = "".join(c for c in benchmark.title.lower() if c.isalnum() or c in " -").replace(" ", "-")
        shown.append({
            "name": benchmark.name, "module": benchmark.module, "target": benchmark.target,
            "title": benchmark.title, "anchor": anchor,
            "about": about(benchmark), "record": record, "figures": figures, "met": met,
            "date": "–" if record is None else record["date"][:10],
        })  # fmt: skip
    environment = jinja(escape=False)
    environment.filters |= {"number": number, "hardware": hardware, "versions": versions, "sizes": sizes}
    small = records / SMALL.name
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        benchmarks=shown, experiments=EXPERIMENTS,
        small=json.loads(small.read_text()) if small.exists() else None,
    )  # fmt: skip
    return f"{page.rstrip()}\n", images


def main(argv: list[str]) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.records.benchmark_report`."""
    page, images = render()
    PAGE.write_text(page, encoding="utf-8")
    for name, image in images.items():
        (RESULTS / name).write_bytes(image)
    print(f"{PAGE.name}: {len(BENCHMARKS)} benchmarks, {len(images)} images")


if __name__ == "__main__":
    program.run(main)
