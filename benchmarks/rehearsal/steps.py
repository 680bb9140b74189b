"""Training steps of the CTR models on the pretended GPU: launches, waits and uploads of one step.

The loop, the task and the pipeline are those of `mim ctr`; batches are random and lie ready. A step is
measured after the first, which makes what later ones use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from mim_torchrec.benchmarks.measures.training_steps import StepSizes, make_batch, random_table
from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.ciubm.ubm.registry import find_model
from mim_torchrec.ctr.config import PRESETS, CTRConfig
from mim_torchrec.ctr.pipeline import is_pipelined
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.history import read_history
from mim_torchrec.training.loop import fit
from mim_torchrec.training.presets import Preset
from mim_torchrec.training.run_directory import RunDirectory

STEPS = 4
FOUND = ("syncs", "uploads", "pageable", "asides")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model whose step is measured.

    Args:
        ubm: its user behavior model.
        preset: of `mim ctr`; None is Base, without multi-modal vectors.
        options: of the user behavior model.
        ranks: on which it is trained.
    """

    ubm: str
    preset: Preset | None = "recommended"
    options: tuple[tuple[str, Any], ...] = ()
    ranks: int = 1

    @property
    def name(self) -> str:
        """In tables and reports, such as `sim+mim 2 ranks`."""
        form = {None: "", "default": "+mim", "recommended": "+recommended"}[self.preset]
        words = "".join(f" {value}" for _, value in self.options if isinstance(value, str))
        return f"{self.ubm}{form}{words}" + (f" {self.ranks} ranks" if self.ranks > 1 else "")


_SEARCH: dict[str, tuple[tuple[str, Any], ...]] = {"sim": (("top_k", 20),), "twin": (("top_k", 20),)}
UBMS = ("avg_pooling", "din", "dien", "bst", "sim", "twin")
CASES = (
    *(Case(ubm=ubm, preset=None, options=_SEARCH.get(ubm, ())) for ubm in UBMS),
    Case(ubm="din", preset="default"),
    *(Case(ubm=ubm, options=_SEARCH.get(ubm, ())) for ubm in UBMS),
    Case(ubm="din", options=(("attention_activation", "dice"),)),
    Case(ubm="sim", options=(("search", "hard"), ("top_k", 20))),
    *(Case(ubm=ubm, options=_SEARCH.get(ubm, ()), ranks=2) for ubm in UBMS),
    Case(ubm="din", options=(("attention_activation", "dice"),), ranks=2),
)


@dataclass(frozen=True)
class StepCounts:
    """Of one training step, the most of those that were measured.

    Attributes:
        launches: operators that run a kernel.
        syncs: waits of the host for the stream that computes.
        uploads: copies from memory to the GPU.
        asides: waits for streams beside it.
        lines: of a step that took most, by kind: what is launched, what waits, and what is uploaded.
        losses: of all steps.
    """

    launches: int
    syncs: int
    uploads: int
    asides: int
    lines: dict[str, dict[str, int]]
    losses: list[float]


def sizes_of(folder: Path) -> StepSizes:
    """Of the models and batches: 256 candidates, four a request, histories of up to 50."""
    return StepSizes(out=folder, batch_size=256, users=300, items=500, categories=20, mm_dim=16)


@contextmanager
def step_by_step(counts: Counts) -> Iterator[list[tuple[str, Counts]]]:
    """Note what has been counted at every place that the ranks report to each other; see `Liveness`."""
    seen: list[tuple[str, Counts]] = []
    real = DistributedContext.at

    def at(context: DistributedContext, place: str) -> None:
        seen.append((place, counts.copy()))
        real(context, place)

    with mock.patch.object(DistributedContext, "at", at):
        yield seen


def of_steps(seen: list[tuple[str, Counts]]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """The most of a step, of those after the first of an epoch, and the lines of one that took most."""
    totals: dict[str, int] = {}
    lines: dict[str, dict[str, int]] = {}
    steps = list(zip(seen, seen[1:], strict=False))
    for number, ((place, before), (following, after)) in enumerate(steps):
        first = not number or place.endswith(", step 1")
        if first or ", step " not in place or ", step " not in following:
            continue
        step = {name: total - before.totals()[name] for name, total in after.totals().items()}
        if sum(step.values()) > sum(totals.values()):
            lines = {
                name: dict(getattr(after, name) - getattr(before, name)) for name in (*FOUND, "launches")
            }
        totals = {name: max(total, totals.get(name, 0)) for name, total in step.items()}
    return totals, lines


def measure_step(case: Case, folder: Path, on_gpu: bool = True) -> tuple[StepCounts, Counts]:
    """Train a model for a few steps; every rank calls it, and gets what it has counted.

    Args:
        case: the model.
        folder: for a table and a run, of all ranks.
        on_gpu: pretend to have a GPU; otherwise the losses are those of the CPU, and nothing is counted.

    Returns:
        What a step takes, and what would fail on a GPU.
    """
    counts = Counts()
    if not on_gpu:
        with distributed(0) as context:
            losses = _train(case, folder, context, counts)
        return StepCounts(0, 0, 0, 0, {}, losses), counts
    with pretended_gpu(counts, strict=False), distributed(0) as context, step_by_step(counts) as seen:
        losses = _train(case, folder, context, counts)
    totals, lines = of_steps(seen)
    return StepCounts(**totals, lines=lines, losses=losses), counts


def config_of(case: Case, folder: Path, **given: Any) -> CTRConfig:
    """What `mim ctr` would be told, to train the model of a case.

    Args:
        case: the model.
        folder: of the data and of the run.
        given: further fields.
    """
    preset: dict[str, Any] = dict(PRESETS[case.preset]) if case.preset is not None else {}
    return CTRConfig(
        data=folder, out=folder / "run", mim="off" if case.preset is None else "on", ubm=case.ubm,
        ubm_options=find_model(case.ubm)(**dict(case.options)), **preset, **given,
    )  # fmt: skip


def _train(case: Case, folder: Path, context: DistributedContext, counts: Counts) -> list[float]:
    sizes, config = sizes_of(folder), config_of(case, folder)
    mim = case.preset is not None
    if context.is_main and mim:
        random_table(sizes)
    context.barrier()
    table = open_table(folder / "table") if mim else None
    mm = frozen_config(table, ["candidate_mm", "behavior_mm"]) if table is not None else None
    model, optimizer = shard(build_model(config, sizes.rows, mm, torch.device("meta")), config, context)
    if table is not None:
        load_table(model, table)
    seeds = [context.rank + context.world_size * k for k in range(STEPS)]
    reader = cast(Any, _Ready([make_batch(sizes, 4, seed, mim, config) for seed in seeds]))
    task = _Steps(
        model, optimizer, reader, reader, cast(Any, lambda batch: batch), context, config.aux_weight,
        pipeline=is_pipelined(config, context),
    )  # fmt: skip
    run = RunDirectory(folder / case.name.replace(" ", "_") / context.device.type)
    with run.writing(context):
        fit(task, epochs=1, run=run, context=context, select=None, patience=None, log_every=1000)
    return [entry["loss"] for entry in read_history(run.history).steps]


class _Ready:
    """Gives batches that lie ready, in the place of a reader."""

    def __init__(self, batches: list[RequestBatch]) -> None:
        self._batches = batches

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, done: list[tuple[int, int]]) -> None:
        pass

    def batches(self, first: int = 0, mapper: object = None, ahead: bool = False) -> Iterator[RequestBatch]:
        for batch in self._batches[first:]:
            yield replace(batch)


class _Steps(CTRTask):
    """Trains, and neither validates nor saves."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        return {}

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
