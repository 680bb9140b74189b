"""Training steps of the CTR models on random batches, at sizes that benchmarks choose."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.ciubm.ubm.registry import find_model
from mim_torchrec.ctr.config import CTRConfig, ModelConfig
from mim_torchrec.ctr.task import CTRTask
from mim_torchrec.data.batch import FeatureIds, MappedIds, RequestBatch
from mim_torchrec.data.packed_batch import packed
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.training.distributed import DistributedContext

Step = Callable[[RequestBatch], Any]
MICROSECONDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Of a model and of its batches."""

    out: Path
    """Directory of the table of random vectors."""
    batch_size: int = 1024
    """Candidates in a step."""
    max_behaviors: int = 50
    """Histories have from 1 to so many behaviors, each number equally often."""
    top_k: int = 20
    """Behaviors that the searches of SIM and TWIN keep."""
    heads: int = 1
    """Attention heads of SIM and TWIN; FuxiCTR's SIM takes one only."""
    attention: int = 64
    """Hidden units of DIN's attention unit, with Dice."""
    tower: tuple[int, ...] = (200, 80)
    """Hidden layers of the tower."""
    users: int = 5000
    """Rows of the table of users."""
    items: int = 10_000
    """Rows of the table of items; small, since FuxiCTR's optimizer visits every row in every step."""
    categories: int = 100
    """Rows of the table of categories."""
    mm_dim: int = 128
    """Size of a multi-modal vector, for what MIM adds."""
    batches: int = 4
    """Different batches, used in turns."""

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the tables of ids."""
        return {"user_id": self.users, "item_id": self.items, "category": self.categories}


def make_batch(
    sizes: StepSizes, candidates: int, seed: int, mm: bool, settings: ModelConfig | None = None
) -> RequestBatch:
    """Random requests with so many candidates each; ids are rows from 1 on.

    Args:
        sizes: of the batch and of the tables.
        candidates: of a request.
        seed: of the requests.
        mm: with rows of multi-modal vectors.
        settings: of the model that takes the batch. Where it shrinks embeddings the batch has their factors,
            of random impressions; None shrinks none.
    """
    rng = np.random.default_rng(seed)
    count = max(1, round(sizes.batch_size / candidates))
    histories = rng.integers(1, sizes.max_behaviors + 1, count)
    histories[0] = sizes.max_behaviors  # FuxiCTR's SIM and TWIN fail where the longest is shorter than 50
    lengths = {"candidate": np.full(count, candidates), "behavior": histories}
    users = rng.integers(1, sizes.users, count)
    keys, values, counts = ["user_id"], [users], [np.ones(count, np.int64)]
    item_ids = {role: rng.integers(1, sizes.items, sum(n)) for role, n in lengths.items()}
    of_category = {role: 1 + ids % (sizes.categories - 1) for role, ids in item_ids.items()}
    columns = [("item_id", item_ids), ("category", of_category), *([("mm", item_ids)] if mm else [])]
    for name, of_role in columns:
        for role in ("candidate", "behavior"):
            keys.append(f"{role}_{name}")
            values.append(of_role[role])
            counts.append(lengths[role])
    now = 365 * 86_400 * MICROSECONDS
    lengths_of = [torch.from_numpy(each.astype(np.int32)) for each in counts]
    if settings is not None and settings.shrinks_ids:
        features = [
            FeatureIds(*one) for one in zip(keys, map(torch.from_numpy, values), lengths_of, strict=True)
        ]
        (mapped,) = _mapper(sizes, settings).batches(features, np.array([0, count]))
    else:
        mapped = MappedIds(
            KeyedJaggedTensor(
                keys=keys, values=torch.from_numpy(np.concatenate(values)), lengths=torch.cat(lengths_of)
            )
        )
    return RequestBatch(
        **mapped._asdict(),
        labels=torch.from_numpy(rng.integers(2, size=count * candidates).astype(np.float32)),
        request_ids=torch.arange(count),
        request_ts=torch.full((count,), now),
        behavior_ts=torch.from_numpy(now - rng.integers(MICROSECONDS, now, len(item_ids["behavior"]))),
    )  # fmt: skip


def _mapper(sizes: StepSizes, settings: ModelConfig) -> IdMapper:
    """The mapper of training, whose ids have random numbers of impressions."""
    vocabularies = {}
    for name, rows in sizes.rows.items():
        impressions = np.random.default_rng(rows).integers(0, 200, rows)
        vocabularies[name] = Vocabulary.build(
            np.arange(1, rows), impressions=impressions, shrinkage=settings.shrinkage(name)
        )
    return IdMapper(vocabularies, mm=None, max_unknown=1.0)


def ready_on(device: torch.device, batches: Iterable[RequestBatch]) -> list[RequestBatch]:
    """Batches on a device, as the stage sends them there; on a CPU they are left as they are."""
    return [batch if device.type == "cpu" else packed(batch).to(device) for batch in batches]


def random_table(sizes: StepSizes) -> Path:
    """A table of random vectors for all items, in fp16."""
    path = sizes.out / "table"
    if not path.exists():
        writer = TableWriter(path, table_version="random", dim=sizes.mm_dim, dtype="float16", encoder={})
        ids = torch.arange(1, sizes.items)
        vectors = torch.randn(len(ids), sizes.mm_dim, generator=torch.Generator().manual_seed(0))
        writer.write_shard(ids, vectors)
        writer.finish(None)
    return path


def our_config(sizes: StepSizes, name: str, dim: int, mim: bool = False) -> CTRConfig:
    """What `mim ctr` would be told, to train one of our models at these sizes."""
    model = find_model(name)
    known = {"attention": (sizes.attention,), "attention_activation": "dice", "heads": sizes.heads,
             "top_k": sizes.top_k}  # fmt: skip
    options = model(**{field.name: known[field.name] for field in fields(model) if field.name in known})
    return CTRConfig(
        data=sizes.out, out=sizes.out, ubm=name, ubm_options=options, mim="on" if mim else "off",
        embedding_dim=dim, tower=sizes.tower, lr=1e-3, max_behaviors=sizes.max_behaviors,
        # FuxiCTR's DIEN has no auxiliary loss; both have SIM's
        aux_weight=0.0 if name == "dien" else 1.0,
    )  # fmt: skip


def training_step(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    settings: CTRConfig,
    context: DistributedContext,
) -> Step:
    """A training step of a sharded model, as the loop takes it."""
    unread = cast(Any, None)  # readers and mapper are of the loop, which is not run here
    task = CTRTask(model, optimizer, unread, unread, unread, context, settings.aux_weight)
    model.train()

    def step(batch: RequestBatch) -> None:
        optimizer.zero_grad()
        loss, _ = task.training_forward(batch)
        loss.backward()
        optimizer.step()

    return step
