"""Every benchmark: how it is started, what it says that reruns are compared by, and how it is made small.

A figure is a place in `report.json`, or a quotient of two: ratios of what was measured side by side in one
run, or counts, so that another machine gives them again as nearly as may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Figure = str | tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A program that measures cost.

    Args:
        name: of its record in `results/`.
        module: below `mim_torchrec.benchmarks`.
        target: of the Makefile.
        title: what it is about.
        small: words of its command line that make it small.
        figures: what reruns are compared by: a path of keys, with `|` between them, or two for a quotient.
    """

    name: str
    module: str
    target: str
    title: str
    small: tuple[str, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The last result at full size."""
        return RESULTS / f"{self.name}.json"

    def read(self, report: Mapping[str, Any]) -> dict[str, float]:
        """The figures of a report.

        Raises:
            KeyError: the report lacks one; the message names it.
        """
        return {label: _value(report, figure, self.name) for label, figure in self.figures.items()}


@dataclass(frozen=True)
class Experiment:
    """A program whose result is no cost: it compares how well models predict, or counts what faults break."""

    name: str
    target: str
    title: str
    room: str = "paper"

    @property
    def module(self) -> str:
        """Below `mim_torchrec.benchmarks`."""
        return f"{self.room}.{self.name}"


def _value(report: Mapping[str, Any], figure: Figure, name: str) -> float:
    if isinstance(figure, tuple):
        above, below = (_value(report, one, name) for one in figure)
        return above / below
    found: Any = report
    for key in figure.split("|"):
        if not isinstance(found, Mapping) or key not in found:
            raise KeyError(f"the report of {name} has no {figure}")
        found = found[key]
    return float(found)


BENCHMARKS: Sequence[Benchmark] = (
    Benchmark(
        name="efficiency", module="paper.efficiency.main",
        target="table6", title="Table 6: what MIM costs beside Base",
        small=("--preset", "small", "--rounds", "2"),
        figures={
            "E2E training over the forward pass of the foundation models": "e2e_over_forward",
            "MIM over Base in training, GFLOPs": "fixed|rows|mim|train|gflops_delta",
            "MIM over Base in training, memory": "fixed|rows|mim|train|memory_delta",
            "w/o RC over Base in training, GFLOPs": "rows|wo_rc|train|gflops_delta",
        },
    ),
    Benchmark(
        name="scaling", module="speed.scaling",
        target="bench-scaling", title="How a training step grows, to the paper's scale",
        small=("--histories", "20", "50", "100", "--batches", "64", "256", "--table-rows", "100000",
               "1000000", "--batch-size", "128", "--max-behaviors", "50", "--dim", "16", "--rounds", "5"),
        figures={
            "power of the history in MIM's step time": "growth|1|history|mim|step_ms",
            "power of the history in MIM's memory of a step": "growth|1|history|mim|step_mb",
            "memory of a step, MIM over Base, history 100":
                "measured|1|history|100|mim_over_base|step_mb",
            "step time, largest table over smallest": "growth|1|table_rows|step_ms",
        },
    ),
    Benchmark(
        name="frozen_table", module="speed.frozen_table",
        target="bench-frozen-table", title="A frozen table beside its alternatives",
        small=("--rows", "100000", "--dim", "64", "--requests", "256", "--rounds", "11", "--scale-rows", "0",
               "--tier-rows", "2000000", "--tier-turns", "3", "--index-items", "5000000"),
        figures={
            "lookup of fp32, through DMP, over index_select": "lookup|fp32|vs_index_select",
            "lookup of fp16, through DMP, over index_select": "lookup|fp16|vs_index_select",
            "stored rows of fp32, without DMP, over index_select": "lookup|fp32|gather_vs_index_select",
            "stored rows of fp16, without DMP, over index_select": "lookup|fp16|gather_vs_index_select",
            "stored rows of int8, without DMP, over index_select": "lookup|int8|gather_vs_index_select",
            "step, frozen over trainable": ("step|1|frozen|seconds", "step|1|trainable|seconds"),
            "bytes of int8 over fp16": "int8|bytes_vs_fp16",
            "index: 10,000 new items at any age over the first 10,000": "index|add_ratio",
            "index: lookup over np.searchsorted": "index|rows_vs_searchsorted",
            "index: bytes per id, two ranks together": "index|bytes_per_id",
            "training from an SSD over training in memory": "tiers|ssd_vs_memory",
        },
    ),
    Benchmark(
        name="csft_loss", module="speed.csft_loss",
        target="bench-csft-loss", title="The contrastive loss at the size of the paper",
        small=("--queries", "256", "--queue-batches", "50", "--steps", "2", "--naive-items", "8192",
               "--rounds", "11", "--loop-queries", "16"),
        figures={
            "time over the naive loss": "naive|time_ratio",
            "memory beyond inputs and queue, MiB": "paper_scale|extra_mib",
            "relative error of the gradients": "naive|grad_rel_error",
        },
    ),
    Benchmark(
        name="export_throughput", module="speed.export_throughput",
        target="bench-export-throughput", title="Export beside its encoder",
        small=("--vision", "efficientnet_lite0:128", "--items", "96", "--rounds", "3"),
        figures={
            "export over forward passes, one thread": "encoders|efficientnet_lite0:128|1|ratio",
        },
    ),
    Benchmark(
        name="ctr_throughput", module="speed.ctr_throughput",
        target="bench-ctr-throughput", title="Training steps beside FuxiCTR's",
        small=("--dims", "16", "--candidates", "1", "--batch-size", "512", "--rounds", "21"),
        figures={
            **{f"samples per CPU-second over FuxiCTR's, {name}, dim 16": f"models|{name}|16|ratio"
               for name in ("din", "dien", "sim", "twin")},
            "MIM over Base, operations": "mim_overhead|flops",
            "MIM over Base, step time": "mim_overhead|step_time",
        },
    ),
    Benchmark(
        name="rim_latency", module="speed.rim_latency",
        target="bench-rim-latency", title="From the arrival of an item to its vector",
        small=("--items", "60", "--bursts", "2", "--base", "2000"),
        figures={
            **{f"p99 from arrival to lookup, {store} store, by {way}, ms": f"p99_ms|{store}|{way}"
               for store in ("embedded", "redis") for way in ("log", "stream")},
            "encoder, an item by itself, ms": "encoder_alone_ms",
        },
    ),
    Benchmark(
        name="serving", module="speed.serving",
        target="bench-serving", title="What a score costs at serving",
        small=("--behaviors", "50", "1000", "--models", "sim/paper", "--items", "20000", "--rounds", "31",
               "--requests", "60"),
        figures={
            "direct sum over matrix, 1,000 behaviors, d 64": "forms|64|1000|ratio",
            "direct sum over matrix, 1,000 behaviors, d 128": "forms|128|1000|ratio",
            "score as in training over ours, 1,000 behaviors":
                ("models|sim/paper|1000|plain_ms", "models|sim/paper|1000|built_ms"),
        },
    ),
    Benchmark(
        name="windows", module="speed.windows",
        target="bench-windows", title="A window at the age of production",
        small=("--ages", "10", "10000", "100000", "--rounds", "200"),
        figures={
            f"{label}, oldest over youngest": f"{step}_ratio"
            for step, label in (("append", "appending a window"), ("head", "number of the newest window"),
                                ("apply", "applying a window"), ("index_add", "adding items to an index"))
        },
    ),
    Benchmark(
        name="input", module="speed.input",
        target="bench-input", title="The input of a CTR model",
        small=("--requests", "40000", "--row-groups", "1000", "20000", "40000", "--rounds", "3",
               "--startup-requests", "10000", "--startup-sizes", "1", "2", "--train-requests", "4000"),
        figures={
            **{f"reader and mapping over a raw scan, CPU, row groups of {rows}": f"reader|cpu_over_raw|{rows}"
               for rows in ("1000", "20000")},
            "two readers over one": "reader|two_over_one",
        },
    ),
    Benchmark(
        name="prepare", module="speed.prepare",
        target="bench-prepare", title="Raw logs prepared, beside a query that reads and sorts them",
        small=("--impressions", "200000", "--rounds", "3", "--fractions", "0.5", "--spark-impressions", "0"),
        figures={
            "prepare over the bare query, CPU": "over_bare_cpu",
            "events a second of CPU, at any size over the smallest": "scale|rate",
        },
    ),
    Benchmark(
        name="chaos", module="chaos.main",
        target="chaos", title="Kills, duplicates, gaps and other versions",
        small=("--kills", "40", "--items", "1500", "--requests", "500", "--injected", "100"),
        figures={name: name for name in ("wrong", "lost", "doubled", "kills", "rows")},
    ),
)  # fmt: skip

EXPERIMENTS: Sequence[Experiment] = (
    Experiment("demo", "demo", "Every stage on a synthetic shop: Base, MIM, negative controls"),
    Experiment("prepare_demo", "prepare-demo", "Raw logs of a shop, prepared: the same rows, the same AUC"),
    Experiment("movielens", "movielens DATA=<folder>", "The real job on films and posters"),
    Experiment("table2", "table2 [DATA=<folder>]", "Table 2: six user behavior models with and without MIM"),
    Experiment("ablation_csft", "ablation-csft", "Tables 3, 4, 5: pre-training, C-SFT and its parts"),
    Experiment("ablation_ciubm", "ablation-ciubm [DATA=<folder>]", "Table 5: the parts of CiUBM"),
    Experiment("figure5", "figure5 [DATA=<folder>]", "Figure 5: foundation models by cost and by AUC"),
    Experiment("coldstart", "coldstart [DATA=<folder>]", "Figure 6: gains by the age of an item"),
    Experiment(
        "value", "value [DATA=<folder>]", "MIM beside Base, a model without ids, a regression, their ensemble"
    ),
    Experiment(
        "daily", "daily [DATA=<folder>]", "Models of every day, with tables that grow and bounded ones"
    ),
    Experiment("abtest", "abtest", "Table 7: a simulated online test"),
    Experiment("disk_faults", "faults", "Every call of every writer fails once", room="chaos"),
    Experiment(
        "torchrec_parity", "torchrec-parity", "Frozen collections beside TorchRec's own", room="parity"
    ),
    Experiment(
        "rehearsal", "rehearsal", "Every stage on a pretended GPU: launches, waits, uploads", room="rehearsal"
    ),
    Experiment("cuda_wheel", "cuda-check", "Operators of fbgemm without a kernel for GPUs", room="rehearsal"),
)
