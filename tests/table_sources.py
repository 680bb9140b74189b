"""Files of vectors to import, as Parquet and as NumPy."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

IDS = torch.tensor([50, -7, 3, 1 << 40, 20, 4, 1000, 12, 77, 8, 9])
VECTORS = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(-128, 128, (11, 8), generator=torch.Generator().manual_seed(1)).to(torch.int8)
LISTS = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "fixed_size_list": lambda of: pa.list_(of, 8),
}


def parquet(
    path, ids=IDS, vectors=VECTORS, *, of=None, make=pa.list_, id_type=None, names=("id", "v"), **more
):
    """Write a Parquet file of ids and vectors, given as tensors or as lists for Arrow to convert."""
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    of = of or (
        pa.int8() if isinstance(vectors, torch.Tensor) and vectors.dtype == torch.int8 else pa.float32()
    )
    rows = vectors.numpy() if isinstance(vectors, torch.Tensor) else vectors
    if of == pa.float16():
        rows = [None if row is None else np.asarray(row, np.float16) for row in rows]
    columns = {
        names[0]: pa.array(ids, id_type or pa.int64()),
        names[1]: pa.array(list(rows), make(of)),
    }
    pq.write_table(pa.table({**columns, **more}), path, row_group_size=4)
    return path


def npy(path, ids=IDS, vectors=VECTORS):
    np.save(path / "vectors.npy", vectors)
    np.save(path / "ids.npy", ids)
    return path / "vectors.npy", path / "ids.npy"
