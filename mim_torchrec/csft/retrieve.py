"""Image search with an encoder: where the bought item stands among all items, and what is found, as an image.

    python -m mim_torchrec.csft.retrieve --data DIR --encoder DIR --out DIR

Queries are the pairs that C-SFT holds out, the last by time. Plain towers have no common space of images and
items: their queries are compared with the items' images. Writes retrieval.json and retrieval.png, as C-SFT
does at its end.
"""

import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.csft.image_search import draw, encode, evaluate, find, write
from mim_torchrec.csft.inputs import SearchContent, frozen_features, leave_out_unreadable, split_by_time
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.schema import Dataset
from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.collective import rank_0_first
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.encoders.checkpoint import load_encoder
from mim_torchrec.errors import OptionError
from mim_torchrec.representation.plain import PLAIN, PlainTowers
from mim_torchrec.training.config import Timeouts
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger("mim_torchrec.csft.retrieve")  # also where this file is __main__


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Find the bought item among all items by the query image."""

    data: Place
    """Dataset directory."""
    encoder: str
    """Directory of an encoder that C-SFT wrote; or towers alone, `plain:<vision>+<text>` or
    `plain:<directory>`."""
    out: Place
    """Directory of the results; made if missing."""
    interest_signal: Literal["purchase", "click", "all"] = "purchase"
    """Pairs whose items are searched for, as in `mim csft`."""
    held_out_fraction: Annotated[float, Domain(above=0, most=1)] = 0.05
    """Fraction of the pairs, the last by time, whose queries are used; 1 takes all."""
    drawn_queries: Natural = 8
    """Queries that `retrieval.png` shows with the items that they find."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at a bad pair, or leave it out and count it, as `mim csft` does."""
    image_size: Count | None = None
    """Side of the images in pixels, only for `plain:<vision>+<text>`; by default the tower's own."""
    encode_batch_size: Count = 64
    """Images or titles that a tower takes at a time."""
    feature_cache: LocalPath | None = None
    """Folder where features of towers are kept for other runs; by default one inside `out`."""
    timeout: Timeouts = field(default_factory=Timeouts)
    item_cache: LocalPath | None = None
    """Folder of the item index; by default one inside `out`."""


def retrieve(config: RetrieveConfig, context: DistributedContext) -> dict[str, Any]:
    """Run the search on an initialized process group; returns what retrieval.json holds.

    Raises:
        OptionError: no pairs are asked for, or `out` is the directory of a training run.
        DataError: data is damaged.
        CheckpointError: the encoder is.
        LeaseError: another process writes into `out`.
    """
    check_domains(config)
    run = RunDirectory(config.out)
    with run.writing(context):
        run.refuse_trained()
        return _retrieve(config, run, context)


def _retrieve(config: RetrieveConfig, run: RunDirectory, context: DistributedContext) -> dict[str, Any]:
    out = run.root
    dataset = Dataset(config.data)
    cache = config.item_cache or out / "items"
    items = rank_0_first(lambda: ItemStore.open(dataset, cache))
    signal = None if config.interest_signal == "all" else config.interest_signal
    pairs = rank_0_first(
        lambda: PairDataset(
            dataset.pairs(),
            items,
            signal=signal,
            on_bad_row=config.on_bad_row,
            cache=cache,
            conventions=dataset.conventions,
        )
    )
    readable = leave_out_unreadable(items, pairs) if config.on_bad_row == "skip" else None
    catalog = SearchContent(items, pairs, readable)
    _, held_out = split_by_time(pairs.times(), config.held_out_fraction)
    if not len(held_out):
        raise OptionError(f"--held-out-fraction {config.held_out_fraction} of {len(pairs)} pairs is none")
    features_cache = config.feature_cache or out / "features"
    if config.encoder.startswith(PLAIN):
        towers = PlainTowers.open(config.encoder, config.image_size, context.device)
        image = frozen_features(catalog, towers, features_cache, config.encode_batch_size, context).image
        query, vectors = image[torch.from_numpy(catalog.query_image_row[held_out])], image[: len(items)]
    else:
        encoder = load_encoder(config.encoder, context.device)
        features = frozen_features(catalog, encoder, features_cache, config.encode_batch_size, context)
        query, vectors = encode(encoder.head, features, held_out, catalog, config.encode_batch_size, context)
    found = find(query, vectors, held_out, catalog, context.device)
    report = evaluate(found, held_out, catalog, items)
    report |= {"skipped_pairs": pairs.skipped, "held_out_from": int(pairs.times()[held_out].min())}
    run.check_lease()
    if context.is_main:
        write(report, draw(held_out, found, catalog, config.drawn_queries), out)
        log.info("recall@10 %.4f (chance %.4f), mean rank %.1f of %d, %d queries", report["recall_at_10"],
                 report["chance_at_10"], report["mean_rank"], len(items), report["n"])  # fmt: skip
    context.barrier()
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim retrieve`."""
    config = tyro.cli(RetrieveConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_domains(config)  # before processes wait for each other
    with distributed(seed=0, timeouts=config.timeout) as context:  # nothing here is drawn
        logging.getLogger("mim_torchrec").setLevel(logging.INFO if context.is_main else logging.WARNING)
        retrieve(config, context)


if __name__ == "__main__":
    program.run(main)
