"""The pages of Table 6: our figures, the paper's beside them, and what they count."""

from typing import Any

from mim_torchrec.benchmarks.harness.pages import Section, targets_section
from mim_torchrec.benchmarks.paper.efficiency.models import NAMES, TITLES

PHASES = {"train": "Training", "inference": "Inference"}
PAPER: dict[str, dict[str, tuple[float | None, ...]]] = {
    "base": {"train": (0.114, None, 1.1, None), "inference": (0.31, None, 0.68, None)},
    "wo_rc": {"train": (240.24, 2106.37, 10.15, 8.23), "inference": (240.11, 773.55, 9.85, 13.49)},
    "e2e": {"train": (720.38, 6318.12, 30.15, 26.41), "inference": (240.11, 773.55, 9.85, 13.49)},
    "mim": {"train": (0.182, 0.59, 1.11, 0.01), "inference": (0.43, 0.387, 0.81, 0.19)},
}
"""Table 6: GFLOPs, their Δ, gigabytes, their Δ."""

COUNTED = (
    "Memory is the peak of one step on one device: dense weights and tables of ids, in training "
    "gradients, state of the optimizers and activations, in scoring activations. The frozen table of "
    "multi-modal vectors is not in it and has a column of its own, with a vector in fp16 for every item "
    "of the ID table: it is divided over the ranks and lies in their memory or in the page cache of the "
    "hosts (docs/frozen_tables_manual.md), in the paper in some 300 GB of host memory. What it costs a "
    "step, the vectors that are looked up and all that is computed of them, is in the peak. Images and "
    "titles lie in host memory until a step encodes them. Operations count a multiply and an add as two."
)
INFERRED = (
    "The preset `table6` is inferred. Of the models that the paper names, EVA-02-B/14 and BGE-base with "
    "titles of 10 tokens and 5 encoded items a sample give its 240.07 GFLOPs for a forward pass. Its "
    "batch is 1,024, but its 30 GB for training end to end hold the activations of some 24 samples, so "
    "all rows here have 24. What the paper's Base is made of is not said. Ours has a small part of its "
    "0.114 GFLOPs, and the Δ of the rows with foundation models are larger for it: compare their absolute"
    " figures."
)
CONTRADICTIONS = (
    "The paper's inference columns contradict the others, and are printed here without being a target: "
    "Base takes more operations to infer (0.31) than to train (0.114), so they are in another unit, and "
    "for the memory of MIM the text says 0.81 where the table says 0.19. Scoring is the same for w/o RC "
    "and E2E."
)
WHY = (
    "MIM adds little because its vectors are rows of a frozen table: they have no gradient and no "
    "optimizer state, and the backward pass needs nothing of them but the relevance of each pair. The "
    "relevance is computed once for content and fusion interest. Both come before the ID interest, so "
    "that backward the gradient that fusion gives to behaviors is made when the largest tensors of the ID"
    " interest are gone, and vectors stay in the type of the table until they are computed with. What is "
    "left is a cosine and two weighted sums for each pair, and a wider first layer of the tower. These "
    "bytes depend on the batch, not on the tables, and so their share depends on what Base takes."
)


def summary(report: dict[str, Any]) -> str:
    """First paragraph of the pages."""
    config = report["config"]
    source = {
        "measured": "measured by the GPU's allocator",
        "estimated": "estimated from the storages alive on a CPU",
    }[report["memory"]]
    return (
        "SIM without and with MIM, whose vectors come from foundation models in the step (w/o RC), from ones "
        f"that are trained with it (E2E), or from a frozen table. {config['vision']} and {config['text']}, "
        f"{config['items_per_sample']} items a sample, {config['title_tokens']} tokens a title, "
        f"{config['samples']} samples a step, one candidate each; {config['id_rows']:,} rows in the table of "
        f"item ids. Memory is {source}. Δ = (A - Base) / Base."
    )


def sections(report: dict[str, Any]) -> list[Section]:
    """The parts of the pages."""
    pages = [_table(report, phase) for phase in PHASES]
    pages[0] = Section(
        pages[0].heading, text=[INFERRED, COUNTED], columns=pages[0].columns, rows=pages[0].rows
    )
    pages[1] = Section(pages[1].heading, text=[CONTRADICTIONS], columns=pages[1].columns, rows=pages[1].rows)
    pages.append(_fixed(report))
    if report["validation"] is not None:
        pages.append(_validation(report))
    pages.append(_time(report))
    pages.append(targets_section(report["targets"]))
    return pages


