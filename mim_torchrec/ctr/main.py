"""Stage: train a CTR model with or without content interest and evaluate it.

    python -m mim_torchrec.ctr.main --data DIR --table TABLE --out DIR
    python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.ctr.main --data DIR --mim off --out DIR
"""

import logging
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from mim_torchrec.ctr.config import CTRConfig, parse
from mim_torchrec.ctr.evaluate import predict, summarize
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.ctr.task import CTRTask, load_model
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary, scan_ids
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.live import ItemIndex
from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
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
    if config.batch_size % ranks.world_size:
        raise ValueError(f"--batch-size {config.batch_size} is not a multiple of {ranks.world_size} ranks")
    config.out.mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        write_json(config.out / "config.json", asdict(config))

    dataset = Dataset(config.data)
    items = ItemStore.open(dataset, config.item_cache or config.out / "items")
    table = open_table(config.table, config.table_version) if config.mim == "on" else None
    readers = {
        split: RequestReader(
            dataset.requests(split),
            batch_size=config.batch_size // ranks.world_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            shuffle=split == "train",
            max_behaviors=config.max_behaviors,
            on_bad_row=config.on_bad_row,
            drop_remainder=split == "train",
        )
        for split in ("train", "validation", "test")
    }
    vocabularies = _vocabularies(dataset, config, ranks)
    index = ItemIndex.of(table) if table is not None else None
    mapper = IdMapper(vocabularies, index, config.max_unknown)

    mm = frozen_config(table, ["candidate_mm", "behavior_mm"], name="mm") if table is not None else None
    rows = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
    model, optimizer = shard(build_model(config, rows, mm, torch.device("meta")), config, ranks)
    frozen = model.module.mm_embeddings
    facts: dict[str, Any] | None = None
    if table is not None:
        load_table(frozen, table, "mm")
        facts = {
            "rows": table.manifest.rows,
            "dim": table.manifest.dim,
            "dtype": table.manifest.dtype,
            "table_version": table.manifest.table_version,
            "digest_before": table_digest(frozen),
        }

    # a table is the same by what it holds, wherever it lies
    same_run = config.same_run() | {"table": None if facts is None else facts["digest_before"]}
    task = CTRTask(model, optimizer, readers["train"], readers["validation"], mapper, ranks,
                   config.aux_weight, config.id_dropout, config.seed)  # fmt: skip
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
        facts["digest_after"] = table_digest(frozen)
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


def _vocabularies(dataset: Dataset, config: CTRConfig, ranks: Ranks) -> dict[str, Vocabulary]:
    """Vocabularies of the training requests: scanned by one rank, read by all."""
    folder = config.out / "vocabulary"
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for name, ids in scan_ids(dataset.requests("train")).items():
            Vocabulary.build(ids, head_room=config.head_room).save(folder / f"{name}.npz")
    ranks.barrier()
    return {path.stem: Vocabulary.load(path) for path in sorted(folder.iterdir())}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim ctr`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("mim_torchrec").setLevel(logging.INFO)
    # torch and torchrec about themselves
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    with distributed(config.seed) as ranks:
        train_and_evaluate(config, ranks)


if __name__ == "__main__":
    main()
