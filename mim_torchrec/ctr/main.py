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

from mim_torchrec.ctr.assembly import assemble, log_to_stderr, open_reader, scan_vocabularies, write_config
from mim_torchrec.ctr.config import CTRConfig, parse
from mim_torchrec.ctr.evaluate import predict, summarize
from mim_torchrec.ctr.task import CTRTask, load_model
from mim_torchrec.ctr.warm_start import warm_start
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.embeddings.sharded.load import table_digest
from mim_torchrec.training.checkpoint import write_json
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.distributed import Ranks, distributed
from mim_torchrec.training.loop import fit

log = logging.getLogger("mim_torchrec.ctr.main")  # also where it runs as __main__


def train_and_evaluate(config: CTRConfig, ranks: Ranks) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds."""
    started = time.time()
    if config.mim == "on" and config.table is None:
        raise ValueError("--mim on needs --table; train Base with --mim off")
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = Dataset(config.data)
    items = ItemStore.open(dataset, config.item_cache or config.out / "items")
    readers = {
        split: open_reader(config, dataset, split, ranks, training=split == "train") for split in SPLITS
    }
    vocabularies = scan_vocabularies(dataset, config, ranks)
    assembled = assemble(config, vocabularies, ranks)
    model, mapper, facts = assembled.model, assembled.mapper, assembled.facts
    if config.warm_start is not None:
        version = None if facts is None else facts["table_version"]
        warm_start(model, config, config.warm_start, vocabularies, version)
    if ranks.is_main:
        write_config(config, facts)

    # a table is the same by what it holds, wherever it lies
    same_run = config.same_run() | {"table": None if facts is None else facts["content"]}
    pipeline = config.pipeline == "on" or (config.pipeline == "auto" and ranks.device.type == "cuda")
    task = CTRTask(model, assembled.optimizer, readers["train"], readers["validation"], mapper, ranks,
                   config.aux_weight, config.id_dropout, config.seed, pipeline)  # fmt: skip
    history = fit(
        task,
        epochs=config.epochs,
        out=config.out,
        ranks=ranks,
        select="auc",
        patience=config.patience,
        log_every=config.log_every,
        checkpoints=Checkpoints(config.out / "checkpoints", config.checkpoint, same_run, ranks),
    )
    load_model(model, config.out / "best")
    predictions = predict(model, readers["test"], mapper, ranks)
    report = summarize(predictions, items)
    if facts is not None:
        facts["digest_after"] = table_digest(assembled.frozen)
        if facts["digest_after"] != facts["digest_before"]:
            raise RuntimeError(
                f"the frozen table {config.table} changed in training: digest {facts['digest_before']} "
                f"before, {facts['digest_after']} after"
            )
    unknown = mapper.unknown_shares()
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
        "world_size": ranks.world_size,
        "skipped_rows": {split: reader.skipped for split, reader in readers.items()},
        "seconds": time.time() - started,
    }
    if ranks.is_main:
        write_json(config.out / "metrics.json", report)
        pq.write_table(pa.table(predictions), config.out / "predictions.parquet")
        log.info("test: auc %.4f, gauc %s, ne %s, %d impressions", report["auc"] or float("nan"),
                 report["gauc"], report["ne"], report["n"])
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim ctr`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    log_to_stderr()
    with distributed(config.seed) as ranks:
        train_and_evaluate(config, ranks)


if __name__ == "__main__":
    main()
