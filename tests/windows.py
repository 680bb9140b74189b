"""Windows of seeded vectors."""

import torch

from mim_torchrec.embeddings.windows.window import Window

DIM = 8


def tensor(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def window(seq: int = 1, *ids: int, removed: tuple[int, ...] = (), dtype: str = "float16", **words) -> Window:
    words = {"table_version": "v1", "window_id": f"w{seq}"} | words
    words |= {"seq": seq, "dtype": dtype, "removed": tensor(*removed)}
    return Window.of(tensor(*ids), vectors(len(ids), seq), **words)
