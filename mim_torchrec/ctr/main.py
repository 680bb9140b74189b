"""Stage: train a CTR model with or without content interest and evaluate it.

python -m mim_torchrec.ctr.main --data DIR --table TABLE --out DIR
python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.ctr.main --data DIR --mim off --out DIR
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.ctr.assembly import (
    Assembled,
    assemble,
    describe_model,
    live_windows,
    open_reader,
)
from mim_torchrec.ctr.config import CTRConfig, parse
from mim_torchrec.ctr.pipeline import is_pipelined
from mim_torchrec.ctr.predictions import PredictionFile, collect, predict
from mim_torchrec.ctr.report import COLUMNS, in_words, read_items, summarize
from mim_torchrec.ctr.sharding import check_model
from mim_torchrec.ctr.task import CTRTask, load_model
from mim_torchrec.ctr.vocabularies import scan_vocabularies
from mim_torchrec.ctr.warm_start import warm_start
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader, label_classes
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.domains import check_domains
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.sharded.load import table_digest
from mim_torchrec.embeddings.table.reader import read_manifest
from mim_torchrec.embeddings.windows.window import WindowGap
from mim_torchrec.errors import OptionError
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.concerns import FELL_AFTER_FIRST_EPOCH, concerns, log_concerns
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.loop import fit
from mim_torchrec.training.precision import matrix_products_in
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger("mim_torchrec.ctr.main")  # also where it runs as __main__


def train_and_evaluate(config: CTRConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds."""
    check_domains(config)
    if config.mim == "on" and config.table is None:
        raise OptionError("--mim on needs --table; train Base with --mim off")
    check_model(config, context)
    run = RunDirectory(config.out)
    with matrix_products_in(config.precision, context.device), run.writing(context):
        return _train_and_evaluate(config, run, context)


def resume_fingerprint(config: CTRConfig) -> tuple[dict[str, Any], str | None]:
    """What a run that is resumed must have in common with this one, and the version of the table.

    A table is the same by what it holds, wherever it lies. With a log of windows it is by its version, as the
    base of a run that is resumed may be a later one.
    """
    table = version = None
    if config.mim == "on" and config.table is not None:
        manifest = read_manifest(config.table, config.table_version)
        version = manifest.table_version
        table = manifest.content if config.windows is None else version
    return config.resume_fingerprint() | {"table": table}, version


def refuse_one_class(dataset: Dataset, context: DistributedContext) -> None:
    """See that validation can choose the best epoch, before the first step.

    Raises:
        DataError: the validation requests have labels of one class only; on all ranks.
    """

    def look() -> None:
        if context.is_main:
            classes = label_classes(dataset.requests("validation"), dataset.conventions)
            if len(classes) < 2:
                found = ", ".join(map(str, sorted(classes))) or "none"
                raise DataError(
                    f"all labels are {found}: no AUC to choose the best epoch by. Put requests with clicked "
                    "and with other candidates into the validation part",
                    file=dataset.root / "requests" / "validation",
                )

    on_all_ranks(look)


@dataclass(frozen=True)
class Prepared:
    """All that is there before the first step."""

    items: ItemStore | None
    readers: dict[str, RequestReader]
    assembled: Assembled
    windows: LiveWindows | None
    task: CTRTask
    fingerprint: dict[str, Any]
    record: dict[str, Any]


def prepare(config: CTRConfig, run: RunDirectory, context: DistributedContext) -> Prepared:
    """See that the run can be done, begin its directory, and build its model; every rank calls it."""
    fingerprint, version = resume_fingerprint(config)
    run.refuse_other(config.checkpoint, fingerprint)
    dataset = Dataset(config.data, config.days())
    items = read_items(dataset, context)
    readers = {
        split: open_reader(
            config, dataset, split, context, training=split == "train", originals=split == "test"
        )
        for split in SPLITS
    }
    refuse_one_class(dataset, context)
    resumes = context.all_gather_objects(run.resumes(config.checkpoint))[0]
    run.begin(asdict(replace(config, table_version=version)), config.checkpoint, context)
    vocabularies = scan_vocabularies(dataset, config, context, resumes, run.check_lease)
    record = describe_model(replace(config, table_version=version), vocabularies)
    assembled = assemble(config, vocabularies, context)
    model = assembled.model
    if config.warm_start is not None:
        warm_start(model, config, config.warm_start, vocabularies, version)
    windows = live_windows(config, assembled, context, begin=True)
    task = CTRTask(model, assembled.optimizer, readers["train"], readers["validation"], assembled.mapper,
                   context, config.aux_weight, config.id_dropout, config.seed, is_pipelined(config, context),
                   windows, record, config.prefetch, config.second_weight, config.epochs)  # fmt: skip
    return Prepared(items, readers, assembled, windows, task, fingerprint, record)


