"""Stage: fine-tune the item encoder on pairs of a query image and a bought item (C-SFT, §3.3).

python -m mim_torchrec.csft.main --data DIR --out DIR
python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.csft.main --data DIR --out DIR
"""

import hashlib
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from mim_torchrec import program
from mim_torchrec.csft.config import CSFTConfig, parse
from mim_torchrec.csft.image_search import TOP, draw, encode, evaluate, find, write
from mim_torchrec.csft.inputs import (
    FeatureInputs,
    Inputs,
    PixelInputs,
    SearchContent,
    frozen_features,
    leave_out_unreadable,
    split_by_time,
)
from mim_torchrec.csft.loss_variant import check_objective
from mim_torchrec.csft.queries import ChangedPixels, PlainQueries, Queries, stored_views
from mim_torchrec.csft.selection import compare, plain_ranks
from mim_torchrec.csft.task import CSFTTask
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.schema import Dataset
from mim_torchrec.domains import check_domains
from mim_torchrec.embeddings.collective import on_all_ranks, rank_0_first
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.encoders.checkpoint import encoder_version, load_encoder, towers_in_place_of
from mim_torchrec.encoders.item_encoder import ItemEncoder
from mim_torchrec.encoders.selection import FILE, Selection
from mim_torchrec.encoders.text import learns_tokenizer, train_tokenizer
from mim_torchrec.errors import OptionError
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.concerns import NO_GAIN, concerns, log_concerns
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.loop import fit
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger("mim_torchrec.csft")  # also where this file is __main__


