"""Stage: pre-train the towers on the shop's own items (§3.2): adapt each to its data, align both.

    python -m mim_torchrec.pretraining.main --data DIR --out DIR
    python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.pretraining.main --data DIR --out DIR

Every phase can be left out (`--phases dda-text dma`), and one may follow another in a run of its own
(`--towers`). Not here: text without images or images without text from elsewhere.
"""

import logging
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from mim_torchrec import program
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.domains import check_domains
from mim_torchrec.embeddings.collective import on_all_ranks, rank_0_first
from mim_torchrec.encoders.checkpoint import (
    Towers,
    load_towers,
    save_towers,
    towers_in_place_of,
    towers_version,
)
from mim_torchrec.encoders.pixels import PixelInputs
from mim_torchrec.encoders.text import TextEncoder, learns_tokenizer, train_tokenizer
from mim_torchrec.encoders.tower import compute_in
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.errors import OptionError
from mim_torchrec.pretraining.alignment import ImageTextModel
from mim_torchrec.pretraining.config import PhaseConfig, PretrainConfig, parse
from mim_torchrec.pretraining.objective import PretrainingObjective
from mim_torchrec.pretraining.task import PretrainTask
from mim_torchrec.pretraining.text import LanguageModel
from mim_torchrec.pretraining.vision import MaskedImageModel
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.loop import fit
from mim_torchrec.training.precision import matrix_products_in
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger("mim_torchrec.pretraining")  # also where this file is __main__


class ItemCatalog:
    """Images and titles of items, by item row."""

    def __init__(self, items: ItemStore) -> None:
        self._items = items
        self.num_images = len(items)

    def titles(self, rows: np.ndarray) -> list[str]:
        """Titles of items."""
        return self._items.titles(rows)

    def decode(self, image: int, vision: VisionEncoder) -> Tensor:
        """One image as the tower takes it. Raises DataError naming the place of one that is damaged."""
        return vision.transform(self._items.images(np.array([image]))[0])


def pretrain(config: PretrainConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the stage on an initialized process group; returns what metrics.json holds."""
    check_domains(config)
    if not config.phases or len(set(config.phases)) < len(config.phases):
        raise OptionError(f"--phases {' '.join(config.phases)}: name at least one, and each once")
    run = RunDirectory(config.out)
    with matrix_products_in(config.precision, context.device), run.writing(context):
        return _pretrain(config, run, context)


def _pretrain(config: PretrainConfig, run: RunDirectory, context: DistributedContext) -> dict[str, Any]:
    for name in config.phases:
        run.part(name).refuse_other(config.checkpoint, config.resume_fingerprint())
    items = rank_0_first(
        lambda: ItemStore.open(Dataset(config.data), config.item_cache or run.root / "items")
    )
    order = np.random.default_rng(config.seed).permutation(len(items))
    cut = round(len(items) * config.validation_fraction)
    held_out, train = np.sort(order[:cut]), np.sort(order[cut:])
    run.begin(asdict(config), config.checkpoint, context)
    towers = _towers(config, items)
    compute_in(config.precision, *towers)
    log.info("%d items to train on, %d held out, towers %s and %s", len(train), len(held_out),
             towers.vision.config.name, towers.text.config.name)  # fmt: skip
    reads_images = set(config.phases) != {"dda-text"}
    inputs = PixelInputs(
        ItemCatalog(items), towers, config.image_memory_gib if reads_images else None, context
    )
    metrics: dict[str, Any] = {"items": len(train), "held_out_items": len(held_out), "seed": config.seed,
                               "world_size": context.world_size, "phases": {}}  # fmt: skip
    for name in config.phases:
        metrics["phases"][name] = _run_phase(
            config, run.part(name), name, towers, inputs, train, held_out, items.item_ids, context
        )
    path = run.root / "towers"
    metrics["towers_version"] = towers_version(*towers)
    run.check_lease()
    on_all_ranks(lambda: save_towers(*towers, path) if context.is_main else None)
    run.write_results(metrics, context)
    log.info("towers %s, version %s", path, metrics["towers_version"])
    return metrics


def _run_phase(
    config: PretrainConfig,
    run: RunDirectory,
    name: str,
    towers: Towers,
    inputs: PixelInputs,
    train: np.ndarray,
    held_out: np.ndarray,
    item_ids: np.ndarray,
    context: DistributedContext,
) -> dict[str, Any]:
    """Train a phase and leave its best epoch in the towers; returns what its metrics.json holds."""
    started = time.perf_counter()
    settings = {"dda-vision": config.dda_vision, "dda-text": config.dda_text, "dma": config.dma}
    phase: PhaseConfig = settings[name]
    torch.manual_seed(config.seed)  # a phase starts alike whether or not others ran before it
    objective = _objective(config, name, towers, inputs).to(context.device)
    torch.manual_seed(config.seed + 1 + context.rank)  # dropout differs from rank to rank
    task = PretrainTask(
        config, phase, name, objective, towers, train, held_out, item_ids, context, inputs.ahead
    )
    before = task.validate()
    if before:
        log.info("%s before training: %s", name, before)
    history = fit(
        task,
        epochs=phase.epochs,
        run=run,
        context=context,
        select="score" if before else None,
        patience=config.patience if before else None,
        log_every=config.log_every,
        clip_norm=config.clip_norm,
        checkpoints=Checkpoints(run.checkpoints, config.checkpoint, config.resume_fingerprint(), context),
    )
    best = load_towers(run.promote_best("towers", context))
    for ours, kept in zip(towers, best, strict=True):
        ours.load_state_dict(kept.state_dict())
    metrics = {
        "before": before,
        "first": _figures(history.epochs[0]),
        "best": _figures(history.best()),
        "best_epoch": history.best_epoch,
        "steps": history.num_steps,
        "towers_version": towers_version(*best),
        "seconds": time.perf_counter() - started,
    }
    run.write_results(metrics, context)
    return metrics


def _figures(epoch: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in epoch.items() if name not in ("epoch", "score")}


def _towers(config: PretrainConfig, items: ItemStore) -> Towers:
    if config.towers is not None:
        return towers_in_place_of(config.towers, config.vision, config.text)
    tokenizer = None
    if learns_tokenizer(config.text):
        tokenizer = train_tokenizer(items.titles(np.arange(len(items))))
    return Towers(VisionEncoder(config.vision), TextEncoder(config.text, tokenizer=tokenizer))


def _objective(
    config: PretrainConfig, name: str, towers: Towers, inputs: PixelInputs
) -> PretrainingObjective:
    fix = config.fix_batch_norm
    if fix is None:
        fix = config.vision.weights != "random"
    if name == "dda-vision":
        return MaskedImageModel(towers.vision, inputs, config.dda_vision, fix)
    if name == "dda-text":
        return LanguageModel(towers.text, inputs, config.dda_text)
    return ImageTextModel(towers, inputs, config.dma, fix)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim pretrain`."""
    config = parse(argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(config.seed, config.timeout) as context:
        logging.getLogger("mim_torchrec").setLevel(logging.INFO if context.is_main else logging.WARNING)
        pretrain(config, context)


if __name__ == "__main__":
    program.run(main)
