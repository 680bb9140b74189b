"""What the benchmark of serving scores: bundles with random weights, a table of random vectors, requests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig

from mim_torchrec.ctr.config import PRESETS, CTRConfig
from mim_torchrec.ctr.parameters import is_dense
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.serving.bundle import save_bundle
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.training.presets import Preset

MICROSECONDS = 1_000_000
COMPARED: dict[str, Preset] = {"paper": "paper", "recommended": "recommended"}
AT = 1000  # behaviors that the targets speak of
NOW = 365 * 86_400 * MICROSECONDS


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Sizes of what is scored."""

    out: Path = Path("runs/serving")
    """Directory of the report, and of the bundles."""
    behaviors: tuple[int, ...] = (50, 1000, 10_000)
    """Lengths of histories."""
    candidates: int = 500
    """Candidates of a request."""
    mm_dims: tuple[int, ...] = (64, 128)
    """Sizes of a multi-modal vector; the server has the first."""
    id_dim: int = 16
    """Size of an embedding; an item is two, of its id and of its category."""
    items: int = 100_000
    """Items of the tables."""
    users: int = 10_000
    """Users of the tables."""


def make_bundle(config: InputConfig, model: str) -> Path:
    """A bundle with random weights of a model, `<user behavior model>/<preset>`."""
    ubm, name = model.split("/")
    preset = COMPARED[name]
    values = PRESETS[preset] | {"ubm": ubm}
    out = config.out / "bundles" / model.replace("/", "-")
    settings = CTRConfig(
        data=config.out, out=config.out, preset=preset, table_version="random", recency="time",
        embedding_dim=config.id_dim, max_behaviors=max(*config.behaviors, AT), **values,
    )  # fmt: skip
    dim = config.mm_dims[0]
    rows = {"user_id": config.users, "item_id": config.items, "category": 100}
    mm = EmbeddingConfig(name="mm", num_embeddings=1, embedding_dim=dim,
                         feature_names=["candidate_mm", "behavior_mm"])  # fmt: skip
    built = build_model(settings, dict.fromkeys(rows, 1), mm, torch.device("meta"))
    dense = {name: value for name, value in built.state_dict().items() if is_dense(name)}

    def random_rows(name: str) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(len(name))
        made = 0.1 * torch.randn(rows[name] + 1, config.id_dim, generator=generator)
        return lambda: made

    tables = {name: (torch.arange(count), random_rows(name)) for name, count in rows.items()}
    save_bundle(out, settings, dense, tables, dim)
    return out


def make_table(config: InputConfig) -> Path:
    """A table of random vectors."""
    out = config.out / "table"
    if not out.exists():
        writer = TableWriter(out, table_version="random", dim=config.mm_dims[0], dtype="float16", encoder={})
        generator = torch.Generator().manual_seed(0)
        writer.write_shard(torch.arange(config.items),
                           torch.randn(config.items, config.mm_dims[0], generator=generator))  # fmt: skip
        writer.finish()
    return out


def columns(config: InputConfig, length: int, seed: int) -> dict[str, list[int]]:
    """A random request: ids and times by name."""
    rng = np.random.default_rng((seed, length))
    candidates, behaviors = (rng.integers(config.items, size=n) for n in (config.candidates, length))
    return {
        "user_id": [int(rng.integers(config.users))],
        "candidate_item_id": candidates.tolist(),
        "behavior_item_id": behaviors.tolist(),
        "candidate_category": (candidates % 100).tolist(),
        "behavior_category": (behaviors % 100).tolist(),
        "request_ts": [NOW],
        "behavior_ts": np.sort(NOW - rng.integers(1, NOW, length)).tolist(),
    }


def make_request(config: InputConfig, length: int, seed: int) -> ScoreRequest:
    """The request as a scorer has it."""
    given = columns(config, length, seed)
    ids = {n: torch.tensor(data, dtype=torch.int64) for n, data in given.items() if not n.endswith("_ts")}
    return ScoreRequest(
        ids=ids, request_ts=NOW, behavior_ts=torch.tensor(given["behavior_ts"], dtype=torch.int64)
    )
