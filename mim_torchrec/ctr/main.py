"""Stage: train a CTR model with or without content interest and evaluate it.

python -m mim_torchrec.ctr.main --data DIR --table TABLE --out DIR
python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.ctr.main --data DIR --mim off --out DIR
"""

import logging
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mim_torchrec.ctr.assembly import (
    Assembled,
    assemble,
    live_windows,
    log_to_stderr,
    open_reader,
    scan_vocabularies,
    write_config,
)
from mim_torchrec.ctr.config import CTRConfig, parse
from mim_torchrec.ctr.predictions import predict, summarize
from mim_torchrec.ctr.task import CTRTask, load_model
from mim_torchrec.ctr.warm_start import warm_start
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.embeddings.sharded.load import table_digest
from mim_torchrec.embeddings.windows.window import WindowGap
from mim_torchrec.errors import OptionError, check_sizes
from mim_torchrec.program import run
from mim_torchrec.training.checkpoint import write_json
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.loop import fit

log = logging.getLogger("mim_torchrec.ctr.main")  # also where it runs as __main__


def train_and_evaluate(config: CTRConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds."""
    check_sizes(config, 1, "batch_size", "epochs", "max_behaviors", "log_every", "patience", "embedding_dim")
    check_sizes(config, 1, "content_dim", "windows_every")
    check_sizes(config, 0, "seed", "warmup_steps", "spare_rows")
    started = time.time()
    if config.mim == "on" and config.table is None:
        raise OptionError("--mim on needs --table; train Base with --mim off")
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = Dataset(config.data)
    items = ItemStore.open(dataset, config.item_cache or config.out / "items")
    readers = {
        split: open_reader(config, dataset, split, context, training=split == "train") for split in SPLITS
    }
    vocabularies = scan_vocabularies(dataset, config, context)
    assembled = assemble(config, vocabularies, context)
    model, mapper, facts = assembled.model, assembled.mapper, assembled.facts
    if config.warm_start is not None:
        version = None if facts is None else facts["table_version"]
        warm_start(model, config, config.warm_start, vocabularies, version)
    if context.is_main:
        write_config(config, facts)

    # a table is the same by what it holds, wherever it lies
    resume_fingerprint = config.resume_fingerprint() | {"table": None if facts is None else facts["content"]}
    windows = live_windows(config, assembled, context, begin=True)
    if windows is not None:  # a resumed run may have a later base
        resume_fingerprint["table"] = facts["table_version"]
    pipeline = config.pipeline == "on" or (config.pipeline == "auto" and context.device.type == "cuda")
    task = CTRTask(model, assembled.optimizer, readers["train"], readers["validation"], mapper, context,
                   config.aux_weight, config.id_dropout, config.seed, pipeline, windows)  # fmt: skip
    history = fit(
        task,
        epochs=config.epochs,
        out=config.out,
        context=context,
        select="auc",
        patience=config.patience,
        log_every=config.log_every,
        checkpoints=Checkpoints(config.out / "checkpoints", config.checkpoint, resume_fingerprint, context),
    )
    load_model(model, config.out / "best")
    predictions = predict(model, readers["test"], mapper, context)
    report = summarize(predictions, items)
    if facts is not None:
        facts |= check_table(config, assembled, windows)
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
        "seconds": time.time() - started,
    }
    if context.is_main:
        write_json(config.out / "metrics.json", report)
        pq.write_table(pa.table(predictions), config.out / "predictions.parquet")
        log.info(
            "test: auc %.4f, gauc %s, ne %s, %d impressions",
            report["auc"] or float("nan"),
            report["gauc"],
            report["ne"],
            report["n"],
        )
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
    before, after = assembled.facts["digest_before"], table_digest(assembled.frozen)
    seq = assembled.facts["seq"] if windows is None else windows.seq
    expected: str | None = before
    if seq != assembled.facts["seq"]:
        try:
            expected = windows.expected_digest(assembled.table)
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
    log_to_stderr()
    with distributed(config.seed) as context:
        train_and_evaluate(config, context)


if __name__ == "__main__":
    run(main)
