"""What MIM costs beside Base, without a representation center and end to end (Table 6): `make table6`.

    make table6                            # a GPU is used where there is one
    CUDA_VISIBLE_DEVICES= make table6      # estimates, on the CPU

Four rows: Base (SIM), MIM whose foundation models infer the vectors in the step (w/o RC), MIM trained jointly
with them (E2E), and MIM. Of a training step and of scoring: floating-point operations a sample, bytes that
lookups move, peak memory. Samples per second are of smaller foundation models, which a CPU can train. On a
GPU memory is what its allocator hands out; without one it is estimated, and the estimate is compared with
the allocator of the CPU where models fit. The models, the items a sample and the samples in a step of the
preset `table6` are inferred from the paper's figures.
"""

import dataclasses
import time
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import write_pages
from mim_torchrec.benchmarks.paper.efficiency.config import parse
from mim_torchrec.benchmarks.paper.efficiency.measures import measure_table, measure_time, validate
from mim_torchrec.benchmarks.paper.efficiency.pages import sections, summary
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import distributed

FLOPS_TARGET, MEMORY_TARGET, ESTIMATE_TARGET, E2E_TARGET = 0.20, 0.01, 0.03, 0.02


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the measurement is to show."""
    ratio, fixed = report["e2e_over_forward"], report["fixed"]
    large, small = fixed["rows"], fixed["rows_small_tables"]
    base_gb = [rows["base"]["train"]["memory_gb"] for rows in (large, small)]
    lines = [
        target(f"E2E training has 3 times the operations of the foundation models' forward pass, within "
               f"{E2E_TARGET:.0%}", ratio, abs(ratio / 3 - 1) <= E2E_TARGET),
        target(f"MIM over Base in training, batch {fixed['batch_size']}: at most {FLOPS_TARGET:+.2f} of the "
               "GFLOPs", large["mim"]["train"]["gflops_delta"],
               large["mim"]["train"]["gflops_delta"] <= FLOPS_TARGET),
        *(
            target(f"MIM over Base in training, batch {fixed['batch_size']}, Base of {gb:.2f} GB: at most "
                   f"{MEMORY_TARGET:+.2f} of the memory", rows["mim"]["train"]["memory_delta"],
                   rows["mim"]["train"]["memory_delta"] <= MEMORY_TARGET)
            for rows, gb in zip((large, small), base_gb, strict=True)
        ),
    ]  # fmt: skip
    if report["validation"] is not None:
        worst = max(abs(v["error"]) for phases in report["validation"].values() for v in phases.values())
        lines.append(target(f"the estimate of memory is within {ESTIMATE_TARGET:.0%} of the allocator",
                            worst, worst <= ESTIMATE_TARGET))  # fmt: skip
    return lines


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.efficiency.main`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    started = time.perf_counter()
    with distributed(0) as ranks:
        if ranks.world_size > 1:
            raise OptionError("this benchmark is of one rank: start it without torchrun, or with one process")
        report = measure_table(config, ranks)
        on_cpu = ranks.device.type == "cpu"
        report["validation"] = validate(config, ranks) if on_cpu else None
        report["wall_clock"] = measure_time(config, ranks)
    report["targets"] = targets(report)
    report["seconds"] = time.perf_counter() - started
    report["config"] = dataclasses.asdict(config)
    write_pages(report, "Table 6: efficiency", summary(report), sections(report), {}, config.out)
    print((config.out / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