def _table(report: dict[str, Any], phase: str) -> Section:
    rows = []
    for name in NAMES:
        own, paper = report["rows"][name][phase], PAPER[name][phase]
        rows.append([
            TITLES[name],
            f"{own['gflops']:.4f}", f"{paper[0]:g}", *_deltas(name, own["gflops_delta"], paper[1]),
            f"{own['memory_gb']:.3f}", f"{paper[2]:g}", *_deltas(name, own["memory_delta"], paper[3]),
            f"{own['embedding_kb']:,.0f}",
            f"{report['frozen_table_gb']:.2f}" if name == "mim" else "-",
        ])  # fmt: skip
    columns = [
        "model", "GFLOPs a sample", "paper", "Δ", "paper's Δ", f"memory (GB), {report['memory']}", "paper",
        "Δ", "paper's Δ", "lookups (kB a sample)", "frozen table (GB)",
    ]  # fmt: skip
    return Section(PHASES[phase], columns=columns, rows=rows)


def _deltas(name: str, own: float, paper: float | None) -> list[str]:
    return ["-", "-"] if name == "base" else [f"{own:+,.3f}", f"{paper:+,g}"]


def _fixed(report: dict[str, Any]) -> Section:
    fixed = report["fixed"]
    parts = [
        (f"{report['config']['id_rows']:,}", fixed["rows"]),
        (f"{fixed['small_id_rows']:,}", fixed["rows_small_tables"]),
    ]
    rows = []
    for tables, both in parts:
        for phase, title in PHASES.items():
            base, mim = both["base"][phase], both["mim"][phase]
            rows.append([
                tables, title.lower(), f"{base['gflops']:.6f}", f"{mim['gflops']:.6f}",
                f"{mim['gflops_delta']:+.3f}", f"{base['memory_gb']:.4f}", f"{mim['memory_gb']:.4f}",
                f"{(mim['memory_gb'] - base['memory_gb']) * 1e3:+.1f}", f"{mim['memory_delta']:+.4f}",
            ])  # fmt: skip
    return Section(
        "What MIM adds to Base at the paper's batch",
        text=[
            f"{fixed['batch_size']:,} candidates a step as in `make bench-ctr-throughput`. Its tables of ids "
            "are so small that Base is hardly more than activations; with those of the rows above it takes "
            f"{fixed['rows']['base']['train']['memory_gb']:.2f} GB; the paper's takes 1.1 GB.",
            WHY,
        ],
        columns=["rows of item ids", "", "GFLOPs a sample, Base", "MIM", "Δ", "memory (GB), Base", "MIM",
                 "MB more", "Δ"],
        rows=rows,
    )  # fmt: skip


def _validation(report: dict[str, Any]) -> Section:
    config = report["config"]
    return Section(
        "The estimate of memory beside an allocator",
        text=[
            "Every storage that an operation returns counts until it is freed; foundation models run without "
            "values (FakeTensorMode) between the operations of the CTR model. Beside it stands what torch's "
            "own allocator of the CPU had handed out at most in the same step with all values. Base and MIM "
            f"have the batch above and small tables, the others {config['time_vision']} at "
            f"{config['time_image_size']} pixels, {config['time_text']}, {config['time_samples']} samples. "
            "What kernels take and give back within an operation is not seen: scoring by convolutional "
            "networks on a CPU, which lays out images again for each convolution, takes up to a quarter more "
            "than estimated.",
        ],
        columns=["model", "", "estimated (MB)", "allocator (MB)", "difference"],
        rows=[
            [TITLES[name], PHASES[phase].lower(), f"{v['estimated'] / 1e6:.1f}", f"{v['measured'] / 1e6:.1f}",
             f"{v['error']:+.2%}"]
            for name, phases in report["validation"].items() for phase, v in phases.items()
        ],
    )  # fmt: skip


def _time(report: dict[str, Any]) -> Section:
    config, timed = report["config"], report["wall_clock"]
    rows = []
    for name in NAMES:
        row = [TITLES[name]]
        for phase in PHASES:
            own = timed["rows"][name][phase]
            row += [f"{own['samples_per_second']:,.1f}", f"{own['speed_ratio']:.4f}"]
        rows.append(row)
    where = "a GPU" if timed["device"] == "cuda" else f"a CPU (threads: {timed['threads']})"
    return Section(
        "Samples per second",
        text=[
            f"Whole steps by the clock on {where}: {config['time_vision']} at {config['time_image_size']} "
            f"pixels and {config['time_text']}, {config['time_samples']} samples a step. Rows take turns; "
            f"medians of {config['rounds']} rounds, and of the ratios to Base within a round. The foundation "
            "models of the table would take w/o RC and E2E down further; Base and MIM have none.",
        ],
        columns=["model", "training", "of Base", "inference", "of Base"],
        rows=rows,
    )
