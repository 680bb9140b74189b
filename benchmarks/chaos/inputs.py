"""What chaos feeds to RIM, and what must come of it: arrivals in order, and the vector of every one.

The items are a synthetic shop's, whose requests a model trains on meanwhile. The vectors are computed here,
one item at a time, before anything is fed: RIM encodes in batches and knows nothing of them.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_torchrec.benchmarks.measures.arrivals import Arrival
from mim_torchrec.benchmarks.measures.encoders import encode_alone, make_encoder
from mim_torchrec.data.shop import ShopConfig, make_shop
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.representation.export import TrainedEncoder

TOLERANCE = 1e-5  # of a component: other batches, other order of sums
DTYPE = "float32"
DIM = 16
APART = 300  # arrivals between two of one item, so that no window has both
FIRST_BAD = 90_000_000


@dataclass(kw_only=True)
class Inputs:
    """Everything that is fed, and what it must become.

    Args:
        shop: directory of the dataset.
        encoder: directory of the encoder.
        base: directory of the base table.
        version: its table_version.
        arrivals: in order.
        vectors: (num_arrivals, dim) float32; zero where there is none.
        base_ids: (num_base,) int64, ascending.
        base_vectors: (num_base, dim) float32.
    """

    shop: Path
    encoder: Path
    base: Path
    version: str
    arrivals: list[Arrival]
    vectors: Tensor
    base_ids: Tensor
    base_vectors: Tensor
    distance: float = field(default=0.0)
    """Smallest difference of two items' vectors in their most different component."""


def make_inputs(out: Path, items: int, requests: int, seed: int) -> Inputs:
    """Make a shop, an encoder, a base table of a tenth of the items, and arrivals of the others.

    Some items come again with another title, some are deleted, some cannot be encoded.

    Raises:
        ValueError: two items' vectors are too close for a wrong one to be noticed.
    """
    shop, path = out / "shop", out / "encoder"
    make_shop(ShopConfig(out=shop, items=items, users=100, requests=requests, searches=10, browsing=2000,
                         image_size=32, max_behaviors=10, seed=seed))  # fmt: skip
    rows = pq.read_table(shop / "items", columns=["item_id", "title", "image"]).to_pylist()
    version = make_encoder(path, [row["title"] for row in rows], dim=DIM)
    stock, new = rows[: items // 10], rows[items // 10 :]
    arrivals = _draw(stock, new, random.Random(seed))
    encoder = TrainedEncoder(str(path), torch.device("cpu"))
    nothing = torch.zeros(DIM)
    vectors = torch.stack([
        nothing if a.removed or a.bad else encode_alone(encoder, *a.content()) for a in arrivals
    ])  # fmt: skip
    stock.sort(key=lambda row: row["item_id"])
    base_ids = torch.tensor([row["item_id"] for row in stock])
    base_vectors = torch.stack([encode_alone(encoder, row["title"], row["image"]) for row in stock])
    writer = TableWriter(out / "base", table_version=version, dim=DIM, dtype=DTYPE, encoder={},
                         spare_rows=len(new))  # fmt: skip
    writer.write_shard(base_ids, base_vectors)
    writer.finish()
    inputs = Inputs(shop=shop, encoder=path, base=out / "base", version=version, arrivals=arrivals,
                    vectors=vectors, base_ids=base_ids, base_vectors=base_vectors)  # fmt: skip
    there = torch.cat([base_vectors, vectors[[not (a.removed or a.bad) for a in arrivals]]])
    inputs.distance = min(_closest(there, start) for start in range(0, len(there), 512))
    if inputs.distance < 10 * TOLERANCE:
        raise ValueError(f"two of the items differ by {inputs.distance:.1e} only; take another seed")
    return inputs


def _closest(vectors: Tensor, start: int) -> float:
    """The least distance of 512 vectors from `start` on to the others."""
    part = vectors[start : start + 512]
    between = torch.cdist(part, vectors, p=float("inf"))
    between[torch.arange(len(part)), start + torch.arange(len(part))] = float("inf")
    return float(between.min())


def _draw(stock: list[dict], new: list[dict], rng: random.Random) -> list[Arrival]:
    arrivals: list[Arrival] = []
    known = {row["item_id"]: row for row in stock}
    last = dict.fromkeys(known, -APART)
    for number, row in enumerate(new):
        ready = [item for item, at in last.items() if at <= len(arrivals) - APART]
        chance = rng.random()
        if ready and chance < 0.08:
            item = rng.choice(ready)
            last[item] = len(arrivals)
            again = Arrival(item_id=item, removed=True)
            if chance < 0.04:
                again = Arrival(item_id=item, title=f"{row['title']} again", image=known[item]["image"])
            arrivals.append(again)
        elif chance < 0.1:
            broken = [{"title": "  ", "image": row["image"]}, {"title": "hat", "image": row["image"][:40]}]
            arrivals.append(Arrival(item_id=FIRST_BAD + number, bad=True, **rng.choice(broken)))
        known[row["item_id"]] = row
        last[row["item_id"]] = len(arrivals)
        arrivals.append(Arrival(**row))
    return arrivals
