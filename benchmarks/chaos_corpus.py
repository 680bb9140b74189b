"""What chaos feeds to RIM, and what must come of it: arrivals in order, and the vector of every one.

The items are a synthetic shop's, whose requests a model trains on meanwhile. The vectors are computed here,
one item at a time, before anything is fed: RIM encodes in batches and knows nothing of them.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from redis.exceptions import ResponseError
from torch import Tensor

from mim_torchrec.data.images import decode_image
from mim_torchrec.data.shop import ShopConfig, make_shop
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.embeddings.windows.redis_connection import connect, is_redis, locate, reachable
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.errors import OptionError
from mim_torchrec.representation.export import TrainedEncoder

TOLERANCE = 1e-5  # of a component: other batches, other order of sums
DTYPE = "float32"
DIM = 16
APART = 300  # arrivals between two of one item, so that no window has both
FIRST_BAD = 90_000_000
SCHEMA = pa.schema([("item_id", pa.int64()), ("title", pa.string()), ("image", pa.binary()),
                    ("removed", pa.bool_())])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fed:
    """One arrival.

    Args:
        item_id: of the item.
        title: None where it is deleted.
        image: likewise.
        removed: whether it is deleted.
        bad: whether it cannot be encoded.
    """

    item_id: int
    title: str | None = None
    image: bytes | None = None
    removed: bool = False
    bad: bool = False

    def row(self) -> dict[str, object]:
        """As a source has it."""
        return {"item_id": self.item_id, "title": self.title, "image": self.image, "removed": self.removed}


@dataclass(kw_only=True)
class Corpus:
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
    arrivals: list[Fed]
    vectors: Tensor
    base_ids: Tensor
    base_vectors: Tensor
    distance: float = field(default=0.0)
    """Smallest difference of two items' vectors in their most different component."""


def make_encoder(
    out: Path, titles: list[str], dim: int = DIM, vision: str = "test_resnet.r160_in1k", size: int = 32
) -> str:
    """A small encoder of pictures of `size` pixels and titles, with random weights; returns its version."""
    torch.manual_seed(0)
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name=vision, weights="random", image_size=size),
        text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=16),
        head=HeadConfig(dim=dim, fusion_dim=4, hidden_dim=16),
    )
    return save_encoder(ItemEncoder.build(config, train_tokenizer(titles, 512)), out)


def encode_alone(encoder: TrainedEncoder, title: str, image: bytes) -> Tensor:
    """The vector (dim,) float32 of one item by itself."""
    with torch.inference_mode():
        return encoder([decode_image(image)], [title])[0].float().clone()


def make_corpus(out: Path, items: int, requests: int, seed: int) -> Corpus:
    """Make a shop, an encoder, a base table of a tenth of the items, and arrivals of the others.

    Some items come again with another title, some are deleted, some cannot be encoded.

    Raises:
        ValueError: two items' vectors are too close for a wrong one to be noticed.
    """
    shop, path = out / "shop", out / "encoder"
    make_shop(ShopConfig(out=shop, items=items, users=100, requests=requests, searches=10, browsing=2000,
                         image_size=32, max_behaviors=10, seed=seed))  # fmt: skip
    rows = pq.read_table(shop / "items", columns=["item_id", "title", "image"]).to_pylist()
    version = make_encoder(path, [row["title"] for row in rows])
    stock, new = rows[: items // 10], rows[items // 10 :]
    arrivals = _draw(stock, new, random.Random(seed))
    encoder = TrainedEncoder(str(path), torch.device("cpu"))
    nothing = torch.zeros(DIM)
    vectors = torch.stack([
        nothing if a.removed or a.bad else encode_alone(encoder, a.title, a.image) for a in arrivals
    ])  # fmt: skip
    stock.sort(key=lambda row: row["item_id"])
    base_ids = torch.tensor([row["item_id"] for row in stock])
    base_vectors = torch.stack([encode_alone(encoder, row["title"], row["image"]) for row in stock])
    writer = TableWriter(out / "base", table_version=version, dim=DIM, dtype=DTYPE, encoder={},
                         spare_rows=len(new))  # fmt: skip
    writer.write_shard(base_ids, base_vectors)
    writer.finish()
    corpus = Corpus(shop=shop, encoder=path, base=out / "base", version=version, arrivals=arrivals,
                    vectors=vectors, base_ids=base_ids, base_vectors=base_vectors)  # fmt: skip
    there = torch.cat([base_vectors, vectors[[not (a.removed or a.bad) for a in arrivals]]])
    corpus.distance = min(_closest(there, start) for start in range(0, len(there), 512))
    if corpus.distance < 10 * TOLERANCE:
        raise OptionError(f"two of the items differ by {corpus.distance:.1e} only; take another seed")
    return corpus


def _closest(vectors: Tensor, start: int) -> float:
    """The least distance of 512 vectors from `start` on to the others."""
    part = vectors[start : start + 512]
    between = torch.cdist(part, vectors, p=float("inf"))
    between[torch.arange(len(part)), start + torch.arange(len(part))] = float("inf")
    return float(between.min())


def _draw(stock: list[dict], new: list[dict], rng: random.Random) -> list[Fed]:
    arrivals: list[Fed] = []
    known = {row["item_id"]: row for row in stock}
    last = dict.fromkeys(known, -APART)
    for number, row in enumerate(new):
        ready = [item for item, at in last.items() if at <= len(arrivals) - APART]
        chance = rng.random()
        if ready and chance < 0.08:
            item = rng.choice(ready)
            last[item] = len(arrivals)
            again = Fed(item_id=item, removed=True)
            if chance < 0.04:
                again = Fed(item_id=item, title=f"{row['title']} again", image=known[item]["image"])
            arrivals.append(again)
        elif chance < 0.1:
            broken = [{"title": "  ", "image": row["image"]}, {"title": "hat", "image": row["image"][:40]}]
            arrivals.append(Fed(item_id=FIRST_BAD + number, bad=True, **rng.choice(broken)))
        known[row["item_id"]] = row
        last[row["item_id"]] = len(arrivals)
        arrivals.append(Fed(**row))
    return arrivals


class Feeder:
    """Puts arrivals where RIM looks for them.

    Args:
        source: directory, or URL of a Redis stream.
        arrivals: in order.
    """

    def __init__(self, source: str, arrivals: list[Fed]) -> None:
        self._source, self._arrivals = source, arrivals
        self.fed = 0
        if not is_redis(source):
            Path(source).mkdir(parents=True)

    def feed(self, through: int) -> None:
        """Put all arrivals up to a number that are not there yet.

        Raises:
            RedisUnavailable: the server does not answer; what came is not put a second time.
        """
        part = self._arrivals[self.fed : through]
        if not part:
            return
        if is_redis(self._source):
            at = locate(self._source)
            client = connect(at)
            for arrival in part:
                fields = {name: int(v) if isinstance(v, bool) else v for name, v in arrival.row().items()
                          if v is not None}  # fmt: skip
                try:
                    with reachable(at):
                        client.xadd(at.name, fields, id=f"{self.fed + 1}-0")
                except ResponseError as error:  # the answer to the last attempt was lost
                    if "equal or smaller" not in str(error):
                        raise
                self.fed += 1
            return
        path = Path(self._source) / f".{self.fed:08d}"
        pq.write_table(pa.Table.from_pylist([a.row() for a in part], schema=SCHEMA), path, row_group_size=7)
        os.replace(path, path.with_name(f"{self.fed:08d}.parquet"))
        self.fed += len(part)