def fine_tune(config: CSFTConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds."""
    check_domains(config)
    if config.pairs_per_step(context.world_size) % context.world_size:
        raise OptionError(f"--batch-size {config.batch_size} is not a multiple of {context.world_size} ranks")
    if config.init == "pca" and not config.freeze_towers:
        raise OptionError("--init pca needs --freeze-towers True: features change while towers are trained")
    if config.head.principal_dim and (config.init == "random" or not config.freeze_towers):
        raise OptionError("--head.principal-dim needs --freeze-towers True and --init pca or auto")
    check_objective(config)
    run = RunDirectory(config.out)
    with run.writing(context):
        return _fine_tune(config, run, context)


def _fine_tune(config: CSFTConfig, run: RunDirectory, context: DistributedContext) -> dict[str, Any]:
    started = time.perf_counter()
    run.refuse_other(config.checkpoint, config.resume_fingerprint(), whole=False)  # before anything is read
    dataset = Dataset(config.data)
    cache = config.item_cache or run.root / "items"
    items = rank_0_first(lambda: ItemStore.open(dataset, cache))
    signal = None if config.interest_signal in ("all", "category") else config.interest_signal
    pairs = rank_0_first(
        lambda: PairDataset(
            dataset.pairs(), items, signal=signal, seed=config.seed, on_bad_row=config.on_bad_row,
            cache=cache, conventions=dataset.conventions, negatives_from=config.hard_negatives_from,
        )
    )  # fmt: skip
    readable = leave_out_unreadable(items, pairs) if config.on_bad_row == "skip" else None
    times = pairs.times() if config.validation_fraction else np.arange(len(pairs))
    train, held_out = split_by_time(times, config.validation_fraction)
    resume_fingerprint = config.resume_fingerprint() | {
        "pairs_digest": _digest(items.item_ids, pairs.query_ids, pairs.item_ids)
    }
    run.refuse_other(config.checkpoint, resume_fingerprint)
    run.begin(asdict(config), config.checkpoint, context)
    catalog = SearchContent(items, pairs, readable)
    untitled = sum(not title.strip() for title in items.titles(np.arange(len(items))))
    if untitled:
        log.warning("%d of %d items have an empty title", untitled, len(items))
    log.info("%d items, %d pairs to train on, %d held out, %d query images that are no items'", len(items),
             len(train), len(held_out), catalog.num_images - len(items))  # fmt: skip

    encoder = _build_encoder(config, items).to(context.device)
    inputs = _inputs(config, encoder, catalog, run, context)
    plain = None
    if len(held_out):  # before the towers are trained
        plain = plain_ranks(encoder, inputs, held_out, catalog, config.encode_batch_size, context)
    queries = _queries(config, encoder, inputs, catalog, train, run, context)
    torch.manual_seed(config.seed + 1 + context.rank)  # dropout differs from rank to rank
    task = CSFTTask(config, encoder, inputs, items, pairs, catalog, train, held_out, context, queries)
    history = fit(
        task,
        epochs=config.epochs,
        run=run,
        context=context,
        select="score" if len(held_out) else None,
        patience=config.patience if len(held_out) else None,
        log_every=config.log_every,
        clip_norm=config.clip_norm,
        checkpoints=Checkpoints(run.checkpoints, config.checkpoint, resume_fingerprint, context),
    )
    kept = run.promote_best("encoder", context)
    found = selection = None
    if plain is not None:
        found, rank = _search(config, run, inputs, held_out, catalog, items, context)
        selection = compare(plain, rank, config.select, not config.freeze_towers)
        run.check_lease()
        _write_selection(selection, kept, context)
    warnings = concerns(history, "score" if len(held_out) else None, {})
    if selection is not None and not selection.gained:
        warnings[NO_GAIN] = f"{selection}; mim export --if-no-gain plain exports the plain towers"
    best = history.best()
    metrics = {name: value for name, value in best.items() if name not in ("epoch", "seconds", "score")} | {
        "chance": TOP / len(items),
        "retrieval": found,
        "selection": None if selection is None else selection.facts(),
        "warnings": warnings,
        "best_epoch": history.best_epoch,
        "encoder_version": encoder_version(kept),
        "items": len(items),
        "pairs": len(train),
        "held_out_pairs": len(held_out),
        "trained_until": int(times[train].max()) if len(held_out) else None,
        "skipped_pairs": pairs.skipped,
        "unreadable_items": int((~catalog.readable).sum()),
        "untitled_items": untitled,
        "world_size": context.world_size,
        "seed": config.seed,
        "seconds": time.perf_counter() - started,
    }
    run.write_results(metrics, context)
    if context.is_main:
        log_concerns(warnings)
        if selection is not None:
            log.info("%s", selection)
        log.info("encoder %s, version %s, of epoch %d", kept, metrics["encoder_version"], history.best_epoch)
    return metrics


def _digest(*ids: np.ndarray) -> str:
    return hashlib.sha256(b"".join(one.tobytes() for one in ids)).hexdigest()[:16]


def _search(
    config: CSFTConfig,
    run: RunDirectory,
    inputs: Inputs,
    held_out: np.ndarray,
    catalog: SearchContent,
    items: ItemStore,
    context: DistributedContext,
) -> tuple[dict[str, Any], Tensor]:
    """Image search with the encoder that was kept: what is reported, and the ranks of the bought items."""
    encoder = load_encoder(run.root / "encoder", context.device)
    model = encoder.head if config.freeze_towers else encoder
    query, items_mm = encode(model, inputs, held_out, catalog, config.encode_batch_size, context)
    found = find(query, items_mm, held_out, catalog, context.device)
    report = evaluate(found, held_out, catalog, items)
    if context.is_main:
        write(report, draw(held_out, found, catalog, config.drawn_queries), run.root)
    return report, found.rank


def _write_selection(selection: Selection, encoder: Path, context: DistributedContext) -> None:
    """Say beside an encoder whether it gained over the plain towers."""
    on_all_ranks(lambda: write_json(encoder / FILE, selection.facts()) if context.is_main else None)


def _build_encoder(config: CSFTConfig, items: ItemStore) -> ItemEncoder:
    if config.towers is not None:
        towers = towers_in_place_of(config.towers, config.vision, config.text)
        settings = replace(config.encoder(), vision=towers.vision.config, text=towers.text.config)
        return ItemEncoder(settings, *towers)
    tokenizer = None
    if learns_tokenizer(config.text):
        tokenizer = train_tokenizer(items.titles(np.arange(len(items))))
    return ItemEncoder.build(config.encoder(), tokenizer)


def _inputs(
    config: CSFTConfig,
    encoder: ItemEncoder,
    catalog: SearchContent,
    run: RunDirectory,
    context: DistributedContext,
) -> Inputs:
    if not config.freeze_towers:
        return PixelInputs(catalog, encoder, config.image_memory_gib, context)
    if "random" in (config.vision.weights, config.text.weights):
        log.warning("a tower with random weights is frozen: it sees nothing. Train it, --freeze-towers False")
    encoder.vision.eval().requires_grad_(False)
    encoder.text.eval().requires_grad_(False)
    cache = config.feature_cache or run.root / "features"
    features: FeatureInputs = frozen_features(catalog, encoder, cache, config.encode_batch_size, context)
    if config.init != "random":
        encoder.head.cpu().init_pca(features.image[: catalog.num_items], features.text)
        encoder.to(context.device)
    return features


def _queries(
    config: CSFTConfig,
    encoder: ItemEncoder,
    inputs: Inputs,
    catalog: SearchContent,
    train: np.ndarray,
    run: RunDirectory,
    context: DistributedContext,
) -> Queries:
    """Query images of training, changed where `--augment-queries` says so."""
    if not config.augment_queries:
        return PlainQueries(inputs)
    if not config.freeze_towers:
        return ChangedPixels(inputs, config.augment_queries, config.seed)
    return stored_views(
        inputs, catalog, train, encoder, strength=config.augment_queries, views=config.augment_views,
        seed=config.seed, cache=config.feature_cache or run.root / "features",
        batch_size=config.encode_batch_size, context=context,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim csft`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(config.seed, config.timeout) as context:
        logging.getLogger("mim_torchrec").setLevel(logging.INFO if context.is_main else logging.WARNING)
        fine_tune(config, context)


if __name__ == "__main__":
    program.run(main)
