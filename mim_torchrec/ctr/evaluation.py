"""Evaluate a trained CTR model on any split, of its own data or of another day's.

    python -m mim_torchrec.ctr.evaluation --model RUN --split validation --out DIR
    python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.ctr.evaluation --model RUN --out DIR

Ids are mapped by the vocabularies of the run, so what training has not seen is unknown here too. On any
number of ranks, whatever number the model was trained on.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from mim_torchrec import program
from mim_torchrec.ctr.assembly import TrainedRun, assemble, live_windows, open_reader
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.predictions import PredictionFile, collect, predict
from mim_torchrec.ctr.report import COLUMNS, in_words, read_items, summarize
from mim_torchrec.ctr.task import load_model
from mim_torchrec.data.schema import Dataset
from mim_torchrec.domains import Count, Natural, check_domains
from mim_torchrec.embeddings.remote.places import Place
from mim_torchrec.training.config import Timeouts
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.precision import matrix_products_in
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger("mim_torchrec.ctr.evaluation")  # also where it runs as __main__


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Score a split with a trained CTR model.

    One process, or several under torchrun. Writes metrics.json and predictions.parquet into `out`.
    """

    model: Place
    """Directory that `mim ctr` has written."""
    out: Place
    """Directory of the results; made if missing."""
    split: Literal["train", "validation", "test"] = "test"
    """Part of the data set that is scored."""
    data: Place | None = None
    """Dataset directory; by default that of the run."""
    days: str | None = None
    """Days whose requests are scored, as 2026-11-01..2026-11-20 or one day, of requests in folders of days;
    by default those of the split in the run, or with `data` all."""
    table: Place | None = None
    """Directory of the multi-modal table; it must have the version that the model was trained on. By default
    that of the run."""
    windows: str | None = None
    """Window log, a directory or a Redis URL, that is applied to the table; by default that of the run."""
    checkpoint: str = "best"
    """`best`, or one of the names in the run's `checkpoints`, or the directory of a checkpoint."""
    draws: Natural = 200
    """Bootstrap draws of users for the confidence intervals; 0 computes none."""
    batch_size: Count = 4096
    """Candidates in a batch, over all ranks."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at a malformed request, or skip and count it."""
    timeout: Timeouts = field(default_factory=Timeouts)


def evaluate(config: EvaluationConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds.

    Raises:
        OptionError: `model` has no such checkpoint, or `out` is the directory of a training run.
        ModelMismatch: config.json or vocabulary/ of `model` are not those of its weights.
        LeaseError: another process writes into `out`.
        VersionMismatch: the table is of another version than the model was trained on.
        DataError: `model` is no run, or data is malformed.
    """
    check_domains(config)
    run = TrainedRun.open(config.model, config.checkpoint)
    trained = run.config
    settings = replace(
        trained,
        data=config.data or trained.data,
        table=config.table or trained.table,
        windows=config.windows or trained.windows,
        batch_size=config.batch_size,
        on_bad_row=config.on_bad_row,
    )
    out = RunDirectory(config.out)
    with matrix_products_in(trained.precision, context.device, training=False), out.writing(context):
        out.refuse_trained()
        return _evaluate(config, settings, run, out, context)


def _evaluate(
    config: EvaluationConfig,
    settings: CTRConfig,
    run: TrainedRun,
    out: RunDirectory,
    context: DistributedContext,
) -> dict[str, Any]:
    days = run.config.days() if config.data is None else {}
    dataset = Dataset(settings.data, days if config.days is None else {config.split: config.days})
    items = read_items(dataset, context)
    reader = open_reader(settings, dataset, config.split, context, originals=True)
    assembled = assemble(settings, run.vocabularies, context)
    load_model(assembled.model, run.weights)
    windows = live_windows(settings, assembled, context)
    if windows is not None:
        windows.catch_up()
        assert assembled.facts is not None  # a model without a table has no windows
        assembled.facts["seq_after"] = windows.seq
    file = PredictionFile(out.predictions, context)
    scored = file.written(predict(assembled.model, reader, assembled.mapper, context.device))
    report = summarize(collect(scored, COLUMNS, context), items, context, config.draws) | {
        "model": str(config.model),
        "checkpoint": run.name,
        "data": str(settings.data),
        "split": config.split,
        "mim": settings.mim,
        "ubm": settings.ubm,
        "table": assembled.facts,
        "unknown_ids": assembled.mapper.unknown_fractions(),
        "world_size": context.world_size,
        "skipped_rows": reader.skipped,
    }
    out.write_results(report, context, file.joined())
    if context.is_main:
        log.info("%s: %s", config.split, in_words(report))
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim evaluate`."""
    config = tyro.cli(EvaluationConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(
        seed=0, timeouts=config.timeout
    ) as context:  # nothing here is drawn but the intervals, which have their own
        evaluate(config, context)


if __name__ == "__main__":
    program.run(main)
