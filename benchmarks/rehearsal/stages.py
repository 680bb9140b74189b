"""Every stage and option on the pretended GPU, on a tiny shop, through the `main` of the stage.

Stages follow each other in one process, and take what the ones before have left, as they would on a GPU.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.benchmarks.rehearsal.steps import of_steps, step_by_step
from mim_torchrec.data import shop
from mim_torchrec.training.distributed import distributed

SHOP = {
    "items": "130", "users": "20", "requests": "60", "searches": "40", "browsing": "200", "categories": "3",
    "image-size": "32", "max-behaviors": "12",
}  # fmt: skip
TOWERS = {
    "vision.name": "test_convnext", "vision.weights": "random", "vision.image-size": "32",
    "text.name": "bert-tiny", "text.weights": "random",
}  # fmt: skip
HEAD = {"head.dim": "16", "head.fusion-dim": "8", "epochs": "1", "batch-size": "8"}
CTR = {"data": "{shop}", "epochs": "1", "batch-size": "64", "embedding-dim": "4", "tower": "8"}
MIM = CTR | {"table": "{table}", "preset": "recommended"}


@dataclass(frozen=True)
class Stage:
    """A run of a stage.

    Args:
        name: in tables and reports.
        module: below `mim_torchrec`; its `main` is called.
        flags: by name; `{shop}` and the like are places, see `places`.
        switches: flags without a value.
        ranks: numbers of ranks that it is rehearsed on.
        out: where its results are, below the folder of the rehearsal; None is a place of its own.
    """

    name: str
    module: str
    flags: dict[str, str]
    switches: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1,)
    out: str | None = None

    def words(self, folder: Path) -> list[str]:
        """The words of its command line."""
        places = {name: str(folder / name) for name in ("shop", "table", "encoder", "new", "log", "base")}
        places["encoder"] = str(folder / "csft" / "encoder")
        out = folder / (self.out or self.name.replace(" ", "_"))
        flags = {name: value.format(**places) for name, value in self.flags.items()}
        return [w for name, value in flags.items() for w in (f"--{name}", *value.split())] + [
            "--out", str(out), *self.switches,
        ]  # fmt: skip


STAGES: Sequence[Stage] = (
    Stage("pretrain", "pretraining.main", {"data": "{shop}", **TOWERS, "dda-vision.mask-size": "8",
                                          "precision": "bf16"} | {
        f"{phase}.batch-size": "32" for phase in ("dda-vision", "dda-text", "dma")}),
    Stage("csft", "csft.main", {"data": "{shop}", **TOWERS, **HEAD}, ranks=(1, 2), out="csft"),
    Stage("csft with trained towers, bf16", "csft.main", {
        "data": "{shop}", **TOWERS, **HEAD, "freeze-towers": "False", "precision": "bf16",
        "queue-batches": "2"}),
    Stage("csft with FSDP2, bf16", "csft.main", {
        "data": "{shop}", **TOWERS, **HEAD, "freeze-towers": "False", "precision": "bf16",
        "parallel": "fsdp"}, ranks=(1, 2)),
    Stage("export", "representation.export", {
        "data": "{shop}", "encoder": "{encoder}", "precision": "bf16"}, ranks=(1, 2), out="table"),
    Stage("base", "ctr.main", {**CTR, "mim": "off"}, out="base"),
    Stage("base, resumed", "ctr.main", {**CTR, "mim": "off", "epochs": "2"}, out="base"),
    Stage("warm start", "ctr.main", {**CTR, "mim": "off", "warm-start": "{base}", "warmup-steps": "2"}),
    Stage("mim", "ctr.main", {
        **MIM, "id-dropout": "0.2", "content-dropout": "0.2", "content-temperature": "0.1"}, ranks=(1, 2)),
    Stage("sim, hard search", "ctr.main", {**MIM, "ubm": "sim", "search": "hard", "top-k": "3"},
          ranks=(1, 2)),
    Stage("bf16", "ctr.main", {**MIM, "ubm": "bst", "precision": "bf16"}, ranks=(1, 2)),
    Stage("tf32", "ctr.main", {**MIM, "ubm": "dien", "precision": "tf32"}),
    Stage("row-wise tables", "ctr.main", {
        **MIM, "sharding": "row_wise", "exchange-precision": "fp16"}, ranks=(2,)),
    Stage("managed memory", "ctr.main", {**MIM, "sparse-memory": "uvm", "table-memory": "uvm"}),
    Stage("managed memory, cached", "ctr.main", {
        **MIM, "sparse-memory": "uvm_caching", "table-memory": "uvm_caching",
        "load-factor": "0.5"}, ranks=(1, 2)),
    Stage("no pipeline, no dedup", "ctr.main", {**MIM, "pipeline": "off", "index-dedup": "off"},
          ranks=(1, 2)),
    Stage("pipeline and dedup", "ctr.main", {**MIM, "pipeline": "on", "index-dedup": "on"}),
    Stage("rim", "rim.main", {
        "source": "{new}", "encoder": "{encoder}", "table": "{table}", "log": "{log}"}, switches=("--once",)),
    Stage("windows", "ctr.main", {**MIM, "windows": "{log}", "windows-every": "2"}),
)  # fmt: skip


@dataclass(frozen=True)
class StageCounts:
    """What a stage has taken on this rank.

    Attributes:
        totals: launches, waits and uploads of the whole stage.
        step: the most of a training step, {} where nothing is trained.
        lines: of the last step.
        mixed: operators whose tensors lay on different devices, by operator and line.
        no_kernel: operators without a kernel for a GPU.
        error: with which it ended early.
        fbgemm: operators of fbgemm that ran on the GPU.
    """

    totals: dict[str, int]
    step: dict[str, int] = field(default_factory=dict)
    lines: dict[str, dict[str, int]] = field(default_factory=dict)
    mixed: dict[str, int] = field(default_factory=dict)
    no_kernel: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    fbgemm: Sequence[str] = ()


def rehearse_stages(folder: Path, ranks: int) -> dict[str, StageCounts]:
    """Run all stages of a number of ranks; every rank calls it, and gets what it has counted.

    Args:
        folder: of all ranks; empty.
        ranks: how many there are.
    """
    with distributed(0) as context:
        if context.is_main:
            shop.main(["--out", str(folder / "shop"), *(w for k, v in SHOP.items() for w in (f"--{k}", v))])
            (folder / "new").mkdir()
            items = sorted((folder / "shop" / "items").glob("*.parquet"))[0]
            (folder / "new" / "a.parquet").write_bytes(items.read_bytes())
        context.barrier()
        return {stage.name: _run(stage, folder) for stage in STAGES if ranks in stage.ranks}


def _run(stage: Stage, folder: Path) -> StageCounts:
    counts = Counts()
    main: Any = import_module(f"mim_torchrec.{stage.module}").main
    error = None
    with ExitStack() as stack:
        stack.enter_context(pretended_gpu(counts, strict=False))
        seen = stack.enter_context(step_by_step(counts))
        try:
            main(stage.words(folder))
        except (Exception, SystemExit) as found:
            traceback.print_exc(file=sys.stderr)
            error = f"{type(found).__name__}: {found}"
    step, lines = of_steps(seen)
    return StageCounts(
        counts.totals(), step, lines, dict(counts.mixed), dict(counts.no_kernel), error, counts.of_fbgemm()
    )


def losses(folder: Path) -> dict[str, list[float]]:
    """Losses of all runs in a folder, by their names."""
    return {
        str(path.parent.relative_to(folder)): [
            entry["loss"] for entry in map(json.loads, path.read_text().splitlines()) if "step" in entry
        ]
        for path in sorted(folder.rglob("history.jsonl"))
    }
