"""The four rows of Table 6 as models that can be stepped and scored, on a GPU or a CPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.utils._pytree import tree_leaves
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.benchmarks.measures.encoders import word_tokenizer
from mim_torchrec.benchmarks.measures.lookups import FLOAT, HALF, embedding_bytes, table_bytes
from mim_torchrec.benchmarks.measures.training_steps import (
    Step,
    StepSizes,
    make_batch,
    our_config,
    random_table,
    training_step,
)
from mim_torchrec.benchmarks.paper.efficiency.encoders_in_step import (
    FEATURES,
    Encoded,
    RandomContent,
    build_encoded_model,
)
from mim_torchrec.benchmarks.paper.efficiency.fake_encoder import FakeEncoder
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table
from mim_torchrec.embeddings.sharded.rows import DenseRows
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, learns_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.training.distributed import DistributedContext

Name = Literal["base", "wo_rc", "e2e", "mim"]
NAMES: tuple[Name, ...] = ("base", "wo_rc", "e2e", "mim")
TITLES = {
    "base": "Base", "wo_rc": "Base + MIM (w/o RC)", "e2e": "Base + MIM (E2E)", "mim": "Base + MIM",
}  # fmt: skip
UBM = "sim"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a row.

    Attributes:
        ctr: of the CTR model and of its batches.
        dim: of an ID embedding.
        id_rows: rows of the table of item ids; those that batches ask for are `ctr.items`.
        vision: foundation model of images, with random weights.
        image_size: side of an image; None is the model's own.
        text: foundation model of titles, with random weights.
        tokens: of a title.

    Raises:
        ValueError: batches ask for more items than the table has rows.
    """

    ctr: StepSizes
    dim: int
    id_rows: int
    vision: str
    image_size: int | None
    text: str
    tokens: int

    def __post_init__(self) -> None:
        if self.id_rows < self.ctr.items:
            raise ValueError(f"batches ask for {self.ctr.items} item ids, the table has {self.id_rows} rows")

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Rows of the tables of ids."""
        return self.ctr.rows | {"item_id": self.id_rows}

    def encoder(self) -> ItemEncoder:
        """An encoder of items with random weights."""
        vision = VisionEncoderConfig(name=self.vision, weights="random", image_size=self.image_size)
        text = TextEncoderConfig(name=self.text, weights="random", max_length=self.tokens)
        config = ItemEncoderConfig(vision=vision, text=text, head=HeadConfig(dim=self.ctr.mm_dim))
        return ItemEncoder.build(config, word_tokenizer() if learns_tokenizer(text) else None)


def covering_batch(config: StepSizes, mm: bool, seed: int = 0) -> RequestBatch:
    """Random requests with one candidate each that ask for every item, so that a step encodes all of them.

    Args:
        config: rows 1 to `items` - 1 are asked for, about equally often.
        mm: whether multi-modal vectors are looked up.
        seed: of the requests.

    Raises:
        ValueError: there are more items than behaviors and candidates.
    """
    batch = make_batch(config, 1, seed, mm)
    columns = batch.sparse.to_dict()
    counts = [columns[f"{role}_item_id"].values().numel() for role in ("candidate", "behavior")]
    if sum(counts) < config.items - 1:
        raise ValueError(f"{sum(counts)} candidates and behaviors cannot be of {config.items - 1} items")
    shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    rows = (1 + shuffled % (config.items - 1)).split(counts)
    of_role = dict(zip(("candidate", "behavior"), rows, strict=True))
    values = [
        of_role[key.split("_")[0]] if key.endswith(("_item_id", "_mm")) else columns[key].values()
        for key in batch.sparse.keys()
    ]
    sparse = KeyedJaggedTensor(batch.sparse.keys(), torch.cat(values), lengths=batch.sparse.lengths())
    return replace(batch, sparse=sparse)


class Row:
    """A model of the table, sharded, with its optimizer.

    Args:
        name: of the row.
        sizes: of the model.
        context: one rank; its device is where the model lives.
        fake: build the encoder without values, to count what it would take (`fake_encoder`).
    """

    def __init__(self, name: Name, sizes: Sizes, context: DistributedContext, fake: bool = False) -> None:
        self.name, self.sizes, self.device = name, sizes, context.device
        self._settings = our_config(sizes.ctr, UBM, sizes.dim, mim=name != "base")
        self.fake_encoder: FakeEncoder | None = None
        self._catalog: RandomContent | None = None
        self.model, self.optimizer = self._build(context, fake)
        self._step: Step = training_step(self.model, self.optimizer, self._settings, context)

    def _build(
        self, context: DistributedContext, fake: bool
    ) -> tuple[DistributedModelParallel, CombinedOptimizer]:
        sizes, settings = self.sizes, self._settings
        table = None
        if self.name in ("wo_rc", "e2e"):
            encoder, trained = sizes.encoder(), self.name == "e2e"
            source: Encoded | FakeEncoder
            if fake:
                source = self.fake_encoder = FakeEncoder(encoder, sizes.tokens, trained, settings)
            else:
                catalog = RandomContent.random(sizes.ctr.items - 1, encoder, sizes.tokens)
                source, self._catalog = Encoded(encoder, catalog, trained), catalog
            model = build_encoded_model(settings, sizes.num_embeddings, source, source.dim)
        else:
            if self.name == "mim":
                table = open_table(random_table(sizes.ctr))
            mm = frozen_config(table, FEATURES) if table is not None else None
            model = build_model(settings, sizes.num_embeddings, mm, torch.device("meta"))
        self._id_tables: list[BaseEmbeddingConfig] = [
            *model.request_embeddings.embedding_bag_configs(), *model.item_embeddings.embedding_configs()
        ]  # fmt: skip
        frozen = model.mm_embeddings if table is not None else None
        self._frozen_tables = frozen.embedding_configs() if frozen is not None else []
        sharded, optimizer = shard(model, settings, context)
        if table is not None:
            load_table(sharded, table)
        return sharded, optimizer

    def train(self, batch: RequestBatch) -> None:
        """One training step."""
        self.model.train()
        self._step(batch)
        if self.fake_encoder is not None:
            self.fake_encoder.update()

    @torch.no_grad()
    def infer(self, batch: RequestBatch) -> None:
        """Score the candidates of a batch."""
        self.model.eval()
        self.model(batch)

    def data_bytes(self) -> int:
        """Bytes on the model's device that Table 6 does not count: frozen table, images and titles."""
        if self.name == "mim":
            store = find_frozen(self.model, "mm")[1].store
            return store.nbytes if isinstance(store, DenseRows) and store.device == self.device else 0
        catalog = self._catalog
        return catalog.nbytes if catalog is not None and catalog.images.device == self.device else 0

    def weights(self) -> Iterator[Tensor]:
        """What inference needs in memory besides activations: dense weights and the tables of ids."""
        yield from (_local(value) for value in self.model.state_dict().values() if isinstance(value, Tensor))
        yield from self.model.buffers()  # also those that are not saved
        if self.fake_encoder is not None:
            yield from self.fake_encoder.weights()

    def resident(self) -> Iterator[Tensor]:
        """What has memory between two training steps; without the frozen table."""
        yield from self.weights()
        yield from (p.grad for p in self.model.parameters() if p.grad is not None)
        yield from self.state()
        if self.fake_encoder is not None:
            yield from self.fake_encoder.training_state()

    def state(self) -> Iterator[Tensor]:
        """State of the optimizers."""
        for leaf in tree_leaves([dict(part.state) for _, part in self.optimizer.optimizers]):
            if isinstance(leaf, Tensor):
                yield _local(leaf)

    def lookup_bytes(self, batch: RequestBatch, trained: bool) -> int:
        """Bytes that the lookups of a step or, not `trained`, of scoring move (`measures.lookups`)."""
        total = table_bytes(self._id_tables, batch.sparse, FLOAT, trained)
        total += table_bytes(self._frozen_tables, batch.sparse, HALF, trained=False)
        run = self.train if trained else self.infer
        return total + embedding_bytes(lambda: run(batch))


def _local(value: Tensor) -> Tensor:
    """What this rank, which is the only one, has of a tensor."""
    if isinstance(value, ShardedTensor):
        return value.local_shards()[0].tensor
    return value
