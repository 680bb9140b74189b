"""Write the benchmark book, `benchmarks/README.md`, from the recorded results: `make book`.

Every figure of the book comes from `benchmarks/results/*.json`, and pictures are drawn from them; a test
holds the page to what this program makes of the records.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.bench import SMALL
from benchmarks.pictures import draw
from benchmarks.registry import BENCHMARKS, EXPERIMENTS, RESULTS, Benchmark
from mim_torchrec import program
from mim_torchrec.training.pages import number

BOOK = Path(__file__).with_name("README.md")
TEMPLATE = Path(__file__).with_name("book.md.jinja")


def hardware(found: Mapping[str, Any]) -> str:
    """One line about a machine."""
    gpus = ", ".join(map(str, found["gpus"])) or "no GPU"
    return f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {gpus}"


def versions(found: Mapping[str, str]) -> str:
    """One line about packages."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def sizes(config: Mapping[str, Any]) -> str:
    """One line about a configuration."""
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in config.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items() if name != "out")


def about(benchmark: Benchmark) -> str:
    """What a benchmark says of itself, without its first line."""
    text = inspect.getdoc(importlib.import_module(f"benchmarks.{benchmark.name}")) or ""
    paragraphs = [part for part in text.split("\n\n")[1:] if not part.startswith("    ")]
    return "\n\n".join(paragraphs)


def render(records: Path = RESULTS) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    shown, pictures = [], {}
    for benchmark in BENCHMARKS:
        path = records / benchmark.record.name
        record = json.loads(path.read_text()) if path.exists() else None
        figures = benchmark.read(record) if record is not None else {}
        if record is not None:
            pictures[f"{benchmark.name}.png"] = draw(benchmark.name, record)
        met = "–" if record is None else (
            f"{sum(t['met'] for t in record['targets'])} of {len(record['targets'])}"
        )  # fmt: skip
        anchor = "".join(c for c in benchmark.title.lower() if c.isalnum() or c in " -").replace(" ", "-")
        shown.append({
            "name": benchmark.name, "target": benchmark.target, "title": benchmark.title, "anchor": anchor,
            "about": about(benchmark), "record": record, "figures": figures, "met": met,
            "date": "–" if record is None else record["date"][:10],
        })  # fmt: skip
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"number": number, "hardware": hardware, "versions": versions, "sizes": sizes}
    small = records / SMALL.name
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        benchmarks=shown, experiments=EXPERIMENTS,
        small=json.loads(small.read_text()) if small.exists() else None,
    )  # fmt: skip
    return page, pictures


def main(argv: list[str]) -> None:
    """Entry point of `python -m benchmarks.book`."""
    page, pictures = render()
    BOOK.write_text(page, encoding="utf-8")
    for name, picture in pictures.items():
        (RESULTS / name).write_bytes(picture)
    print(f"{BOOK.name}: {len(BENCHMARKS)} benchmarks, {len(pictures)} pictures")


if __name__ == "__main__":
    program.run(main)