def _train_and_evaluate(config: CTRConfig, run: RunDirectory, context: DistributedContext) -> dict[str, Any]:
    started = time.time()
    prepared = prepare(config, run, context)
    startup = time.time() - started
    readers, assembled, windows = prepared.readers, prepared.assembled, prepared.windows
    model, mapper, facts = assembled.model, assembled.mapper, assembled.facts
    history = fit(
        prepared.task,
        epochs=config.epochs,
        run=run,
        context=context,
        select="auc",
        patience=config.patience,
        log_every=config.log_every,
        clip_norm=config.clip_norm,
        checkpoints=Checkpoints(
            run.checkpoints, config.checkpoint, prepared.fingerprint, context, prepared.record
        ),
    )
    load_model(model, run.best)
    file = PredictionFile(run.predictions, context)
    scored = file.written(predict(model, readers["test"], mapper, context.device, config.prefetch))
    report = summarize(collect(scored, COLUMNS, context), prepared.items, context)
    if facts is not None:
        facts |= check_table(config, assembled, windows)
    entropies = {"validation": history.best().get("ne"), "test": report["ne"]}
    warnings = concerns(history, "auc", entropies)
    if FELL_AFTER_FIRST_EPOCH in warnings:
        warnings[FELL_AFTER_FIRST_EPOCH] += (
            "; try --id-shrinkage 60 with --keep-shrinkage True, --weight-decay or lower learning rates"
        )
    unknown = mapper.unknown_fractions()
    for name, share in unknown.items():
        if share > config.max_unknown:
            log.warning("%.0f%% of the ids of %s are unknown (limit %.0f%%)", 100 * share, name,
                        100 * config.max_unknown)  # fmt: skip
    report |= {
        "mim": config.mim,
        "ubm": config.ubm,
        "table": facts,
        "best_epoch": history.best_epoch,
        "seed": config.seed,
        "unknown_ids": unknown,
        "world_size": context.world_size,
        "skipped_rows": {split: reader.skipped for split, reader in readers.items()},
        "startup_seconds": startup,
        "warnings": warnings,
        "seconds": time.time() - started,
    }
    run.write_results(report, context, file.joined())
    if context.is_main:
        log_concerns(warnings)
        log.info("test: %s", in_words(report))
    return report


def check_table(
    config: CTRConfig, assembled: Assembled, windows: LiveWindows | None
) -> dict[str, str | int | None]:
    """What is known of the table after training, which only windows may have changed.

    Returns:
        `digest_after`, `seq_after`, and `digest_of_windows`, of what the base and the windows say; None where
        the log has forgotten them since.

    Raises:
        RuntimeError: something else has changed it.
    """
    facts, frozen, table = assembled.facts, assembled.frozen, assembled.table
    assert facts is not None and frozen is not None and table is not None
    before, after = facts["digest_before"], table_digest(frozen)
    seq = facts["seq"] if windows is None else windows.seq
    expected: str | None = before
    if windows is not None and seq != facts["seq"]:
        try:
            expected = windows.expected_digest(table)
        except WindowGap as error:
            log.warning("whether only windows have changed the table is not known: %s", error)
            expected = None
    if expected is not None and after != expected:
        raise RuntimeError(
            f"the frozen table {config.table} changed in training: digest {before} before, {expected} after "
            f"windows up to {seq}, {after} found"
        )
    return {"digest_after": after, "seq_after": seq, "digest_of_windows": expected}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim ctr`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(config.seed, config.timeout) as context:
        train_and_evaluate(config, context)


if __name__ == "__main__":
    program.run(main)
